"""How the objective is minimised: settings, the Lightning module, runs, checkpoints."""
