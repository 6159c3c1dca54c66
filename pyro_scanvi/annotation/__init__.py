"""What is said of the labels of cells by their counts and their latent state, and how surely."""
