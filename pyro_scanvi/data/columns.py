"""Names of cells and genes, and columns of obs: keys, categories and their codes, numbers.

Each is checked, none remembered.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi.names import (
    first,
    listed,
    look_alikes,
    names_of,
    nearest,
    reads_unlabeled,
    renaming,
)
from pyro_scanvi.validation import InputError

MISSING, UNSEEN = -2, -1  # codes of cells without a value, and with one that is not known
INSTEAD = {  # by the type that is no AnnData
    "MuData": ": that of its RNA, with the other modalities in obsm, which extra= names; "
    "pyro_scanvi.data.mudata.as_anndata makes it"
}
MEND_UNSEEN = {  # by what is unseen
    "labels": "name new labels in extend_labels of SCANVI.load_query_data",
    "batches": "SCANVI.load_query_data(adata, reference, extend_categories=True) makes new ones",
    "categories": "SCANVI.load_query_data(adata, reference, extend_categories=True) makes new ones",
}


def check_names(adata: ad.AnnData) -> None:
    """Refuse what is no AnnData, has no cells or genes, or names cells not or twice."""
    if not isinstance(adata, ad.AnnData):
        kind = type(adata).__name__
        raise InputError(f"got a {kind}, expected an AnnData{INSTEAD.get(kind, '')}")
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise InputError(f"the AnnData has {adata.n_obs} cells and {adata.n_vars} genes")
    _check_unique(adata.obs_names, "cells", "adata.obs_names_make_unique()")


def check_gene_names(names: pd.Index) -> None:
    """Refuse genes without a name, or of the same name."""
    _check_unique(names, "genes", "adata.var_names_make_unique()")


def _check_unique(names: pd.Index, what: str, mend: str) -> None:
    nameless = np.flatnonzero(names.isna() | names.astype(str).isin(["", "nan"]))
    if len(nameless):
        raise InputError(
            f"{len(nameless)} {what} have no name, at the positions{first(nameless)}; name them, "
            "or leave them out"
        )
    if not names.is_unique:
        twice = names[names.duplicated()].unique()
        raise InputError(f"names of {what} that occur twice: {len(twice)}{first(twice)}; {mend}")


def one_key(name: str, key: Any) -> str:
    """The name of a column; empty for None."""
    if key is None or isinstance(key, str):
        return key or ""
    several = isinstance(key, Iterable) and len(list(key)) == 1
    hint = f": {list(key)[0]!r}" if several else ""
    raise InputError(f"{name}={key!r}, expected the name of one column of obs{hint}")


def listed_keys(name: str, keys: Any) -> tuple[str, ...]:
    """Names of columns; none for None."""
    if isinstance(keys, str):
        raise InputError(f"{name}={keys!r}, expected a list: [{keys!r}]")
    listed = tuple(keys or ())
    if not all(isinstance(key, str) for key in listed):
        raise InputError(f"{name}={keys!r}, expected a list of names of columns of obs")
    twice = {key for key in listed if listed.count(key) > 1}
    if twice:
        raise InputError(f"{name} names {sorted(twice)[0]!r} twice; name each column once")
    return listed


def check_keys(adata: ad.AnnData, keys: Iterable[str]) -> None:
    """Refuse keys that are not columns of obs, naming the nearest one, and doubled columns."""
    columns = [str(c) for c in adata.obs.columns]
    for key in keys:
        if columns.count(key) > 1:
            raise InputError(
                f"obs has {columns.count(key)} columns {key!r}; keep one: "
                "adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]"
            )
        if key in adata.obs:
            continue
        there_are = f"there are: {', '.join(columns) or 'none'}"
        hint = nearest(key, columns, there_are, cutoff=0.6)
        raise InputError(f"obs has no column {key!r}; {hint}")


def categories(adata: ad.AnnData, key: str, complete: bool = True) -> np.ndarray:
    """The values that occur in a column of obs, in the order of its categories.

    A `complete` column has a value for each cell.
    """
    if complete:
        check_complete(adata, key)
    column = column_of(adata, key)
    found = _plain_categories(column.cat.remove_unused_categories().cat.categories)
    names = pd.Index(names_of(found))
    if not names.is_unique:
        twice = names[names.duplicated()].unique()
        raise InputError(f"obs[{key!r}] holds different values that read alike{first(twice)}")
    for group in look_alikes(names):
        warnings.warn(
            f"obs[{key!r}] holds {' and '.join(map(repr, group))}, which differ in case or blanks "
            f"alone and count as different; rename them if they are one: "
            f"{renaming(dict.fromkeys(group[1:], group[0]), key)}",
            stacklevel=4,
        )
    return found


def column_of(adata: ad.AnnData, key: str) -> pd.Series:
    """A column of obs as categories."""
    return adata.obs[key].astype("category")


def check_complete(adata: ad.AnnData, key: str) -> None:
    """Refuse a column in which values are missing."""
    missing = adata.obs[key].isna().to_numpy()
    if missing.any():
        names = adata.obs_names[missing]
        raise InputError(
            f"obs[{key!r}] has no value in {len(names)} cells{first(names)}; fill them, or leave "
            "the cells out"
        )


def _plain_categories(values: pd.Index) -> np.ndarray:
    """Categories as an array that a file can hold: numbers, booleans or strings."""
    plain = np.array(values.tolist())
    if plain.dtype.kind in "biuf":
        return plain
    return np.array([str(value) for value in values], dtype=object)


def codes_of(column: pd.Series, known: Iterable) -> np.ndarray:
    """Position of each cell's category among the known ones, or MISSING, or UNSEEN; (N,)."""
    places = pd.Index(names_of(known)).get_indexer(names_of(column.cat.categories))
    return np.append(places, MISSING)[column.cat.codes].astype(np.int64)


def known_codes(adata: ad.AnnData, key: str, known: np.ndarray, what: str) -> np.ndarray:
    """The same of a column in which no value may be missing or unseen."""
    check_complete(adata, key)
    column = column_of(adata, key)
    codes = codes_of(column, known)
    refuse_unseen(names_of_cells(column, codes == UNSEEN), known, f"obs[{key!r}]", what)
    return codes


def names_of_cells(column: pd.Series, chosen: np.ndarray | None) -> pd.Series:
    """The category of each chosen cell that has one, by name; None is all cells."""
    names = np.array(names_of(column.cat.categories), dtype=object)
    codes = column.cat.codes.to_numpy()
    there = codes >= 0 if chosen is None else (codes >= 0) & chosen
    return pd.Series(names[codes[there]], dtype=object)


def refuse_unseen(unseen: pd.Series, known: Iterable, where: str, what: str) -> None:
    """Refuse categories that the model does not know, and say how it can get to know them."""
    names = unseen.unique()
    if len(names):
        raise InputError(
            f"{where} has {len(names)} {what} that the model has not seen{first(names)}; it "
            f"knows {listed(names_of(known))}; {MEND_UNSEEN[what]}"
        )


def check_meant(labels: pd.Series, labels_key: str, unlabeled: str) -> None:
    """Refuse labels that look as if they meant that the label is not known."""
    found = labels.value_counts()
    near = [n for n in found.index if n != unlabeled and reads_unlabeled(n, unlabeled)]
    if near:
        told = ", ".join(f"{found[name]} cells labelled {name!r}" for name in near)
        raise InputError(
            f"obs[{labels_key!r}] holds {told}, which reads as if the label were not known, and "
            f"unlabeled_category is {unlabeled!r}: they would be taken for a type. Rename them: "
            f"{renaming(dict.fromkeys(near, unlabeled), labels_key)}; or give "
            f"unlabeled_category={near[0]!r}; a type needs a name of its own",
            {"unlabeled_category": near[0]},
        )


def numbers_of(adata: ad.AnnData, key: str) -> np.ndarray:
    """A column of numbers, (N,); InputError for text, and for what is missing or infinite."""
    try:
        values = adata.obs[key].to_numpy(dtype=np.float32, na_value=np.nan)
    except (TypeError, ValueError):
        raise InputError(f"obs[{key!r}] does not hold numbers") from None
    if not np.isfinite(values).all():
        name = adata.obs_names[~np.isfinite(values)][0]
        raise InputError(f"obs[{key!r}] is not finite, first in cell {name!r}")
    return values


def weights_of(adata: ad.AnnData, weights: str | Sequence[float] | None) -> np.ndarray | None:
    """Weight of each cell, a column of obs or numbers, scaled to a mean of 1; (N,)."""
    if weights is None:
        return None
    values = np.asarray(_given_weights(adata, weights), dtype=np.float32)
    if values.shape != (adata.n_obs,):
        raise InputError(
            f"cell_weights has shape {values.shape}, expected one number for each of the "
            f"{adata.n_obs} cells"
        )
    wrong = ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        raise InputError(
            f"cell_weights holds {values[wrong][0]} for cell {adata.obs_names[wrong][0]!r}, "
            "expected positive numbers; leave cells out by adata[cells]"
        )
    return values / values.mean()


def _given_weights(
    adata: ad.AnnData, weights: str | Sequence[float]
) -> Sequence[float] | np.ndarray:
    if not isinstance(weights, str):
        return weights
    check_keys(adata, [weights])
    return numbers_of(adata, weights)
