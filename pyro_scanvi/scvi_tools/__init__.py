"""The names, weights and saves of scvi-tools, as dicts and files."""
