"""Counts that annbatch fetches: rows, order and requests, of a stand-in with its contract.

annbatch needs Python 3.12. Where it is installed, the same is asked of annbatch itself.
"""

import sys
from abc import ABC, abstractmethod
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.abc import CSRDataset
from scipy.sparse import csc_matrix, csr_matrix, vstack

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.data import on_disk
from pyro_scanvi.data.annbatch import as_anndata
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.minibatches import ordered_loader, total_counts, training_loader
from pyro_scanvi.data.on_disk import BlockSampler
from pyro_scanvi.storage.stores import write_anndata
from tests.data.test_data import assert_equal_cells
from tests.examples import mostly_slow, simulated, small_model

# ---- the stand-in: annbatch 0.3.1, what of it the adapter needs ----------------------------------


class Sampler(ABC):
    """As annbatch.abc.Sampler, where requests come with their splits."""

    @property
    @abstractmethod
    def batch_size(self): ...

    @property
    @abstractmethod
    def shuffle(self): ...

    @abstractmethod
    def n_batches(self, n_obs): ...

    @abstractmethod
    def validate(self, n_obs): ...

    @abstractmethod
    def _sample(self, n_obs): ...

    def sample(self, n_obs):
        self.validate(n_obs)
        yield from self._sample(n_obs)


class Loader:
    """As annbatch.Loader with a custom sampler: data sets are read in turn, splits count requests.

    Attributes
    ----------
    asked
        The requests of all loaders.
    """

    asked: list[np.ndarray]

    def __init__(self, *, batch_sampler, return_index=False, preload_to_gpu=True, to=None):
        assert isinstance(batch_sampler, Sampler) and to is None
        assert not preload_to_gpu, "it needs cupy"
        self.sampler, self.return_index, self.datasets = batch_sampler, return_index, []

    def add_datasets(self, datasets):
        for dataset in datasets:
            sparse = isinstance(dataset, CSRDataset)
            if not sparse and not isinstance(dataset, zarr.Array):
                raise TypeError(f"Cannot add dataset of type {type(dataset)}")
            if sparse is not isinstance(datasets[0], CSRDataset):
                raise ValueError("All datasets on a given loader must be of the same type")
        self.datasets += [dataset[:] for dataset in datasets]
        return self

    def __iter__(self):
        starts = np.cumsum([0, *(dataset.shape[0] for dataset in self.datasets)])
        for request in self.sampler.sample(starts[-1]):
            rows = request["requests"]
            self.asked.append(rows)
            of = np.searchsorted(starts, rows, side="right") - 1
            order = np.argsort(of, kind="stable")
            x = [d[rows[of == i] - starts[i]] for i, d in enumerate(self.datasets) if i in of]
            x = np.concatenate(x) if isinstance(x[0], np.ndarray) else vstack(x, format="csr")
            for split in request["splits"]:
                place = np.argsort(order)[split]
                index = rows[order][place] if self.return_index else None
                yield {"X": x[place], "obs": None, "var": None, "index": index}


@pytest.fixture
def stand_in(monkeypatch):
    """annbatch is the stand-in; what it was asked."""
    monkeypatch.setattr(Loader, "asked", [], raising=False)
    for name, member in {"annbatch": Loader, "annbatch.abc": Sampler}.items():
        module = ModuleType(name)
        setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
    return Loader.asked


ITSELF = pytest.mark.skipif(find_spec("annbatch") is None, reason="annbatch is not installed")


@pytest.fixture(params=["stand_in", pytest.param("annbatch", marks=ITSELF)])
def loader(request):
    """The stand-in, and annbatch where it is."""
    if request.param == "stand_in":
        request.getfixturevalue("stand_in")


# ---- the stores ---------------------------------------------------------------------------------

PARTS = np.split(np.arange(120), [50, 57])  # as they lie in the stores


def store(path, adata, kind=csr_matrix) -> zarr.Group:
    """An AnnData in a store of zarr, its counts as that kind of matrix."""
    adata = adata.copy()
    adata.X = kind(adata.X)
    write_anndata(adata, path, {"zarr_write_format": 3})
    return zarr.open_group(path, mode="r")


def collection(folder, adata, kind=csr_matrix) -> list[zarr.Group]:
    """Its cells in three stores, as annbatch's collection gives them."""
    return [store(folder / f"dataset_{i}.zarr", adata[rows], kind) for i, rows in enumerate(PARTS)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The simulated cells, sparse."""
    return collection(tmp_path_factory.mktemp("collection"), simulated())


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 16 cells, read two by two."""
    monkeypatch.setattr(on_disk, "WINDOW", 16)
    monkeypatch.setattr(on_disk, "BLOCK", 4)


def encoded(adata):
    return Fields.from_anndata(adata, "cell_type", "Unknown").encode(adata)


@pytest.mark.usefixtures("loader", "small_windows")
@pytest.mark.parametrize("kind", mostly_slow([csr_matrix, np.asarray]))
def test_minibatches_are_those_in_memory(tmp_path, kind):
    """Of cells of several stores, in any order, twice too; ours is the sampler."""
    adata = simulated()
    found = encoded(as_anndata(collection(tmp_path, adata, kind)))
    expected = encoded(adata)
    for positions in ([4], [119, 2, 55, 50], [3, 60, 3], range(120)):
        assert_equal_cells(found[np.array(positions)], expected[np.array(positions)])
    for ours, theirs in zip(*(total_counts(d.counts) for d in (found, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    loaders = [training_loader(found, 7, seed=1, balanced=b) for b in (False, True)]
    assert all(isinstance(loader.sampler, BlockSampler) for loader in loaders)
    for minibatches in (*loaders, ordered_loader(found, 7)):
        for cells in minibatches:
            assert_equal_cells(cells, expected[cells.index.numpy()])


@pytest.mark.usefixtures("small_windows")
def test_it_is_asked_for_the_rows_of_a_window_and_no_others(stores, stand_in):
    """In parts that memory holds, however far cells stand apart."""
    data = encoded(as_anndata(stores))
    stand_in.clear()
    window = np.array([100, 3, 51, 3, 7, 119])
    data.counts[window].hold()
    assert [rows.tolist() for rows in stand_in] == [[3, 7], [51, 100], [119]]
    data[window]
    assert len(stand_in) == 3  # they are held


@pytest.mark.usefixtures("loader")
def test_the_anndata_is_that_of_all_stores(tmp_path):
    """Columns with the categories of all; slices are read, as of other counts on the disk."""
    adata = simulated()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")
    adata.layers["counts"], expected = csr_matrix(adata.X), adata.X.copy()
    adata.X = np.log1p(adata.X)
    adata = as_anndata(collection(tmp_path, adata), counts="layers/counts")
    pd.testing.assert_series_equal(
        adata.obs["cell_type"], simulated().obs["cell_type"].astype("category")
    )
    assert adata.var_names.equals(simulated().var_names)
    rows, genes = [118, 3, 52], ["gene7", "gene2"]
    np.testing.assert_array_equal(adata[rows, genes].X.toarray(), expected[rows][:, [7, 2]])
    np.testing.assert_array_equal(adata.X.to_memory().toarray(), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("loader")
def test_a_model_answers_as_in_memory(tmp_path, stores):
    """To the bit; and it trains."""
    model = small_model(simulated()).train(1, progress_bar=False)
    model.save(tmp_path / "model")
    adata = as_anndata(stores)
    opened = SCANVI.load(tmp_path / "model", adata)
    pd.testing.assert_frame_equal(opened.predict(soft=True), model.predict(soft=True))
    trained = small_model(adata).train(1, class_balanced=True, progress_bar=False)
    assert trained.is_trained and len(trained.predict()) == 120


# ---- at the door --------------------------------------------------------------------------------


def test_it_says_what_to_install(stores, monkeypatch):
    monkeypatch.setitem(sys.modules, "annbatch", None)
    with pytest.raises(InputError, match=r"Python 3\.12 or later; pip install .annbatch"):
        as_anndata(stores)


@pytest.mark.usefixtures("loader")
def test_stores_that_do_not_fit_are_refused(tmp_path, stores):
    adata = simulated(9)
    adata.obs_names = [f"other{i}" for i in range(9)]
    with pytest.raises(InputError, match="there is no store: expected groups of zarr"):
        as_anndata([])
    with pytest.raises(InputError, match="store 1 of 3 has no layers/counts"):
        as_anndata(stores, counts="layers/counts")
    other = store(tmp_path / "genes.zarr", adata[:, ::-1])
    with pytest.raises(InputError, match="store 4 has other genes than the first, or in another"):
        as_anndata([*stores, other])
    dense = store(tmp_path / "dense.zarr", adata, np.asarray)
    with pytest.raises(InputError, match="annbatch refuses these stores: .* of the same type"):
        as_anndata([dense, *stores])
    cut = zarr.open_group(tmp_path / "dense.zarr", mode="r+", use_consolidated=False)
    cut.create_array("cut", data=adata.X, chunks=(9, 5))
    with pytest.raises(InputError, match=r"dense counts whose chunks, here \(9, 5\), hold a part"):
        as_anndata([cut], counts="cut")
    by_gene = store(tmp_path / "by_gene.zarr", adata, csc_matrix)
    with pytest.raises(InputError, match="sparse by gene"):
        as_anndata([by_gene])


class OfBefore(Loader):
    """As annbatch before 0.2, whose splits counted rows as they were read."""

    def __iter__(self):
        for batch in super().__iter__():
            yield {**batch, "X": batch["X"][::-1], "index": batch["index"][::-1]}


@pytest.mark.usefixtures("stand_in")
def test_other_rows_than_were_asked_are_refused(stores, monkeypatch):
    monkeypatch.setattr(sys.modules["annbatch"], "Loader", OfBefore)
    with pytest.raises(InputError, match="asked for 120 rows, 0, 1, .* and gave 120 in 1 batches"):
        SCANVI.setup_anndata(as_anndata(stores), "cell_type", "Unknown")
