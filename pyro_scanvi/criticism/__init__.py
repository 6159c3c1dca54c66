"""Is the posterior any good? Simulation-based calibration, predictive checks, ArviZ."""
