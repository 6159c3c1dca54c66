"""The setup of an AnnData as it is noted: in its ``uns``, and as JSON beside a saved model.

Both hold the arguments of :class:`~pyro_scanvi.data.fields.Fields`, each in the form that its file
can keep.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np

from pyro_scanvi.data.columns import check_names
from pyro_scanvi.data.extra import Extra
from pyro_scanvi.data.label_sources import LabelSources
from pyro_scanvi.validation import InputError

UNS_KEY = "pyro_scanvi"
KEYS = ("categorical_covariate_keys", "continuous_covariate_keys")
LISTS = ("labels", "set_names", "coarse_names", "annotator_keys")  # of label sources
MEMBERS = ("set_members", "coarse_members")
ARRAYS = ("classes", "batches", "genes")


def to_uns(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A plain dict of strings and arrays, which ``write_h5ad`` keeps."""
    keys = {name: np.array(arguments[name], dtype=object) for name in KEYS}
    # By number, not by key: a file takes the slash in a key for a group.
    covariates = _by_number(arguments["covariate_categories"])
    extra = [{**e, "columns": np.array(e["columns"], dtype=object)} for e in arguments["extra"]]
    return {
        **arguments,
        **keys,
        "covariate_categories": covariates,
        "extra": _by_number(extra),
        "sources": _sources_to_uns(arguments["sources"]),
    }


def from_uns(adata: ad.AnnData) -> dict[str, Any]:
    """The arguments that an AnnData holds; InputError if it was not set up."""
    if "setup" not in adata.uns.get(UNS_KEY, {}):
        raise InputError(
            "this AnnData has not been set up; call SCANVI.setup_anndata(adata, labels_key, "
            "unlabeled_category, ...) first"
        )
    stored = adata.uns[UNS_KEY]["setup"]
    covariates = _in_order(stored["covariate_categories"])
    extra = _in_order(stored.get("extra", {}))  # this one and the next: not in old notes
    sources = dict(stored.get("sources", {}))
    if sources:
        sources |= {name: _in_order(sources[name]) for name in MEMBERS}
    noted = {"covariate_categories": covariates, "extra": extra, "sources": sources}
    return from_json({**stored, **noted})


def from_json(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a record, its arrays and tuples being lists or arrays, which are copied."""
    return {
        **stored,
        **{name: np.array(stored[name]) for name in ARRAYS},
        **{name: tuple(map(str, stored[name])) for name in KEYS},
        "covariate_categories": tuple(map(np.array, stored["covariate_categories"])),
        "use_raw": bool(stored.get("use_raw", False)),  # these are not in old records
        "extra": tuple(_extra(entry) for entry in stored.get("extra", ())),
        "sources": _sources(stored.get("sources", {})),
    }


def _extra(entry: Mapping[str, Any]) -> Extra:
    columns = tuple(map(str, entry["columns"]))
    return Extra(str(entry["name"]), str(entry["place"]), int(entry["n_columns"]), columns)


def _sources_to_uns(sources: Mapping[str, Any]) -> dict[str, Any]:
    lists = {name: np.array(sources[name], dtype=object) for name in LISTS}
    members = {
        name: _by_number(np.array(labels, dtype=object) for labels in sources[name])
        for name in MEMBERS
    }
    return {**sources, **lists, **members}


def _sources(stored: Mapping[str, Any]) -> LabelSources:
    if not stored:
        return LabelSources()
    arguments: dict[str, Any] = {name: str(stored[name]) for name in ("coarse_key", "soft_key")}
    arguments |= {name: tuple(map(str, stored[name])) for name in LISTS}
    for name in MEMBERS:
        arguments[name] = tuple(tuple(map(str, labels)) for labels in stored[name])
    return LabelSources(**arguments)


def _by_number(values: Iterable) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(values)}


def _in_order(by_number: Mapping[str, Any]) -> list:
    return [by_number[str(i)] for i in range(len(by_number))]


def note(adata: ad.AnnData, arguments: Mapping[str, Any]) -> None:
    """Write a setup into ``adata.uns``."""
    adata.uns[UNS_KEY] = {"setup": to_uns(arguments)}


@contextmanager
def noted(adata: ad.AnnData, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Write a setup; if what is done with it fails, put back what was there."""
    check_names(adata)
    before = adata.uns.get(UNS_KEY)
    note(adata, arguments)
    try:
        yield
    except BaseException:
        if before is None:
            del adata.uns[UNS_KEY]
        else:
            adata.uns[UNS_KEY] = before
        raise
