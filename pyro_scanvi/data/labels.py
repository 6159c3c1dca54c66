"""Which values of a column of obs are labels, and which say that there is none."""

import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi.data.columns import categories, check_meant, column_of, names_of_cells
from pyro_scanvi.data.label_sources import LabelSources
from pyro_scanvi.names import listed, look_alikes, name_of, names_of
from pyro_scanvi.validation import InputError

WRITTEN = ("scanvi_prediction", "scanvi_confidence")  # columns of obs


def unlabeled_name(category: Any) -> str:
    """The unlabelled category as a name; "Unknown" where only missing values are unlabelled."""
    if not np.isscalar(category) and category is not None and category is not pd.NA:
        raise InputError(f"unlabeled_category={category!r}, expected one value")
    return "Unknown" if pd.isna(category) else name_of(category)


def check_not_ours(labels_key: str) -> None:
    """Refuse a column that predictions will replace."""
    if labels_key in WRITTEN:
        raise InputError(
            f"obs[{labels_key!r}] is where predictions are written, replacing the labels; "
            "copy it to a column of another name"
        )


def find_classes(
    adata: ad.AnnData,
    labels_key: str,
    unlabeled_category: str,
    sources: LabelSources = LabelSources(),  # noqa: B008  # frozen
) -> np.ndarray:
    """The labels that occur, in the order of their categories, and then those that are named.

    Neither the unlabelled category nor a name of a set of labels is one.
    """
    labels = column_of(adata, labels_key)
    check_meant(names_of_cells(labels, None), labels_key, unlabeled_category)
    found = categories(adata, labels_key, complete=False)
    is_class = ~np.isin(names_of(found), [unlabeled_category, *sources.set_names])
    occurring, column = found[is_class], f"obs[{labels_key!r}]"
    classes = with_named(occurring, sources.named(adata, unlabeled_category))
    _say_alike(set(names_of(occurring)), names_of(classes), column)
    if len(classes) == 0:
        raise InputError(f"no cell is labelled: {column} is {unlabeled_category!r} everywhere")
    if len(classes) == 1:
        raise InputError(
            f"{column} has a single class, {classes[0]!r}; there is nothing to tell apart"
        )
    if is_class.all() and not labels.isna().any():
        warnings.warn(
            f"{unlabeled_category!r} does not occur in {column}: all {adata.n_obs} cells count as "
            f"labelled, as {listed(classes)}",
            stacklevel=3,
        )
    return classes


def with_named(known: np.ndarray, names: list[str]) -> np.ndarray:
    """The labels with those names that are not among them; as strings where they were numbers."""
    new = [name for name in names if name not in names_of(known)]
    return np.array([*names_of(known), *new], dtype=object) if new else known


def _say_alike(occurring: set[str], classes: list[str], column: str) -> None:
    """Warn of labels that are named elsewhere nearly as in the column."""
    for group in look_alikes(classes):
        if not occurring.issuperset(group):
            warnings.warn(
                f"{' and '.join(map(repr, group))} differ in case or blanks alone and count as "
                f"different; not all of them stand in {column}: the others are named elsewhere",
                stacklevel=5,
            )
