"""What an annotation has to beat: logistic regression and the majority class, by scikit-learn."""

import numpy as np
import scanpy as sc
from anndata import AnnData
from rich.table import Table
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.metrics import label_scores


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


def score_table(model: SCANVI) -> Table:
    """Scores on the cells whose label was hidden, beside the baselines."""
    obs = model.adata.obs
    labelled = (obs[model.fields.labels_key] != model.fields.unlabeled_category).to_numpy()
    truth = obs["cell_type"].astype(str).to_numpy()
    codes = np.searchsorted(model.fields.classes, truth[~labelled])
    soft = model.adata.obsm["scanvi_probabilities"].to_numpy()[~labelled]
    methods = {"pyro_scanvi": soft} | baseline_probabilities(model.adata, truth, labelled)
    table = Table(
        title=f"{(~labelled).sum()} cells with hidden labels, {labelled.sum()} labelled cells"
    )
    for column in ("method", "accuracy", "macro-F1", "expected calibration error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, probabilities in methods.items():
        scores = label_scores(codes, probabilities)
        table.add_row(name, *(f"{score:.3f}" for score in scores.values()))
    return table
