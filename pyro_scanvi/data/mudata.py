"""Data of several modalities, such as a MuData, as one AnnData: that of the RNA."""

from collections.abc import Iterable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi.names import first
from pyro_scanvi.validation import InputError


def as_anndata(mdata: Any, rna: str = "rna", others: Iterable[str] = ()) -> ad.AnnData:
    """The AnnData of the RNA, with the other modalities in its ``obsm``, as `extra` reads them.

    ``SCANVI.setup_anndata(adata, ..., extra={"protein": "obsm/protein"})`` goes on from there.

    Parameters
    ----------
    mdata
        A MuData, or anything whose ``mod`` is a dict of AnnData; it stays as it is.
    rna
        The modality of the RNA: its counts, genes and columns are those of the result.
    others
        Further modalities; each becomes a dense table of ``obsm`` with the names of its features.
        A cell that it lacks has a row of NaN: it was not measured.

    Raises
    ------
    InputError
        If there is no such modality, it has cells that the RNA lacks, a name of a cell or feature
        stands twice, or ``obsm`` has such an entry already; nothing is made then.
    """
    modalities = getattr(mdata, "mod", None)
    if modalities is None:
        raise InputError(f"got a {type(mdata).__name__}, expected a MuData")
    others = [others] if isinstance(others, str) else list(others)
    known = [str(name) for name in modalities]
    missing = [name for name in (rna, *others) if name not in known]
    if missing:
        raise InputError(f"there is no modality {missing[0]!r}, only {', '.join(known)}")
    cells = modalities[rna]
    for name in others:
        _check(modalities[name], name, cells, rna)
    result = cells.copy()
    for name in others:
        result.obsm[name] = _table(modalities[name]).reindex(result.obs_names)
    return result


def _check(modality: ad.AnnData, name: str, cells: ad.AnnData, rna: str) -> None:
    for index in (modality.obs_names, modality.var_names, cells.obs_names):
        if not index.is_unique:
            twice = index[index.duplicated()].unique()
            raise InputError(f"names stand twice in {name!r} or {rna!r}{first(twice)}")
    strangers = modality.obs_names.difference(cells.obs_names)
    if len(strangers):
        raise InputError(
            f"{len(strangers)} of {modality.n_obs} cells of {name!r} are not in {rna!r}"
            f"{first(strangers)}; subset to cells that have RNA"
        )
    if name in cells.obsm:
        raise InputError(f"obsm[{name!r}] of {rna!r} is there already; rename it")


def _table(modality: ad.AnnData) -> pd.DataFrame:
    dense = modality.X.toarray() if hasattr(modality.X, "toarray") else np.asarray(modality.X)
    return pd.DataFrame(dense, index=modality.obs_names, columns=modality.var_names)
