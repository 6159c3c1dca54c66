"""Counts that stay on the disk: rows are chosen first and read later, many of them together.

Training reads a window of cells at once and makes its minibatches of them. A window holds blocks
of cells that stand together in the file, drawn at random, and its share of the cells of each label.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import h5py
import numpy as np
import zarr
from anndata.abc import CSCDataset, CSRDataset
from scipy.sparse import csr_matrix, issparse, vstack

from pyro_scanvi.data.minibatches import WHOLE, CellData, Counts, MinibatchSampler, Share
from pyro_scanvi.validation import InputError

WINDOW = 16_384  # cells that are held at once, and that minibatches are mixed from
HELD = 2**28  # bytes that these may take; then they are fewer
PAGES = 8  # a window is read in so many parts or more
BLOCK = 512  # cells of one label that stand together and come in one window
GAP = 32  # rows that are read in vain sooner than that the file is asked twice; a chunk, if more
KINDS = (CSRDataset, CSCDataset, h5py.Dataset, zarr.Array)


def stays_on_disk(matrix: Any) -> bool:
    """Whether it is a matrix of a file, of which anndata has read nothing yet."""
    return isinstance(matrix, KINDS)


class Rows(ABC):
    """Rows of all genes that are read when they are asked for.

    Attributes
    ----------
    shape, dtype
        Numbers of cells and genes, and the type of the counts.
    bytes_of_a_cell
        What one takes in memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    bytes_of_a_cell: int

    @abstractmethod
    def parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows in rising order, cut into those that are read at once."""

    @abstractmethod
    def at(self, rows: np.ndarray) -> Any:
        """One part of them, sparse or dense."""


class FileRows(Rows):
    """Rows of one matrix: ``rows[start:stop]`` reads neighbours.

    Attributes
    ----------
    gap
        So many rows are read in vain sooner than that the file is asked twice.
    """

    gap: int

    @abstractmethod
    def __getitem__(self, part: slice) -> Any: ...

    def parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """Neighbours, and those with small gaps, are read at once."""
        page = rows // n_in_page(self)
        apart = (np.diff(rows) > self.gap) | (np.diff(page) > 0)
        return np.split(rows, np.flatnonzero(apart) + 1)

    def at(self, rows: np.ndarray) -> Any:
        """One part of them, of what stands from the first to the last."""
        start, stop = int(rows[0]), int(rows[-1]) + 1
        found = self[start:stop]
        return found if len(rows) == stop - start else found[rows - start]


class DenseRows(FileRows):
    """Rows of an array.

    Warns
    -----
    UserWarning
        If a store misses a part of it, which then counts as zeros.
    """

    def __init__(self, array: h5py.Dataset | zarr.Array):
        if _lacks_chunks(array):
            warnings.warn(
                f"files of {array.path} of the counts on the disk are missing; they count as "
                "zeros, which is right only if all of them are zero: if the store was copied, "
                "compare it with the original",
                stacklevel=2,
            )
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.bytes_of_a_cell = 4 * array.shape[1]  # in memory
        self.gap = max(GAP, _chunk_of(array))

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.asarray(self.array[part])


class SparseRows(FileRows):
    """Rows of a matrix that is stored by row (CSR): the group with its three arrays.

    Read by themselves: ``sparse_dataset`` makes an empty matrix of all rows whenever it is asked.
    """

    def __init__(self, matrix: CSRDataset):
        self.data, self.indices = matrix.group["data"], matrix.group["indices"]
        self.start = np.asarray(matrix.group["indptr"][:], dtype=np.int64)
        self.shape, self.dtype = matrix.shape, matrix.dtype
        of_a_cell = max(1, self.data.shape[0] // self.shape[0])
        self.bytes_of_a_cell = 8 * of_a_cell
        self.gap = max(GAP, _chunk_of(self.data) // of_a_cell)
        self._check_whole()

    def __getitem__(self, part: slice) -> csr_matrix:
        start = self.start[part.start : part.stop + 1]
        values = slice(int(start[0]), int(start[-1]))
        arrays = self.data[values], self.indices[values], start - start[0]
        return csr_matrix(arrays, shape=(len(start) - 1, self.shape[1]))

    def _check_whole(self) -> None:
        """Refuse arrays that do not fit one another; a chunk that is not there reads as zeros."""
        n_values = self.data.shape[0]
        fits = len(self.start) == self.shape[0] + 1 and self.indices.shape[0] == n_values
        rises = self.start[0] == 0 and self.start[-1] == n_values and (np.diff(self.start) >= 0)
        lacking = [a.path for a in (self.data, self.indices) if _lacks_chunks(a)]
        if lacking or not (fits and np.all(rises)):
            reason = f"a part of {lacking[0]} is missing" if lacking else "its arrays do not fit"
            raise InputError(f"the sparse matrix of the counts on the disk is broken: {reason}")


def _lacks_chunks(array: h5py.Dataset | zarr.Array) -> bool:
    """Whether a chunk has no file: zarr reads zeros then, whether it holds them or is lost."""
    return isinstance(array, zarr.Array) and array.nchunks_initialized < array.nchunks


def _chunk_of(array: h5py.Dataset | zarr.Array) -> int:
    """How much of the first dimension is read and unpacked at once, whatever is asked."""
    return array.chunks[0] if array.chunks else 0


def rows_of(matrix: Any) -> Rows:
    """Rows of a matrix that stays on the disk; InputError if they cannot be read by row."""
    if isinstance(matrix, Rows):
        return matrix
    if isinstance(matrix, CSCDataset):
        raise InputError(
            "the counts on the disk are sparse by gene (CSC), and minibatches are read by cell; "
            "write them by cell: adata = adata.to_memory(); adata.X = adata.X.tocsr(), or load "
            "the AnnData with adata.to_memory()"
        )
    return SparseRows(matrix) if isinstance(matrix, CSRDataset) else DenseRows(matrix)


def head(matrix: Any, n_cells: int) -> Any:
    """The first rows of a matrix that stays on the disk; none where all would be read for them."""
    return np.empty((0, 0)) if isinstance(matrix, CSCDataset) else matrix[:n_cells]


def n_in_window(rows: Rows) -> int:
    """Number of cells that are held at once."""
    return max(PAGES, min(WINDOW, HELD // rows.bytes_of_a_cell))


def n_in_page(rows: Rows) -> int:
    """Number of cells that are read at once at most."""
    return n_in_window(rows) // PAGES


def read(source: Rows, rows: np.ndarray) -> Any:
    """Rows as they are stored; InputError if they cannot be read."""
    try:
        found = source.at(rows)
        if issparse(found):
            found.check_format(full_check=True)  # scipy would crash on indices out of range
    except Exception as error:  # h5py and zarr raise what the bytes and codecs lead them to
        raise InputError(
            f"the counts cannot be read from the disk: {error}; if their file was closed or "
            "changed, open it again and make the model anew"
        ) from error
    return found


def pages(rows: Rows) -> Iterator[np.ndarray]:
    """All rows, in parts of a size that memory holds easily."""
    n_cells, size = rows.shape[0], n_in_page(rows)
    return (np.arange(start, min(start + size, n_cells)) for start in range(0, n_cells, size))


@dataclass
class Held:
    """Rows that were read last, in rising order."""

    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    counts: Counts | None = None


@dataclass(frozen=True, eq=False)
class OnDisk:
    """Counts on the disk, which have been checked. ``counts[positions]`` reads nothing yet.

    ``toarray`` and ``astype`` read, as if this were a sparse matrix.

    Attributes
    ----------
    source
        All rows of the file.
    convert
        Makes counts of rows as they are stored: float32, whole, with the genes that are read.
    n_genes
        Their number.
    totals
        Total count of each row of the file, (N,), as it was when it was checked.
    rows
        Those of these cells.
    held
        Those that are in memory, whoever reads them.
    """

    source: Rows
    convert: Callable[[Any], Counts]
    n_genes: int
    totals: np.ndarray
    rows: np.ndarray
    held: Held = field(default_factory=Held)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of cells and genes."""
        return len(self.rows), self.n_genes

    def __getitem__(self, positions: np.ndarray | slice) -> "OnDisk":
        return replace(self, rows=self.rows[positions])

    def toarray(self) -> np.ndarray:
        """The counts, (N, G)."""
        counts = self._in_memory()
        return counts if isinstance(counts, np.ndarray) else counts.toarray()

    def astype(self, dtype: Any) -> Counts:
        """The counts, CSR or dense, as numbers of another type."""
        return self._in_memory().astype(dtype)

    def hold(self) -> None:
        """Read these rows, and hold them instead of those that are held."""
        self.held.rows, self.held.counts = np.empty(0, dtype=np.int64), None  # never both
        rows = np.unique(self.rows)
        self.held.counts, self.held.rows = self._read(rows), rows

    def ahead(self, minibatches: list[np.ndarray], n_together: int) -> Iterator[np.ndarray]:
        """The minibatches; the rows of so many of them are read together before the first."""
        for start in range(0, len(minibatches), n_together):
            together = minibatches[start : start + n_together]
            self[np.concatenate(together)].hold()
            yield from together

    def n_together(self, batch_size: int) -> int:
        """Number of minibatches in a window."""
        return max(1, n_in_window(self.source) // batch_size)

    def _in_memory(self) -> Counts:
        held, place = self.held, np.searchsorted(self.held.rows, self.rows)
        if held.counts is not None and np.array_equal(
            held.rows.take(place, mode="clip"), self.rows
        ):
            return held.counts[place]
        rows, back = np.unique(self.rows, return_inverse=True)
        return self._read(rows)[back]

    def _read(self, rows: np.ndarray) -> Counts:
        """Rows in rising order."""
        found = [self._part(part) for part in self.source.parts(rows)]
        return vstack(found, format="csr") if issparse(found[0]) else np.concatenate(found)

    def _part(self, rows: np.ndarray) -> Counts:
        counts = self.convert(read(self.source, rows))
        changed = totals_of(counts) != self.totals[rows]
        if changed.any():
            raise InputError(
                f"the counts on the disk have changed since the model was made, first in the cell "
                f"at position {rows[changed][0]}; make a new model with SCANVI(adata)"
            )
        return counts


def totals_of(counts: Counts) -> np.ndarray:
    """Total count of each cell, (N,), summed in float64."""
    return np.asarray(counts.astype(np.float64).sum(1)).ravel()


@dataclass(frozen=True)
class CellsOnDisk(CellData):
    """Cells whose counts stay on the disk; all else of them is in memory."""

    counts: OnDisk

    def shuffled(
        self,
        batch_size: int,
        seed: int,
        first_epoch: int = 0,
        balanced: bool = False,
        share: Share = WHOLE,
    ) -> "BlockSampler":
        """Minibatches of windows; see :class:`BlockSampler`."""
        settings = batch_size, seed, first_epoch, balanced, share
        return BlockSampler(self.counts, self.label, *settings)

    def in_order(self, batch_size: int, share: Share = WHOLE) -> "InOrder":
        """Minibatches in the order of the data, read ahead; of each the part of one process."""
        minibatches = list(super().in_order(batch_size, share))
        return InOrder(minibatches, self.counts, self.counts.n_together(batch_size))

    def check_in_memory(self, what: str, instead: str) -> None:
        """Refuse what would read all counts at once."""
        raise InputError(f"{what} reads all counts at once, and they stay on the disk; {instead}")


@dataclass(frozen=True)
class InOrder:
    """Minibatches of counts on the disk, which are read ahead."""

    minibatches: list[np.ndarray]
    counts: OnDisk
    n_together: int

    def __len__(self) -> int:
        return len(self.minibatches)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.counts.ahead(self.minibatches, self.n_together)


class BlockSampler(MinibatchSampler):
    """As :class:`MinibatchSampler`, in an order by which a file can be read.

    Each cell comes once an epoch, or as often as class balance asks. Labelled cells are cut by
    label into blocks of cells that stand together in the file, the unlabelled ones too. Blocks
    come in random order, those of all labels side by side, so that each window has its share of
    every label; within a window all is shuffled as in memory. In a single window the order is as
    random as that in memory.

    Parameters
    ----------
    counts
        Of the cells.
    label, batch_size, seed, first_epoch, balanced, share
        As of :class:`MinibatchSampler`; a window is that of all processes, each of which reads its
        own cells of it.
    """

    def __init__(
        self,
        counts: OnDisk,
        label: np.ndarray,
        batch_size: int,
        seed: int,
        first_epoch: int = 0,
        balanced: bool = False,
        share: Share = WHOLE,
    ):
        super().__init__(label, batch_size, seed, first_epoch, balanced, share)
        self.counts = counts
        self.n_together = counts.n_together(batch_size * share.n)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.counts.ahead(list(super().__iter__()), self.n_together)

    def ranks(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Place of each cell among those of its kind, (n,): windows of blocks, each shuffled."""
        n_cells = len(cells)
        size, larger = divmod(len(self.label), self.n_minibatches)
        starts = np.arange(0, self.n_minibatches, self.n_together)  # first minibatch of a window
        shares = (starts * size + np.minimum(starts, larger)) / len(self.label)
        window = np.searchsorted(shares, (np.arange(n_cells) + 0.5) / n_cells)
        shuffled = np.lexsort((rng.random(n_cells), window))
        ranks = np.empty(n_cells, dtype=np.int64)
        ranks[block_order(cells, self.label[cells], rng)[shuffled]] = np.arange(n_cells)
        return ranks


def block_order(cells: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where in `cells` the first, the second ... of an order by blocks stands, (n,).

    The cells of each label are spread evenly over it, by blocks that stand together. A cell that
    comes several times does so at several places.
    """
    by_cell = np.argsort(cells, kind="stable")
    same = np.searchsorted(cells[by_cell], cells[by_cell])
    repeat = np.empty(len(cells), dtype=np.int64)
    repeat[by_cell] = np.arange(len(cells)) - same
    order = np.lexsort((cells, repeat, label))
    codes, starts = np.unique(label[order], return_index=True)
    found, place = [np.empty(0, dtype=np.int64)], [np.empty(0)]
    for members in np.split(order, starts[1:]) if len(codes) else []:
        blocks = np.split(members, np.arange(BLOCK, len(members), BLOCK))
        found += [blocks[i] for i in rng.permutation(len(blocks))]
        place.append((np.arange(len(members)) + rng.random()) / len(members))
    return np.concatenate(found)[np.argsort(np.concatenate(place), kind="stable")]
