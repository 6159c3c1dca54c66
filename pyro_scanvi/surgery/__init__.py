"""New cells on a trained reference: a model that grows, and what of it may move."""
