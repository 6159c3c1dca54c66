"""Pictures of a trained model: UMAP of the latent space, and loss curves."""

import warnings
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt
import pandas as pd
import scanpy as sc
from matplotlib.figure import Figure
from scanpy.plotting.palettes import default_20, default_102

from pyro_scanvi.threads import as_told


def compute_umap(adata: ad.AnnData, seed: int = 0) -> None:
    """UMAP of ``obsm["X_scanvi"]`` by scanpy, into ``obsm["X_umap"]``."""
    # numba sets the threads of OpenMP, which are torch's too, and speaks of its own insides.
    with as_told(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        n_neighbors = min(15, max(2, adata.n_obs - 1))
        sc.pp.neighbors(adata, use_rep="X_scanvi", n_neighbors=n_neighbors, random_state=seed)
        start = "spectral" if adata.n_obs > 3 else "random"  # three cells have no spectrum to use
        sc.tl.umap(adata, init_pos=start, random_state=seed)


def umap_figure(adata: ad.AnnData, columns: Sequence[str], unlabeled: str = "Unknown") -> Figure:
    """UMAP coloured by columns of obs, side by side; a label has one colour in all of them.

    Parameters
    ----------
    adata
        With ``obsm["X_umap"]``; see :func:`compute_umap`.
    columns
        Columns of ``obs``, such as the given labels, ``scanvi_prediction`` and
        ``scanvi_confidence``.
    unlabeled
        The category that is drawn in grey.
    """
    figure, axes = plt.subplots(1, len(columns), figsize=(6.5 * len(columns), 4.5), squeeze=False)
    palette = _palette(adata.obs[list(columns)], unlabeled)
    for axis, column in zip(axes[0], columns, strict=True):
        categorical = isinstance(adata.obs[column].dtype, pd.CategoricalDtype)
        chosen = palette if categorical else None
        sc.pl.umap(adata, color=column, palette=chosen, ax=axis, show=False, frameon=False)
    figure.tight_layout()
    return figure


def _palette(obs: pd.DataFrame, unlabeled: str) -> dict[Any, str]:
    """One colour for each category of any column, by the order in which they come."""
    categories = [
        c for _, column in obs.select_dtypes("category").items() for c in column.cat.categories
    ]
    labels = [c for c in dict.fromkeys(categories) if c != unlabeled]
    colours = default_102 if len(labels) > len(default_20) else default_20
    return dict(zip(labels, cycle(colours), strict=False)) | {unlabeled: "lightgrey"}


def loss_figure(history: pd.DataFrame) -> Figure:
    """ELBO, cross-entropy and accuracy by epoch, for training and held-out cells.

    What the history lacks, as accuracy where no label is exact, is left out.
    """
    panels = {
        "elbo": "ELBO (nats per cell)",
        "cross_entropy": "cross-entropy (nats per labelled cell)",
        "accuracy": "accuracy on labelled cells",
    }
    panels = {column: title for column, title in panels.items() if column in history}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, (column, title) in zip(axes[0], panels.items(), strict=True):
        for name, rows in history.groupby("split"):
            axis.plot(rows["epoch"] + 1, rows[column], label=name)
        axis.set(title=title, xlabel="epoch")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    return figure
