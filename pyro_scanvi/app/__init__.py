"""The command line, and the pictures and baselines that it shows."""
