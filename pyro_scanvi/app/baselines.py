"""What an annotation has to beat: logistic regression and the majority class, by scikit-learn."""

import numpy as np
import scanpy as sc
from anndata import AnnData
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression


def baseline_probabilities(
    adata: AnnData, labels: np.ndarray, labelled: np.ndarray
) -> dict[str, np.ndarray]:
    """Label probabilities of the unlabelled cells, for each baseline.

    Parameters
    ----------
    adata
        Raw counts in X; logistic regression sees them scaled to 10,000 a cell, log(1 + x).
    labels
        Label of each cell, (N,).
    labelled
        Whether it is known, (N,); the others are not looked at.

    Returns
    -------
    dict
        Arrays (n_unlabelled, L) with the classes in sorted order.
    """
    features = AnnData(adata.X.copy())
    sc.pp.normalize_total(features, target_sum=1e4)
    sc.pp.log1p(features)
    baselines = {
        "logistic regression": LogisticRegression(max_iter=2000),
        "majority class": DummyClassifier(strategy="prior"),
    }
    return {
        name: model.fit(features.X[labelled], labels[labelled]).predict_proba(features.X[~labelled])
        for name, model in baselines.items()
    }
