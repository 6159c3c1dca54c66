"""Pictures of a trained model: UMAP of the latent space, and loss curves."""

import warnings
from collections.abc import Sequence

import anndata as ad
import matplotlib.pyplot as plt
import pandas as pd
import scanpy as sc
from matplotlib.figure import Figure


def compute_umap(adata: ad.AnnData, seed: int = 0) -> None:
    """UMAP of ``obsm["X_scanvi"]`` by scanpy, into ``obsm["X_umap"]``."""
    with warnings.catch_warnings():  # numba and umap speak of their own insides
        warnings.simplefilter("ignore")
        n_neighbors = min(15, adata.n_obs - 1)
        sc.pp.neighbors(adata, use_rep="X_scanvi", n_neighbors=n_neighbors, random_state=seed)
        sc.tl.umap(adata, random_state=seed)


def umap_figure(adata: ad.AnnData, columns: Sequence[str]) -> Figure:
    """UMAP coloured by columns of obs, side by side.

    Parameters
    ----------
    adata
        With ``obsm["X_umap"]``; see :func:`compute_umap`.
    columns
        Columns of ``obs``, such as the given labels, ``scanvi_prediction`` and
        ``scanvi_confidence``.
    """
    figure, axes = plt.subplots(1, len(columns), figsize=(6.5 * len(columns), 4.5), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        sc.pl.umap(adata, color=column, ax=axis, show=False, frameon=False)
    figure.tight_layout()
    return figure


def loss_figure(history: pd.DataFrame) -> Figure:
    """ELBO, cross-entropy and accuracy by epoch, for training and held-out cells."""
    panels = {
        "elbo": "ELBO (nats per cell)",
        "cross_entropy": "cross-entropy (nats per labelled cell)",
        "accuracy": "accuracy on labelled cells",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5))
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for name, rows in history.groupby("split"):
            axis.plot(rows["epoch"] + 1, rows[column], label=name)
        axis.set(title=title, xlabel="epoch")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    return figure
