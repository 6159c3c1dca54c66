"""A bench for stochastic variational inference: each function returns a tidy DataFrame."""
