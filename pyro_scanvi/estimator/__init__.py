"""SCANVI, the estimator that users meet: AnnData in, AnnData out."""
