"""annbatch as the reader of counts on the disk: it fetches the rows, which are chosen here.

Of annbatch this needs its documented contract since 0.3: a ``Loader`` takes a custom sampler, whose
requests are arrays of rows of all its data sets, and gives their matrix and their index.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from anndata.abc import CSRDataset

from pyro_scanvi.data.on_disk import Rows, n_in_page, rows_of
from pyro_scanvi.names import listed
from pyro_scanvi.validation import InputError


def as_anndata(stores: Iterable[zarr.Group], counts: str = "X") -> ad.AnnData:
    """The cells of several stores as one AnnData, whose counts stay there and annbatch reads.

    What is trained on it draws its minibatches as of any counts on the disk: see
    :class:`~pyro_scanvi.data.on_disk.BlockSampler`.

    Parameters
    ----------
    stores
        Groups of zarr, each an AnnData, of the same genes: an ``annbatch.DatasetCollection``, or
        a list of groups.
    counts
        Where in each of them the counts stand, by cell; they are ``X`` of the result.

    Returns
    -------
    Of the stores it has ``obs``, in memory, and the names of the genes.

    Raises
    ------
    InputError
        If annbatch is not installed, there is no store, it lacks what is read or is broken, genes
        differ, or annbatch refuses it.
    """
    groups = list(stores)
    if not groups:
        raise InputError("there is no store: expected groups of zarr, each an AnnData")
    for number, group in enumerate(groups, 1):
        if lacking := [name for name in (counts, "obs", "var") if name not in group]:
            raise InputError(f"store {number} of {len(groups)} has no {listed(lacking)}")
    cells = [_without_counts(group) for group in groups]
    for number, others in enumerate(cells, 1):
        if not others.var_names.equals(cells[0].var_names):
            raise InputError(f"store {number} has other genes than the first, or in another order")
    matrices = [_matrix(group[counts]) for group in groups]
    obs = ad.concat(cells, join="outer").obs  # with the categories of all
    return ad.AnnData(FetchedRows(matrices), obs, pd.DataFrame(index=cells[0].var_names))


class FetchedRows(Rows, CSRDataset):
    """Rows of several matrices, one after the other, as annbatch fetches them.

    AnnData takes it for what it is to its reader: a matrix that stays on the disk.

    Parameters
    ----------
    matrices
        Of the same genes, all sparse by row or all dense, in stores of zarr.
    """

    backend = "zarr"

    def __init__(self, matrices: list[Any]):
        annbatch, base = _import("annbatch"), _import("annbatch.abc").Sampler
        checked = [rows_of(matrix) for matrix in matrices]
        self.shape = sum(rows.shape[0] for rows in checked), checked[0].shape[1]
        self.dtype = np.result_type(*(rows.dtype for rows in checked))
        self.bytes_of_a_cell = max(rows.bytes_of_a_cell for rows in checked)
        self._asked = type("Asked", (Asked, base), {})()
        # On the host: rows are checked and held there, and minibatches made dense.
        given = {"return_index": True, "preload_to_gpu": False}
        loader = annbatch.Loader(batch_sampler=self._asked, **given)
        try:
            self._loader = loader.add_datasets(matrices)
        except (TypeError, ValueError) as error:
            raise InputError(f"annbatch refuses these stores: {error}") from error

    def parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """As many as memory holds easily: annbatch reads all that stand apart side by side."""
        return np.split(rows, range(n_in_page(self), len(rows), n_in_page(self)))

    def at(self, rows: np.ndarray) -> Any:
        """These rows; ValueError if annbatch gives others."""
        self._asked.rows = rows
        batches = list(self._loader)
        found = np.concatenate([batch["index"] for batch in batches])
        if len(batches) != 1 or not np.array_equal(found, rows):
            raise ValueError(
                f"annbatch was asked for {len(rows)} rows, {listed(rows)}, and gave {len(found)} "
                f"in {len(batches)} batches, {listed(found)}; expected is annbatch 0.3 or later"
            )
        return batches[0]["X"]

    def __getitem__(self, index: Any) -> Any:
        """A part in memory, which AnnData asks for; rows and columns are taken by themselves."""
        index = index if isinstance(index, tuple) else (index, slice(None))
        cells, genes = (
            np.arange(n)[chosen].ravel() for n, chosen in zip(self.shape, index, strict=True)
        )
        rows, back = np.unique(cells, return_inverse=True)
        return self.at(rows)[back][:, genes]

    def to_memory(self) -> Any:
        """All of it."""
        return self[:]


class Asked:
    """The sampler of annbatch that requests the rows it is told, as one batch in their order."""

    rows: np.ndarray
    shuffle = False

    @property
    def batch_size(self) -> int:
        """All of them."""
        return len(self.rows)

    def n_batches(self, n_obs: int) -> int:
        """One, of however many cells there are."""
        return 1

    def validate(self, n_obs: int) -> None:
        """Rows are chosen of those that there are."""

    def _sample(self, n_obs: int) -> Iterator[dict[str, Any]]:
        yield {"requests": self.rows, "splits": [np.arange(len(self.rows))]}


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            "annbatch is not installed, or not for this Python: it needs Python 3.12 or later; "
            'pip install "annbatch>=0.3", or leave counts to our own reader (docs/large_data.md)'
        ) from error


def _matrix(stored: zarr.Group | zarr.Array) -> Any:
    if isinstance(stored, zarr.Group):
        return ad.io.sparse_dataset(stored)
    if (stored.shards or stored.chunks)[1] < stored.shape[1]:  # MultiBasicIndexer counts them twice
        raise InputError(
            f"annbatch 0.3.1 misreads dense counts whose chunks, here {stored.chunks}, hold a part "
            "of the genes; write them sparse, or with chunks of all genes"
        )
    return stored


def _without_counts(group: zarr.Group) -> ad.AnnData:
    names = ad.io.read_elem(group["var"]).index
    return ad.AnnData(obs=ad.io.read_elem(group["obs"]), var=pd.DataFrame(index=names))
