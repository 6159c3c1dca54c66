"""Cells to time with: counts of no data set, of a given size and share of zeros."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

GIVEN, UNLABELED = "given", "Unknown"
SHARE_LABELLED = 0.5
ROWS_AT_ONCE = 1000


def write_cells(path: Path, n_cells: int, n_genes: int, n_labels: int, nonzero: float) -> None:
    """Negative binomial counts, with types that differ in a tenth of their genes, half labelled."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, n_labels, n_cells)
    label[:n_labels] = np.arange(n_labels)
    of_type = np.exp(2 * rng.normal(size=(n_labels, n_genes)) * (rng.random(n_genes) < 0.1))
    gene = rng.gamma(0.35, 1, n_genes)
    gene *= level(gene, nonzero)
    blocks = np.array_split(np.arange(n_cells), -(-n_cells // ROWS_AT_ONCE))
    counts = vstack([block(rng, gene * of_type[label[rows]]) for rows in blocks], format="csr")
    given = np.where(rng.random(n_cells) < SHARE_LABELLED, label.astype(str), UNLABELED)
    given[:n_labels] = label[:n_labels]
    obs = pd.DataFrame({GIVEN: pd.Categorical(given)}, index=[f"cell {i}" for i in range(n_cells)])
    ad.AnnData(counts, obs, pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])).write_h5ad(path)


def block(rng: np.random.Generator, mean: np.ndarray) -> csr_matrix:
    """Counts of cells that differ in size, at least one a cell."""
    size, noise = rng.gamma(4, 0.25, (len(mean), 1)), rng.gamma(1, 1, mean.shape)
    counts = rng.poisson(mean * size * noise).astype(np.float32)
    counts[:, 0] += counts.sum(1) == 0
    return csr_matrix(counts)


def level(gene: np.ndarray, nonzero: float) -> float:
    """The factor at which that share of counts with these means is not zero, by bisection.

    A gamma of shape 1 mixed over a Poisson: a count is zero with probability 1 / (1 + mean).
    """
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (
            (low, middle) if (1 - 1 / (1 + middle * gene)).mean() > nonzero else (middle, high)
        )
    return low
