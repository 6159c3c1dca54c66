r"""Labels from marker genes, for types of which no cell is labelled.

A type that is known by its markers alone is not found by declaring it (``labels=``): nothing tells
the model which of its states is meant. Nor does it help to give every cell what its markers say as
a soft label: markers that leak into other types make soft labels that are wrong by the hundred,
and the classifier follows them. What it takes are a few cells that are surely of the type.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import issparse

from pyro_scanvi.data.columns import check_keys, check_names
from pyro_scanvi.data.counts import Counts, CountsPlace
from pyro_scanvi.names import first, names_of
from pyro_scanvi.validation import InputError, check_at_least, check_known, plain_arguments

COMMON_TOTAL = 1e4  # counts that all cells are scaled to, as scanpy does


@plain_arguments
def marker_labels(
    adata: ad.AnnData,
    labels_key: str,
    unlabeled_category: str,
    markers: Mapping[str, Iterable[str]],
    n_cells: int = 10,
    *,
    layer: str | None = None,
    use_raw: bool = False,
) -> pd.Series:
    r"""The given labels, and those of the unlabelled cells that express a type's markers most.

    The score of cell n for type y with markers :math:`M_y` is the mean over them of

    .. math:: \frac{\log(1 + 10^4\, x_{ng} / l_n) - m_g}{s_g}

    with the mean m and standard deviation s of that gene over all cells. The `n_cells` unlabelled
    cells of the highest scores are labelled, if no other type of `markers` scores higher in them.

    Parameters
    ----------
    adata
        Raw counts; it stays as it is.
    labels_key
        Column of obs with the labels.
    unlabeled_category
        Its value where the label is not known; so are cells without a value.
    markers
        Names of genes that cells of a type express and others do not, by type.
    n_cells
        How many cells of each type.
    layer, use_raw
        Where the counts are, as in ``SCANVI.setup_anndata``.

    Returns
    -------
    Series
        A label for each cell, as a category; for ``obs``.

    Raises
    ------
    InputError
        For columns or genes that are not there, or if fewer unlabelled cells express the markers of
        a type more than others.

    Examples
    --------
    >>> from pyro_scanvi import datasets
    >>> adata = datasets.pbmc68k_counts()
    >>> given = datasets.hide_labels(adata.obs["cell_type"], n_per_label=10, seed=0)
    >>> adata.obs["given"] = given.astype(str).replace("CD19+ B", "Unknown")
    >>> markers = {"CD19+ B": ["MS4A1", "CD79A", "CD79B"]}
    >>> found = marker_labels(adata, "given", "Unknown", markers)
    >>> adata.obs["cell_type"][found == "CD19+ B"].value_counts().head(1)
    cell_type
    CD19+ B    10
    Name: count, dtype: int64
    """
    check_names(adata)
    check_keys(adata, [labels_key])
    check_at_least(1, n_cells=n_cells)
    place = CountsPlace.find(adata, layer, use_raw)
    genes = _checked(markers, place.genes(adata))
    given = adata.obs[labels_key]
    labels = pd.Series(names_of(given), adata.obs_names, dtype=object)
    labels[given.isna().to_numpy()] = unlabeled_category
    free = (labels == unlabeled_category).to_numpy()
    scores = marker_scores(place.own_counts(adata), place.genes(adata), genes)
    best = scores.to_numpy().argmax(1)
    for i, name in enumerate(genes):
        fits = free & (best == i) & (scores[name] > 0).to_numpy()
        if fits.sum() < n_cells:
            raise InputError(
                f"only {fits.sum()} unlabelled cells express the markers of {name!r} above their "
                f"mean and no other type's more, expected {n_cells}; lower n_cells, or give "
                f"further markers than{first(genes[name])}"
            )
        # The first cells of the file where scores are equal, whatever the processor.
        order = np.argsort(np.where(fits, -scores[name].to_numpy(), np.inf), kind="stable")
        labels.iloc[order[:n_cells]] = name
    return labels.astype("category")


def marker_scores(
    counts: Counts, names: pd.Index, markers: Mapping[str, list[str]]
) -> pd.DataFrame:
    """The mean standardised log expression of each type's markers, cells by types."""
    totals = np.asarray(counts.sum(1), dtype=float).reshape(-1, 1)

    def score(genes: list[str]) -> np.ndarray:
        chosen = counts[:, names.get_indexer(genes)]
        logs = np.log1p(COMMON_TOTAL * dense(chosen) / totals)
        spread = logs.std(0)
        return ((logs - logs.mean(0)) / np.where(spread > 0, spread, 1)).mean(1)

    return pd.DataFrame({name: score(genes) for name, genes in markers.items()})


def dense(counts: Any) -> np.ndarray:
    """The same as an array."""
    return counts.toarray() if issparse(counts) else np.asarray(counts)


def _checked(markers: Mapping[str, Iterable[str]], known: pd.Index) -> dict[str, list[str]]:
    """Lists of genes; InputError for none, or for genes that are not there."""
    if not markers:
        raise InputError('markers is empty, expected genes by type, such as {"B": ["MS4A1"]}')
    genes = {}
    for name, given in markers.items():
        if isinstance(given, str):
            raise InputError(f"markers of {name!r} are {given!r}, expected a list of genes")
        genes[name] = list(dict.fromkeys(given))
        check_known(genes[name], known, f"a gene (a marker of {name!r})", InputError)
        if not genes[name]:
            raise InputError(f"there is no marker of {name!r}; give one or more genes")
    return genes
