"""Scores of a latent space by scib-metrics: are types kept, are batches mixed?

    python scib_scores.py SPACE.npz SCORES.json

Needs ``pip install scib-metrics``, in an environment of its own. SPACE holds latent (N, K), truth
(N,) and batch (N,), of one value where there are no batches; then types alone are scored. The two
sums are means of what they stand for, as in Luecken et al. 2022, Nat Methods 19:41.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import scib_metrics as scib
from scib_metrics.nearest_neighbors import pynndescent

N_NEIGHBORS = 90


def of_types(latent, truth, neighbors):
    """Do types form groups of their own?"""
    found = scib.nmi_ari_cluster_labels_kmeans(latent, truth)
    found["silhouette"] = scib.silhouette_label(latent, truth)
    found["clisi"] = scib.clisi_knn(neighbors, truth)
    return found


def of_batches(latent, truth, batch, neighbors):
    """Are the cells of a type the same in all batches?"""
    return {
        "batch_silhouette": scib.silhouette_batch(latent, truth, batch),
        "ilisi": scib.ilisi_knn(neighbors, batch),
        "connectivity": scib.graph_connectivity(neighbors, truth),
        "kbet": scib.kbet_per_label(neighbors, batch, truth),
    }


def scores(latent, truth, batch):
    """Each of them, and their means."""
    neighbors = pynndescent(latent, n_neighbors=N_NEIGHBORS, random_state=0)
    kept = of_types(latent, truth, neighbors)
    found = kept | {"scib_types": np.mean([*kept.values()])}
    if len(set(batch)) > 1:
        mixed = of_batches(latent, truth, batch, neighbors)
        found |= mixed | {"scib_batches": np.mean([*mixed.values()])}
    return {name: float(value) for name, value in found.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with np.load(sys.argv[1]) as space:
        codes = (np.unique(space[name], return_inverse=True)[1] for name in ("truth", "batch"))
        found = scores(space["latent"].astype(np.float32), *codes)
    Path(sys.argv[2]).write_text(json.dumps(found))
