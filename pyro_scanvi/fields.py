"""From an AnnData to arrays: which columns mean what, their categories, and checks at the door."""

import difflib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse

from pyro_scanvi.checks import InputError
from pyro_scanvi.data import UNLABELED, CellData
from pyro_scanvi.interop import ScviSave

UNS_KEY = "pyro_scanvi"
MEND_UNSEEN = {  # by what is unseen
    "labels": "name new labels in extend_labels of SCANVI.load_query_data",
    "batches": "SCANVI.load_query_data(adata, reference, extend_categories=True) makes new ones",
    "categories": "SCANVI.load_query_data(adata, reference, extend_categories=True) makes new ones",
}
NAMES_SHOWN = 5
WRITTEN = ("scanvi_prediction", "scanvi_confidence")  # columns of obs


@dataclass(frozen=True)
class Fields:
    """The columns of an AnnData that the model reads, and their categories, frozen.

    Attributes
    ----------
    labels_key, unlabeled_category
        Column of ``obs`` with the labels, and its value where a label is not known.
    layer
        Layer with the counts; empty is ``X``.
    batch_key, size_factor_key
        Columns of ``obs``; empty is none.
    categorical_covariate_keys, continuous_covariate_keys
        Columns of ``obs``.
    classes, batches
        Categories in the order of their codes.
    covariate_categories
        Categories of each categorical covariate.
    genes
        Names of the genes, in order.
    """

    labels_key: str
    unlabeled_category: str
    layer: str
    batch_key: str
    size_factor_key: str
    categorical_covariate_keys: tuple[str, ...]
    continuous_covariate_keys: tuple[str, ...]
    classes: np.ndarray
    batches: np.ndarray
    covariate_categories: tuple[np.ndarray, ...]
    genes: np.ndarray

    @classmethod
    def from_anndata(
        cls,
        adata: ad.AnnData,
        labels_key: str,
        unlabeled_category: str,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Iterable[str] | None = None,
        continuous_covariate_keys: Iterable[str] | None = None,
    ) -> "Fields":
        """Check an AnnData and find the categories of its columns; raises InputError."""
        categorical = tuple(categorical_covariate_keys or ())
        continuous = tuple(continuous_covariate_keys or ())
        check_names(adata)
        _check_not_ours(labels_key)
        optional = [k for k in (batch_key, size_factor_key) if k]
        check_keys(adata, [labels_key, *optional, *categorical, *continuous])
        check_counts(counts_of(adata, layer), adata)
        classes = find_classes(adata, labels_key, unlabeled_category)
        batches = categories(adata, batch_key) if batch_key else np.array(["all cells"])
        if batch_key and len(batches) == 1:
            _say(f"obs[{batch_key!r}] has one value, {batches[0]!r}: the batch explains nothing")
        return cls(
            labels_key=labels_key,
            unlabeled_category=unlabeled_category,
            layer=layer or "",
            batch_key=batch_key or "",
            size_factor_key=size_factor_key or "",
            categorical_covariate_keys=categorical,
            continuous_covariate_keys=continuous,
            classes=classes,
            batches=batches,
            covariate_categories=tuple(categories(adata, key) for key in categorical),
            genes=adata.var_names.to_numpy(dtype=str),
        )

    @classmethod
    def from_uns(cls, adata: ad.AnnData) -> "Fields":
        """Read what :meth:`to_uns` stored."""
        if "setup" not in adata.uns.get(UNS_KEY, {}):
            raise InputError(
                "this AnnData has not been set up; call SCANVI.setup_anndata(adata, labels_key, "
                "unlabeled_category, ...) first"
            )
        stored = dict(adata.uns[UNS_KEY]["setup"])
        keys = ("categorical_covariate_keys", "continuous_covariate_keys")
        tuples = {k: tuple(str(v) for v in stored[k]) for k in keys}
        per_covariate = stored["covariate_categories"]
        tuples["covariate_categories"] = tuple(
            np.asarray(per_covariate[str(i)]) for i in range(len(per_covariate))
        )
        return cls(**(stored | tuples))

    @classmethod
    def from_scvi_save(cls, save: ScviSave) -> "Fields":
        """The columns and categories of a model that scvi-tools saved, in its order of codes."""
        keys = save.setup_args
        return cls(
            labels_key=keys.get("labels_key") or "",
            unlabeled_category=save.unlabeled_category,
            layer=keys.get("layer") or "",
            batch_key=keys.get("batch_key") or "",
            size_factor_key=keys.get("size_factor_key") or "",
            categorical_covariate_keys=tuple(save.covariate_categories),
            continuous_covariate_keys=tuple(save.continuous_covariates),
            classes=np.array(save.classes),
            batches=np.array(save.batches),
            covariate_categories=tuple(np.array(c) for c in save.covariate_categories.values()),
            genes=save.var_names,
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Fields":
        """From ``asdict`` of fields, after its arrays and tuples became lists."""
        keys = ("categorical_covariate_keys", "continuous_covariate_keys")
        arrays = {k: np.array(stored[k]) for k in ("classes", "batches", "genes")}
        tuples: dict[str, tuple] = {k: tuple(stored[k]) for k in keys}
        tuples["covariate_categories"] = tuple(map(np.array, stored["covariate_categories"]))
        return cls(**(stored | arrays | tuples))

    def labelled_by(self, adata: ad.AnnData, labels_key: str, unlabeled_category: str) -> "Fields":
        """The same fields with the labels of another column."""
        check_names(adata)
        check_keys(adata, [labels_key])
        classes = find_classes(adata, labels_key, unlabeled_category)
        return replace(
            self, labels_key=labels_key, unlabeled_category=unlabeled_category, classes=classes
        )

    def store(self, adata: ad.AnnData) -> None:
        """Note these fields in ``adata.uns``, after a check that they can read it."""
        self.encode(adata)
        adata.uns[UNS_KEY] = {"setup": self.to_uns()}

    def to_uns(self) -> dict[str, Any]:
        """A plain dict of strings and arrays, which ``write_h5ad`` keeps."""
        stored = asdict(self)
        for key in ("categorical_covariate_keys", "continuous_covariate_keys"):
            stored[key] = np.array(stored[key], dtype=object)
        # By number, not by key: a file takes the slash in a key for a group.
        stored["covariate_categories"] = {
            str(i): values for i, values in enumerate(self.covariate_categories)
        }
        return stored

    def encode(self, adata: ad.AnnData) -> CellData:
        """Arrays of an AnnData with these fields; unseen categories and other genes are errors."""
        check_names(adata)
        self.check_genes(adata)
        counts = counts_of(adata, self.layer)
        check_counts(counts, adata)
        keys = [self.batch_key, self.size_factor_key]
        keys += [*self.categorical_covariate_keys, *self.continuous_covariate_keys]
        check_keys(adata, [k for k in keys if k])
        return CellData(
            counts=counts,
            batch=self._batch_codes(adata),
            label=self._label_codes(adata),
            continuous=self._continuous(adata),
            categorical=self._categorical(adata),
            size_factor=self._size_factor(adata),
        )

    def sizes(self) -> dict[str, Any]:
        """The arguments of the model that genes, columns and categories give."""
        return {
            "n_input": len(self.genes),
            "n_batch": len(self.batches),
            "n_labels": len(self.classes),
            "n_continuous_cov": len(self.continuous_covariate_keys),
            "n_cats_per_cov": [len(c) for c in self.covariate_categories],
            "use_size_factor_key": bool(self.size_factor_key),
        }

    def check_genes(self, adata: ad.AnnData) -> None:
        """Refuse other genes than those of the model, or another order."""
        if adata.n_vars == len(self.genes) and (adata.var_names == self.genes).all():
            return
        missing = pd.Index(self.genes).difference(adata.var_names)
        extra = adata.var_names.difference(pd.Index(self.genes))
        raise InputError(
            f"the genes differ from those that the model was set up with: {len(missing)} of "
            f"{len(self.genes)} are missing{_first(missing)}, {len(extra)} are new{_first(extra)}"
            + ("" if len(missing) or len(extra) else ", the order differs")
            + "; reorder with adata[:, genes], or let SCANVI.prepare_query_anndata(adata, "
            "reference) reorder and fill them"
        )

    def _label_codes(self, adata: ad.AnnData) -> np.ndarray:
        if self.labels_key not in adata.obs:  # new cells may come without labels
            return np.full(adata.n_obs, UNLABELED)
        labels = _column(adata, self.labels_key)
        known = [*self.classes, self.unlabeled_category]
        codes = _codes(labels, known, f"obs[{self.labels_key!r}]", "labels")
        return np.where(codes == len(self.classes), UNLABELED, codes)

    def _batch_codes(self, adata: ad.AnnData) -> np.ndarray:
        if not self.batch_key:
            return np.zeros(adata.n_obs, dtype=np.int64)
        column = _column(adata, self.batch_key)
        return _codes(column, self.batches, f"obs[{self.batch_key!r}]", "batches")

    def _categorical(self, adata: ad.AnnData) -> np.ndarray | None:
        pairs = zip(self.categorical_covariate_keys, self.covariate_categories, strict=True)
        codes = [_codes(_column(adata, k), c, f"obs[{k!r}]", "categories") for k, c in pairs]
        return np.stack(codes, axis=1) if codes else None

    def _continuous(self, adata: ad.AnnData) -> np.ndarray | None:
        columns = [_numbers(adata, key) for key in self.continuous_covariate_keys]
        return np.stack(columns, axis=1) if columns else None

    def _size_factor(self, adata: ad.AnnData) -> np.ndarray | None:
        if not self.size_factor_key:
            return None
        values = _numbers(adata, self.size_factor_key)
        if (values <= 0).any():
            raise InputError(
                f"obs[{self.size_factor_key!r}] holds size factors that are not positive, first "
                f"in cell {adata.obs_names[values <= 0][0]!r}; size factors multiply expression"
            )
        return values[:, None]


def _check_not_ours(labels_key: str) -> None:
    if labels_key in WRITTEN:
        raise InputError(
            f"obs[{labels_key!r}] is where predictions are written, replacing the labels; "
            "copy it to a column of another name"
        )


def check_names(adata: ad.AnnData) -> None:
    """Refuse what is no AnnData, has no cells or genes, or names two of them alike."""
    if not isinstance(adata, ad.AnnData):
        raise InputError(f"got a {type(adata).__name__}, expected an AnnData")
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise InputError(f"the AnnData has {adata.n_obs} cells and {adata.n_vars} genes")
    for names, what, mend in (
        (adata.obs_names, "cells", "adata.obs_names_make_unique()"),
        (adata.var_names, "genes", "adata.var_names_make_unique()"),
    ):
        if not names.is_unique:
            twice = names[names.duplicated()].unique()
            raise InputError(f"{len(twice)} names of {what} occur twice{_first(twice)}; {mend}")


def check_keys(adata: ad.AnnData, keys: Iterable[str]) -> None:
    """Refuse keys that are not columns of obs, naming the nearest one."""
    for key in keys:
        if key in adata.obs:
            continue
        columns = [str(c) for c in adata.obs.columns]
        near = difflib.get_close_matches(str(key), columns, n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(columns) or 'none'}"
        )
        raise InputError(f"obs has no column {key!r}; {hint}")


def counts_of(adata: ad.AnnData, layer: str | None) -> csr_matrix | np.ndarray:
    """The matrix of counts: X or a layer, as CSR or dense."""
    if layer and layer not in adata.layers:
        raise InputError(
            f"there is no layer {layer!r}; there are: {', '.join(adata.layers) or 'none'}"
        )
    matrix = adata.layers[layer] if layer else adata.X
    if matrix is None:
        raise InputError("X is empty; name the layer with the counts (layer=..., --layer)")
    if adata.isbacked:
        raise InputError("the AnnData is backed by its file; load it with adata.to_memory()")
    if not issparse(matrix):
        return np.asarray(matrix)
    try:  # scipy would crash on indices out of range
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise InputError(f"the sparse matrix of the counts is broken: {error}") from None
    return csr_matrix(matrix)


def check_counts(counts: csr_matrix | np.ndarray, adata: ad.AnnData) -> None:
    """Refuse matrices that are not counts, and cells without counts."""
    check_values(counts, adata)
    empty = _is_empty(counts)
    if empty.any():
        names = adata.obs_names[empty]
        raise InputError(
            f"{len(names)} cells have no counts{_first(names)}; drop them with "
            "pyro_scanvi.drop_empty_cells(adata) or --drop-empty-cells"
        )


def check_values(counts: csr_matrix | np.ndarray, adata: ad.AnnData) -> None:
    """Refuse matrices that are not counts, naming the first cell and gene."""
    values = counts.data if issparse(counts) else counts
    if values.dtype.kind not in "iuf":
        raise InputError(f"counts have dtype {values.dtype}, expected real numbers")
    with np.errstate(invalid="ignore"):
        wrong = ~np.isfinite(values) | (values < 0) | (values != np.rint(values))
    if wrong.any():
        _refuse_value(counts, wrong, adata)


def empty_cells(adata: ad.AnnData, layer: str | None = None) -> np.ndarray:
    """Whether each cell has no counts, (N,)."""
    counts = counts_of(adata, layer)
    check_values(counts, adata)
    return _is_empty(counts)


def drop_empty_cells(adata: ad.AnnData, layer: str | None = None) -> ad.AnnData:
    """A copy without the cells that have no counts."""
    return adata[~empty_cells(adata, layer)].copy()


def find_classes(adata: ad.AnnData, labels_key: str, unlabeled_category: str) -> np.ndarray:
    """The labels that occur, in the order of their categories, without the unlabelled one."""
    found = categories(adata, labels_key)
    classes = found[found.astype(str) != str(unlabeled_category)]
    column = f"obs[{labels_key!r}]"
    if len(classes) == 0:
        raise InputError(f"no cell is labelled: {column} is {unlabeled_category!r} everywhere")
    if len(classes) == 1:
        raise InputError(
            f"{column} has a single class, {classes[0]!r}; there is nothing to tell apart"
        )
    if len(classes) == len(found):
        _say(
            f"{unlabeled_category!r} does not occur in {column}: all {adata.n_obs} cells count as "
            f"labelled, as {', '.join(map(str, classes[:NAMES_SHOWN]))}"
            + (", ..." if len(classes) > NAMES_SHOWN else "")
        )
    return classes


def weights_of(adata: ad.AnnData, weights: str | Sequence[float] | None) -> np.ndarray | None:
    """Weight of each cell, a column of obs or numbers, scaled to a mean of 1; (N,)."""
    if weights is None:
        return None
    if isinstance(weights, str):
        check_keys(adata, [weights])
        weights = _numbers(adata, weights)
    values = np.asarray(weights, dtype=np.float32)
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


def storable_names(names: Iterable) -> list[str]:
    """Names of columns as an .h5ad file can hold them: as they are, or numbered where they clash.

    The file takes a name for a path: "/B" would leave the table, "T/NK" cannot stand beside "T".
    """
    names = [str(name) for name in names]
    paths = [tuple(name.split("/")) for name in names]

    def clashes(path: tuple[str, ...]) -> bool:
        parents = {path[:depth] for depth in range(1, len(path))}
        return path[0] == "_index" or bool({"", ".", ".."} & set(path) or parents & set(paths))

    stored = [
        f"{i}: {name.replace('/', '|')}" if clashes(path) else name
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    if stored != names:
        _say(f"a file cannot hold columns of all these names; they are called {', '.join(stored)}")
    return stored


def categories(adata: ad.AnnData, key: str) -> np.ndarray:
    """The values that occur in a column of obs, in the order of its categories."""
    column = _column(adata, key)
    found = np.asarray(column.cat.remove_unused_categories().cat.categories)
    names = pd.Index(found.astype(str))
    if not names.is_unique:
        twice = names[names.duplicated()].unique()
        raise InputError(f"obs[{key!r}] holds different values that read alike{_first(twice)}")
    return found


def _column(adata: ad.AnnData, key: str) -> pd.Series:
    column = adata.obs[key]
    if column.isna().any():
        names = adata.obs_names[column.isna()]
        raise InputError(
            f"obs[{key!r}] has no value in {len(names)} cells{_first(names)}; fill them, labels "
            "with the unlabelled category"
        )
    return column.astype("category")


def _codes(column: pd.Series, known: Iterable, where: str, what: str) -> np.ndarray:
    index = pd.Index([str(k) for k in known])
    codes = index.get_indexer(column.astype(str))
    if (codes < 0).any():
        unseen = column[codes < 0].astype(str).unique()
        raise InputError(
            f"{where} has {len(unseen)} {what} that the model has not seen{_first(unseen)}; it "
            f"knows {', '.join(index[:NAMES_SHOWN])}"
            + (", ..." if len(index) > NAMES_SHOWN else "")
            + f"; {MEND_UNSEEN[what]}"
        )
    return codes.astype(np.int64)


def _numbers(adata: ad.AnnData, key: str) -> np.ndarray:
    try:
        values = adata.obs[key].to_numpy(dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(f"obs[{key!r}] does not hold numbers") from None
    if not np.isfinite(values).all():
        name = adata.obs_names[~np.isfinite(values)][0]
        raise InputError(f"obs[{key!r}] is not finite, first in cell {name!r}")
    return values


def _is_empty(counts: csr_matrix | np.ndarray) -> np.ndarray:
    return np.asarray(counts.sum(axis=1)).ravel() == 0


def _refuse_value(counts, wrong: np.ndarray, adata: ad.AnnData) -> None:
    first = int(np.flatnonzero(wrong)[0]) if issparse(counts) else np.argwhere(wrong)[0]
    if issparse(counts):
        cell = int(np.searchsorted(counts.indptr, first, side="right")) - 1
        gene, value = int(counts.indices[first]), counts.data[first]
    else:
        cell, gene = (int(i) for i in first)
        value = counts[cell, gene]
    kind = "negative" if value < 0 else "fractional" if np.isfinite(value) else "not finite"
    values = counts.data if issparse(counts) else counts
    others = int(wrong.sum()) - 1
    more = f", and {others} more like it" if others else ""
    log_like = kind == "fractional" and values[np.isfinite(values)].max() < 30
    hint = "these look log-normalised; " if log_like else ""
    raise InputError(
        f"the counts hold a value that is {kind}: {value:.6g} in cell {adata.obs_names[cell]!r}, "
        f"gene {adata.var_names[gene]!r}{more}; {hint}expected raw counts, 0, 1, 2, ... (name "
        "their layer with layer=..., --layer)"
    )


def _first(names: Iterable) -> str:
    names = [str(n) for n in names]
    if not names:
        return ""
    return f" ({', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''})"


def _say(message: str) -> None:
    """Tell the user what is allowed but may not be meant."""
    warnings.warn(message, stacklevel=4)
