"""The probabilistic program: factors, model, guide, networks, likelihoods, objective."""
