"""What is asked of a trained model: a file a theme, its questions a class for SCANVI.

A question checks its arguments, encodes the AnnData, asks functions that know tensors only, and
gives the answer the names of cells, genes and labels. It changes nothing.
"""
