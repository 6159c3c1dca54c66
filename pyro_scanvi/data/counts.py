"""The counts of an AnnData: where they stand, whether they are counts, a copy to keep."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from anndata.compat import DaskArray
from scipy.sparse import csr_matrix, issparse

from pyro_scanvi.data.minibatches import Counts
from pyro_scanvi.data.on_disk import OnDisk, head, pages, read, rows_of, stays_on_disk, totals_of
from pyro_scanvi.names import first
from pyro_scanvi.threads import as_told
from pyro_scanvi.validation import InputError, check_at_least

DROP_EMPTY = "; drop them with pyro_scanvi.drop_empty_cells(adata)"
WRITE_WITHOUT = (
    "; write a file without them, or load this one: pyro_scanvi.drop_empty_cells(adata.to_memory())"
)
OPEN = (
    "leave it on the disk by ad.read_h5ad(path, backed='r') or ad.io.sparse_dataset(group['X']), "
    "or load the AnnData with adata.to_memory()"
)
LOAD = (
    "; load the AnnData with adata.to_memory(), or counts that annbatch reads with "
    "adata.X = adata.X.to_memory()"
)
LARGEST_LOGARITHM = 30  # no log(1 + count) is larger
ROUNDING_ERROR = 1e-3, 1e-5  # absolute and relative, of counts that went through a logarithm
CELLS_LOOKED_AT = 100
VALUES_THAT_TELL = 3  # different ones in a cell; fewer are multiples by chance
SHARE_OF_NORMALISED = 0.5
# Undo what may have been done to counts, up to a factor for each cell.
UNDO = (lambda x: x, np.expm1, lambda x: np.exp2(x) - 1, lambda x: np.power(10.0, x) - 1)


@dataclass(frozen=True)
class CountsPlace:
    """Where the counts of an AnnData stand: ``raw``, a layer, or (empty) ``X``."""

    layer: str = ""
    use_raw: bool = False

    @classmethod
    def find(cls, adata: ad.AnnData, layer: str | None, use_raw: bool = False) -> "CountsPlace":
        """The place that is meant; layer="raw" is ``raw`` where no layer has that name.

        Raises
        ------
        InputError
            If it is not there, or two places are named.
        """
        if use_raw and layer:
            raise InputError(f"use_raw=True and layer={layer!r} name two places; give one")
        if layer is not None and not isinstance(layer, str):
            raise InputError(f"layer={layer!r}, expected the name of a layer")
        if layer == "raw" and layer not in adata.layers and adata.raw is not None:
            return cls(use_raw=True)
        place = cls(layer or "", bool(use_raw))
        place.check(adata)
        return place

    def __str__(self) -> str:
        return "raw.X" if self.use_raw else f"layer {self.layer!r}" if self.layer else "X"

    def check(self, adata: ad.AnnData) -> None:
        """Refuse an AnnData that lacks the place."""
        if self.use_raw and adata.raw is None:
            raise InputError("there is no raw in the AnnData; leave use_raw out, or name a layer")
        if self.layer and self.layer not in adata.layers:
            raise InputError(
                f"there is no layer {self.layer!r}; there are: {', '.join(adata.layers) or 'none'}"
            )

    def genes(self, adata: ad.AnnData) -> pd.Index:
        """Names of the genes that stand there; ``raw`` may have more than ``X``."""
        self.check(adata)
        return adata.raw.var_names if self.use_raw else adata.var_names

    def matrix(self, adata: ad.AnnData) -> Any:
        """The matrix itself, sparse or dense, shared with the AnnData; InputError if unusable."""
        self.check(adata)
        matrix = self._held(adata)
        if stays_on_disk(matrix):
            raise InputError(f"this reads all counts at once, and {self} stays on the disk{LOAD}")
        if matrix is None:
            hint, mend = _other_place(adata, self)
            message = f"{self} is empty; name the layer with the counts (layer=...){hint}"
            raise InputError(message, mend)
        if isinstance(matrix, DaskArray):  # NumPy would compute it whole
            raise InputError(f"{self} is a dask array; {OPEN}")
        if not issparse(matrix):
            return np.asarray(matrix)
        check_format(matrix, "the counts")
        return matrix

    def own_counts(self, adata: ad.AnnData, columns: np.ndarray | None = None) -> Counts:
        """A float32 copy of the checked counts, CSR or dense, that shares no memory.

        Parameters
        ----------
        adata
            Cells by genes.
        columns
            Positions of the genes to take; None is all.

        Raises
        ------
        InputError
            For what is not counts, naming the first cell and gene, and cells without counts.

        Warns
        -----
        UserWarning
            If fractions, as ambient-corrected counts have, were rounded.
        """
        counts = self.values(adata, columns)
        check_not_empty(counts, adata.obs_names)
        return counts

    def values(self, adata: ad.AnnData, columns: np.ndarray | None = None) -> Counts:
        """As :meth:`own_counts`, but cells may be empty."""
        matrix = self.matrix(adata)
        survey = Survey(self, adata, columns, _check_numbers(matrix))
        counts = survey.seen(matrix)
        survey.judge()
        return counts

    def counts(self, adata: ad.AnnData, columns: np.ndarray | None = None) -> Counts | OnDisk:
        """As :meth:`own_counts`; those that stay on the disk are checked page by page, and left."""
        self.check(adata)
        matrix = self._held(adata)
        if not stays_on_disk(matrix):
            return self.own_counts(adata, columns)
        rows = rows_of(matrix)
        survey = Survey(self, adata, columns, _check_numbers(rows))
        seen = (survey.seen(read(rows, page)) for page in pages(rows))
        totals = np.concatenate([totals_of(counts) for counts in seen])
        survey.judge()
        _check_none_empty(totals == 0, adata.obs_names, WRITE_WITHOUT)
        genes = len(self.genes(adata)) if columns is None else len(columns)
        whole = partial(whole_counts, columns=columns)
        return OnDisk(rows, whole, genes, totals, np.arange(adata.n_obs))

    def _held(self, adata: ad.AnnData) -> Any:
        if self.use_raw:
            return adata.raw.X
        return adata.layers[self.layer] if self.layer else adata.X


def empty_cells(adata: ad.AnnData, layer: str | None = None, use_raw: bool = False) -> np.ndarray:
    """Whether each cell has no counts, (N,)."""
    return is_empty(CountsPlace.find(adata, layer, use_raw).values(adata))


def drop_empty_cells(
    adata: ad.AnnData, layer: str | None = None, use_raw: bool = False
) -> ad.AnnData:
    """A copy without the cells that have no counts."""
    return adata[~empty_cells(adata, layer, use_raw)].copy()


def is_empty(counts: Counts) -> np.ndarray:
    """Whether each row has no counts, (N,)."""
    return np.asarray(counts.sum(axis=1)).ravel() == 0


def check_not_empty(counts: Counts, names: pd.Index, advice: str = DROP_EMPTY) -> None:
    """Refuse cells without counts, by name."""
    _check_none_empty(is_empty(counts), names, advice)


def _check_none_empty(empty: np.ndarray, names: pd.Index, advice: str) -> None:
    if empty.any():
        message = f"cells without counts: {empty.sum()}{first(names[empty])}{advice}"
        raise InputError(message, {"drop_empty_cells": True})


def variable_genes(counts: Counts, batch: np.ndarray, n_top_genes: int) -> np.ndarray:
    """Positions of the most variable genes in order, chosen by scanpy; all if there are no more.

    By the variance of their Pearson residuals (Lause et al. 2021, Genome Biol 22:258), within each
    batch, and by the number of batches in which a gene is among the first. It reads counts, and
    labels were told better from its genes than from those of flavor "seurat".

    Parameters
    ----------
    counts
        Of all genes, (N, G).
    batch
        Code of the batch of each cell, (N,).
    n_top_genes
        How many.
    """
    check_at_least(1, n_top_genes=n_top_genes)
    if n_top_genes >= counts.shape[1]:
        return np.arange(counts.shape[1])
    obs = pd.DataFrame({"batch": pd.Categorical(batch)}, index=np.arange(len(batch)).astype(str))
    cells = ad.AnnData(counts.copy(), obs=obs)
    several = "batch" if len(np.unique(batch)) > 1 else None
    with as_told():  # numba's threads are not left to the user
        sc.experimental.pp.highly_variable_genes(
            cells, n_top_genes=n_top_genes, batch_key=several, flavor="pearson_residuals"
        )
    return np.flatnonzero(cells.var["highly_variable"])


def check_format(matrix: Any, what: str) -> None:
    """Refuse a sparse matrix that is broken; scipy would crash on indices out of range."""
    try:
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise InputError(f"the sparse matrix of {what} is broken: {error}") from None


def copied(matrix: Any, columns: np.ndarray | None) -> Counts:
    """A float32 copy of its columns at those positions, CSR or dense; None is all of them."""
    chosen = matrix if columns is None else matrix[:, columns]
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
        if not issparse(chosen):
            return np.array(chosen, dtype=np.float32, order="C")
        shares = columns is None and chosen.format == "csr"
        own = csr_matrix(chosen, dtype=np.float32, copy=shares)
    own.sum_duplicates()
    return own


def values_of(counts: Counts) -> np.ndarray:
    """The entries of a matrix, those that are stored of a sparse one."""
    return counts if isinstance(counts, np.ndarray) else counts.data


def whole_counts(matrix: Any, columns: np.ndarray | None) -> Counts:
    """A float32 copy of columns, rounded."""
    counts = copied(matrix, columns)
    np.rint(values_of(counts), out=values_of(counts))
    return counts


@dataclass
class Found:
    """Values of one kind: how many, and cell, gene and value of the first."""

    n: int = 0
    first: tuple[int, int, float] = (0, 0, 0.0)

    def add(self, counts: Counts, wrong: np.ndarray, n_before: int) -> None:
        """Those of cells before which there are so many."""
        n_here = int(np.count_nonzero(wrong))
        if n_here and not self.n:
            cell, gene = position_of(counts, wrong)
            self.first = n_before + cell, gene, float(values_of(counts)[wrong][0])
        self.n += n_here


@dataclass
class Survey:
    """What is no count among the counts of an AnnData, which are seen all at once or in parts.

    Attributes
    ----------
    place, adata, columns
        Where they stand, and the positions of the genes that are read.
    of_fractions
        Whether their type can hold them.
    """

    place: CountsPlace
    adata: ad.AnnData
    columns: np.ndarray | None
    of_fractions: bool
    impossible: Found = field(default_factory=Found)
    fractional: Found = field(default_factory=Found)
    n_cells: int = 0
    n_values: int = 0
    largest: float = 0.0
    head: Counts | None = None  # the first cells, as they are

    def seen(self, matrix: Any) -> Counts:
        """A float32 copy of the next cells, in which fractions are rounded."""
        counts = copied(matrix, self.columns)
        values = values_of(counts)
        if self.of_fractions:
            self._add_fractions(counts, values)
            np.rint(values, out=values)
        else:
            self.impossible.add(counts, values < 0, self.n_cells)
        self.n_cells += counts.shape[0]
        return counts

    def judge(self) -> None:
        """Refuse what is not counts, or warn of fractions."""
        if self.impossible.n:
            self._refuse(self.impossible)
        if not self.fractional.n:
            return
        self._refuse_normalised()
        warnings.warn(
            f"the counts hold {self.fractional.n} fractions of {self.n_values} values, "
            f"up to {self.largest:.6g}, as corrected counts do: the model reads them rounded to "
            "whole numbers; the AnnData stays as it is",
            stacklevel=4,
        )

    def _add_fractions(self, counts: Counts, values: np.ndarray) -> None:
        impossible = ~np.isfinite(values) | (values < 0)
        self.impossible.add(counts, impossible, self.n_cells)
        with np.errstate(invalid="ignore"):  # infinity is told of already
            off = np.abs(values - np.rint(values))
            fractional = off > ROUNDING_ERROR[0] + ROUNDING_ERROR[1] * values
        self.fractional.add(counts, fractional, self.n_cells)
        self.n_values += int(np.count_nonzero(values))
        self.largest = max(self.largest, float(values.max(initial=0)))
        if self.head is None:
            self.head = counts[:CELLS_LOOKED_AT].copy()

    def _refuse_normalised(self) -> None:
        surely = self.head is not None and _are_normalised(self.head)
        if not surely and self.largest >= LARGEST_LOGARITHM:
            return
        kind = "log-normalised" if self.largest < LARGEST_LOGARITHM else "normalised"
        doubt = "if they are corrected counts, round them: adata.X = adata.X.round(); "
        self._refuse(self.fractional, f"these look {kind}; {'' if surely else doubt}")

    def _refuse(self, found: Found, advice: str = "") -> None:
        """InputError that names the first of them."""
        cell, gene, value = found.first
        genes = self.place.genes(self.adata)
        gene_name = genes[gene if self.columns is None else self.columns[gene]]
        kind = "negative" if value < 0 else "fractional" if np.isfinite(value) else "not finite"
        more = f", and {found.n - 1} more like it" if found.n > 1 else ""
        elsewhere, mend = _other_place(self.adata, self.place)
        raise InputError(
            f"the counts hold a value that is {kind}: {value:.6g} in cell "
            f"{self.adata.obs_names[cell]!r}, gene {gene_name!r}{more}; {advice}expected raw "
            f"counts, 0, 1, 2, ... (name their layer with layer=...){elsewhere}",
            mend,
        )


def _are_normalised(counts: Counts) -> bool:
    """Whether cells hold whole numbers times a factor, or a logarithm of that, or one total."""
    rows = counts[:CELLS_LOOKED_AT]
    dense = np.asarray(rows if isinstance(rows, np.ndarray) else rows.toarray(), dtype=float)
    totals = dense.sum(1)
    if len(totals) > 1 and np.ptp(totals) <= 1e-3 * totals.mean():
        return True
    told = [row[row > 0] for row in dense if len(np.unique(row[row > 0])) >= VALUES_THAT_TELL]
    with np.errstate(over="ignore"):  # what is no logarithm may be beyond any power
        scaled = [any(_is_multiple(undo(row)) for undo in UNDO) for row in told]
    return bool(scaled) and bool(np.mean(scaled) >= SHARE_OF_NORMALISED)


def _is_multiple(values: np.ndarray) -> bool:
    """Whether all values are whole multiples of the smallest."""
    if not np.isfinite(values).all():
        return False
    multiples = values / values.min()
    off = np.abs(multiples - np.rint(multiples))
    return bool((off <= 10 * ROUNDING_ERROR[0] + ROUNDING_ERROR[1] * multiples).all())


def position_of(counts: Counts, wrong: np.ndarray) -> tuple[int, int]:
    """Row and column of the first entry that is wrong."""
    if isinstance(counts, np.ndarray):
        cell, gene = np.argwhere(wrong)[0]
        return int(cell), int(gene)
    at = int(np.flatnonzero(wrong)[0])
    return int(np.searchsorted(counts.indptr, at, side="right")) - 1, int(counts.indices[at])


def _other_place(adata: ad.AnnData, place: CountsPlace) -> tuple[str, dict[str, Any]]:
    """Where else in the AnnData whole numbers stand, as advice and as the argument to give."""
    if not place.use_raw and adata.raw is not None and _holds_counts(adata.raw.X):
        return "; raw holds whole numbers: use_raw=True", {"use_raw": True}
    for name, matrix in adata.layers.items():
        if name != place.layer and _holds_counts(matrix):
            return f"; layer {name!r} holds whole numbers: layer={name!r}", {"layer": name}
    return "", {"layer": None}


def _holds_counts(matrix: Any) -> bool:
    """Whether it does; of what stays on the disk the first cells are looked at."""
    if stays_on_disk(matrix):
        matrix = head(matrix, CELLS_LOOKED_AT)
    values = matrix.data if issparse(matrix) else np.asarray(matrix)
    if values.dtype.kind not in "iuf" or not values.size:
        return False
    return bool((values >= 0).all() and (values == np.rint(values)).all() and values.any())


def _check_numbers(matrix: Any) -> bool:
    """Refuse what is no matrix of real numbers; whether it may hold fractions."""
    if matrix.dtype.kind not in "iuf":
        raise InputError(f"counts have dtype {matrix.dtype}, expected real numbers")
    return bool(matrix.dtype.kind == "f")
