"""CellTypist, trained on the given labels: logistic regression, or stochastic gradient descent.

    python celltypist_peer.py CELLS.h5ad FOLDER SEED BATCH_KEY|- [lr] [sgd]

Needs ``pip install celltypist "scikit-learn<1.8"``, in an environment of its own. CELLS holds raw
counts and obs["given"], "Unknown" where no label is given. FOLDER gets METHOD.npz of each: classes,
probabilities and seconds.
"""

import sys
import time
import warnings
from pathlib import Path

import anndata as ad
import celltypist
import numpy as np
import scanpy as sc
from scipy.special import expit

SMALLEST = 1e-12  # probability; that of each type is below what a float holds for some cells
METHODS = {"lr": {}, "sgd": {"use_SGD": True, "balance_cell_type": True}}


def answer(cells, settings):
    """Classes and probabilities, of one against the rest brought to a sum of 1."""
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    reference = cells[cells.obs["given"] != "Unknown"].copy()
    model = celltypist.train(reference, "given", check_expression=False, **settings)
    scores = celltypist.annotate(cells, model).decision_matrix
    against_rest = expit(scores.to_numpy(np.float64)).clip(SMALLEST)
    return scores.columns.to_numpy(str), against_rest / against_rest.sum(1, keepdims=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    source, folder, seed, _, *methods = sys.argv[1:]
    for method in methods:
        np.random.seed(int(seed))
        cells, start = ad.read_h5ad(source), time.perf_counter()
        classes, probabilities = answer(cells, METHODS[method])
        np.savez(
            Path(folder) / f"{method}.npz",
            classes=classes,
            probabilities=probabilities,
            seconds=time.perf_counter() - start,
        )
