"""The command line, the report, and the baselines that they are seen beside."""
