"""Checks of an AnnData before anything is read of it: its kind, and the names in it."""

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi.names import first
from pyro_scanvi.validation import InputError


def check_names(adata: ad.AnnData) -> None:
    """Refuse what is no AnnData, has no cells or genes, or names cells not or twice."""
    if not isinstance(adata, ad.AnnData):
        raise InputError(f"got a {type(adata).__name__}, expected an AnnData")
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
        raise InputError(f"{len(twice)} names of {what} occur twice{first(twice)}; {mend}")
