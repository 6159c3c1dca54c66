"""Data to try things on, without downloading anything."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy.sparse import csr_matrix

SCANPY_TOTAL = 1e4  # the common total that scanpy scaled the shipped cells to
LARGEST_RESIDUAL = 0.1


def pbmc68k_counts() -> ad.AnnData:
    """700 peripheral blood cells of 10 types that scanpy ships, with their integer counts.

    ``pbmc68k_reduced`` keeps log(1 + counts scaled to a common total) in ``raw``, and each cell's
    total count in ``obs["n_counts"]``. Undoing logarithm and scaling gives the counts back.

    Returns
    -------
    AnnData
        700 cells by 765 genes, counts as CSR, ``obs["cell_type"]``.

    Raises
    ------
    ValueError
        If a value is further than 0.1 from a whole number before rounding.
    """
    with warnings.catch_warnings():  # the file is in an old format
        warnings.simplefilter("ignore")
        shipped = sc.datasets.pbmc68k_reduced()
    scaled = np.expm1(shipped.raw.X.toarray().astype(float))
    unrounded = scaled * shipped.obs["n_counts"].to_numpy(dtype=float)[:, None] / SCANPY_TOTAL
    counts = np.rint(unrounded)
    residual = np.abs(unrounded - counts).max()
    if residual > LARGEST_RESIDUAL:
        raise ValueError(
            f"scanpy's pbmc68k_reduced has changed: its values are up to {residual:.2g} from whole "
            f"counts, expected {LARGEST_RESIDUAL} at most"
        )
    cell_type = shipped.obs["bulk_labels"].astype(str).astype("category")
    obs = pd.DataFrame({"cell_type": cell_type}, index=shipped.obs_names.astype(str))
    var = pd.DataFrame(index=shipped.raw.var_names.astype(str))
    return ad.AnnData(csr_matrix(counts.astype(np.float32)), obs, var)


def hide_labels(
    labels: pd.Series, n_per_label: int, seed: int, hidden: str = "Unknown"
) -> pd.Series:
    """Keep `n_per_label` labels of each type, at most half of a type, and hide the rest.

    Parameters
    ----------
    labels
        Label of each cell.
    n_per_label
        Number to keep of each.
    seed
        Of the choice.
    hidden
        Value of the hidden ones.

    Examples
    --------
    >>> hide_labels(pd.Series(["B", "T"] * 4), n_per_label=1, seed=0).value_counts()
    Unknown    6
    B          1
    T          1
    Name: count, dtype: int64
    """
    rng = np.random.default_rng(seed)
    values = labels.astype(str).to_numpy()
    result = np.full(len(values), hidden, dtype=object)
    for name in np.unique(values):
        members = np.flatnonzero(values == name)
        kept = rng.choice(members, min(n_per_label, len(members) // 2), replace=False)
        result[kept] = name
    return pd.Series(result, index=labels.index, dtype="category")
