"""Counts that stay on the disk: read as those in memory, in an order that a file can be read by."""

import warnings
from functools import partial
from uuid import uuid4

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
import zarr
from scipy.sparse import csc_matrix, csr_matrix

from pyro_scanvi import SCANVI, InputError, drop_empty_cells
from pyro_scanvi.data import counts as counts_of_anndata
from pyro_scanvi.data import on_disk
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.minibatches import (
    UNLABELED,
    CellData,
    MinibatchSampler,
    Share,
    ordered_loader,
    total_counts,
    training_loader,
)
from pyro_scanvi.data.on_disk import BlockSampler, CellsOnDisk
from pyro_scanvi.storage.stores import write_anndata
from tests.data.test_counts import corrected, in_raw
from tests.data.test_data import assert_equal_cells
from tests.examples import mostly_slow, simulated


def backed(adata: ad.AnnData, folder, mode: str = "r") -> ad.AnnData:
    """The same AnnData, X in an .h5ad file."""
    path = folder / f"{uuid4()}.h5ad"  # one of before may still be open
    adata.write_h5ad(path)
    return ad.read_h5ad(path, backed=mode)


def in_zarr(adata: ad.AnnData, folder) -> ad.AnnData:
    """The same AnnData, X in a store of zarr, version 3."""
    write_anndata(adata, folder / "cells.zarr", {"zarr_write_format": 3})
    return opened(zarr.open_group(folder / "cells.zarr", mode="r"))


def opened(group: zarr.Group) -> ad.AnnData:
    x = group["X"] if isinstance(group["X"], zarr.Array) else ad.io.sparse_dataset(group["X"])
    return ad.AnnData(X=x, obs=ad.io.read_elem(group["obs"]), var=ad.io.read_elem(group["var"]))


def as_layer(adata: ad.AnnData, folder) -> ad.AnnData:
    layers = {"counts": in_zarr(adata, folder).X}
    return ad.AnnData(obs=adata.obs, var=adata.var, layers=layers)


def as_raw(adata: ad.AnnData, folder) -> ad.AnnData:
    adata.raw = adata.copy()
    return backed(adata[:, 3:15].copy(), folder)


def dense(x):
    return x


PLACES = {  # how counts are stored, where, and what setup is told of it
    "h5ad": (csr_matrix, backed, {}),
    "h5ad, int64": (lambda x: csr_matrix(x.astype(np.int64)), backed, {}),
    "h5ad, dense float64": (lambda x: x.astype(float), backed, {}),
    "zarr": (csr_matrix, in_zarr, {}),
    "raw": (csr_matrix, as_raw, {"use_raw": True}),
    "zarr, dense": (dense, in_zarr, {}),
    "layer": (csr_matrix, as_layer, {"layer": "counts"}),
}
SLOW = ("zarr, dense", "layer")


@pytest.fixture(
    params=[
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, case in PLACES.items()
    ]
)
def both(request, tmp_path) -> tuple[CellsOnDisk, CellData]:
    """120 cells, on the disk and in memory."""
    stored, written, place = request.param
    adata = simulated()
    in_memory = Fields.from_anndata(adata, "cell_type", "Unknown").encode(adata)
    adata.X = stored(adata.X)
    adata = written(adata, tmp_path)
    return Fields.from_anndata(adata, "cell_type", "Unknown", **place).encode(adata), in_memory


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 16 cells, read two by two."""
    monkeypatch.setattr(on_disk, "WINDOW", 16)
    monkeypatch.setattr(on_disk, "GAP", 2)


@pytest.mark.usefixtures("small_windows")
def test_minibatches_are_those_in_memory(both):
    found, expected = both
    assert isinstance(found, CellsOnDisk) and len(found) == 120
    even = np.arange(0, 120, 2)
    for positions in ([4], [5, 2, 8], [3, 3], range(120), [119, 0, 40]):
        assert_equal_cells(found[np.array(positions)], expected[np.array(positions)])
    part, of_memory = found.subset(even), expected.subset(even)
    assert_equal_cells(part[np.array([7, 0, 7])], of_memory[np.array([7, 0, 7])])
    loaders = [partial(ordered_loader, batch_size=7)]
    loaders += [partial(training_loader, batch_size=7, seed=1, balanced=b) for b in (False, True)]
    for loader in loaders:
        minibatches = list(loader(part))
        assert len(minibatches) == len(loader(part)) == 9
        for cells in minibatches:
            assert_equal_cells(cells, of_memory[cells.index.numpy()])
    for ours, theirs in zip(*(total_counts(data.counts) for data in both), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_genes_are_found_by_name(tmp_path):
    adata = simulated()
    fields = Fields.from_anndata(adata, "cell_type", "Unknown")
    expected = fields.encode(adata)[np.arange(120)]
    others = adata[:, ::-1].copy()
    others.X = csr_matrix(others.X)
    assert_equal_cells(fields.encode(backed(others, tmp_path))[np.arange(120)], expected)


# ---- at the door --------------------------------------------------------------------------------

BAD = {
    "negative": -1.0,
    "not finite": np.inf,
    "nan": np.nan,
    "log-normalised": 0.5,
}


def message(adata: ad.AnnData) -> str:
    with pytest.raises(InputError) as error:
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    return str(error.value)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("written", mostly_slow([backed, in_zarr]))
def test_what_is_not_counts_is_refused_as_in_memory(tmp_path, written, value):
    adata = simulated()
    adata.X = np.minimum(adata.X, 9)
    adata.X[[77, 78, 110], [5, 0, 19]] = value
    adata.X = csr_matrix(adata.X)
    expected = message(adata)
    assert "in cell 'cell77', gene 'gene5', and 2 more like it" in expected
    assert message(written(adata, tmp_path)) == expected


@pytest.mark.usefixtures("small_windows")
def test_normalised_counts_are_refused_as_in_memory(tmp_path):
    """Of which the first cells are whole."""
    adata = simulated()
    adata.X[2:] *= 1e5 / adata.X[2:].sum(1, keepdims=True)
    expected = message(adata)
    assert "these look normalised; expected raw counts" in expected
    assert message(backed(adata, tmp_path)) == expected
    expected = message(in_raw())
    assert "raw holds whole numbers: use_raw=True" in expected
    assert message(backed(in_raw(), tmp_path)) == expected
    by_gene = in_raw()
    by_gene.raw = ad.AnnData(csc_matrix(by_gene.raw.X), by_gene.obs, by_gene.raw.var)
    assert "raw holds" not in message(backed(by_gene, tmp_path))


@pytest.mark.usefixtures("small_windows")
def test_corrected_counts_are_rounded_as_in_memory(tmp_path):
    adata, told, found = corrected(), [], []
    for cells in (adata, backed(adata, tmp_path)):
        with pytest.warns(UserWarning, match="fractions of .* up to") as caught:
            fields = Fields.from_anndata(cells, "cell_type", "Unknown")
        told.append(str(caught[0].message))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(fields.encode(cells)[np.arange(120)].x)
    assert told[0] == told[1] and torch.equal(*found)
    assert (found[1].numpy() == np.rint(adata.X)).all()


@pytest.mark.usefixtures("small_windows")
def test_empty_cells_are_refused_with_a_cure(tmp_path):
    adata = simulated()
    adata.X[[5, 90]] = 0
    adata = backed(adata, tmp_path)
    assert "cells without counts: 2 (cell5, cell90); write a file" in message(adata)
    with pytest.raises(InputError, match="X stays on the disk; load the AnnData"):
        drop_empty_cells(adata)
    SCANVI.setup_anndata(drop_empty_cells(adata.to_memory()), "cell_type", "Unknown")


def test_what_cannot_be_read_by_cell_is_refused(tmp_path, monkeypatch):
    adata = simulated()
    adata.X = csc_matrix(adata.X)
    adata = backed(adata, tmp_path)
    assert "sparse by gene (CSC), and minibatches are read by cell; write them by" in message(adata)
    adata = adata.to_memory()
    adata.X = adata.X.tocsr()
    SCANVI.setup_anndata(backed(adata, tmp_path / ""), "cell_type", "Unknown")
    monkeypatch.setattr(counts_of_anndata, "DaskArray", np.ndarray)  # dask need not be here
    assert "X is a dask array; leave it on the disk by" in message(simulated())


def test_broken_matrices_are_refused(tmp_path):
    adata = simulated()
    adata.X = csr_matrix(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file["X/indices"][700] = 4000
    adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert "cannot be read from the disk" in message(adata)
    adata.file.close()
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file["X/indptr"][7] = 4000
    assert "its arrays do not fit" in message(ad.read_h5ad(tmp_path / "cells.h5ad", backed="r"))


def test_a_missing_chunk_is_refused(tmp_path):
    """Zarr reads it as zeros."""
    adata = simulated()
    adata.X = csr_matrix(adata.X)
    adata = in_zarr(adata, tmp_path)
    (tmp_path / "cells.zarr" / "X" / "data" / "c" / "0").unlink()
    assert "a part of X/data is missing" in message(adata)


def test_a_missing_chunk_of_dense_counts_is_told_of(tmp_path):
    """It may be one of zeros, as zarr writes none: genes that no cell of it has."""
    adata = simulated()
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=3):
        warnings.simplefilter("ignore")  # of later versions of zarr
        adata.write_zarr(tmp_path / "cells.zarr", chunks=(60, 10))
    adata = opened(zarr.open_group(tmp_path / "cells.zarr", mode="r"))
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    (tmp_path / "cells.zarr" / "X" / "c" / "1" / "1").unlink()
    with pytest.warns(UserWarning, match="files of X of the counts on the disk are missing"):
        SCANVI(adata, n_hidden=4)


def test_questions_of_all_counts_at_once_are_refused_with_a_cure(tmp_path):
    adata = backed(simulated(), tmp_path)
    with pytest.raises(InputError, match="n_top_genes reads all counts at once, .* sample = adata"):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown", n_top_genes=7)
    sample = adata[:60].to_memory()
    SCANVI.setup_anndata(sample, "cell_type", "Unknown", n_top_genes=7)
    adata.uns["pyro_scanvi"] = sample.uns["pyro_scanvi"]
    model = SCANVI(adata, n_hidden=4)
    assert len(model.fields.genes) == 7 and len(model._data) == 120
    with pytest.raises(InputError, match="save_anndata=True reads .*; leave it out"):
        model.save(tmp_path / "model", save_anndata=True)
    with pytest.raises(InputError, match="X stays on the disk; load the AnnData"):
        SCANVI.prepare_query_anndata(adata, model)
    adata = as_layer(simulated(), tmp_path)
    adata.X = simulated().X
    extra = {"spliced": "layers/counts"}
    with pytest.raises(InputError, match=r"read it: adata.layers\['counts'\] = "):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown", extra=extra)
    adata.layers["counts"] = adata.layers["counts"][:]
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", extra=extra)


def test_counts_that_changed_or_went_are_refused(tmp_path):
    adata = simulated()
    adata.X = csr_matrix(adata.X)
    adata = backed(adata, tmp_path, "r+")
    data = Fields.from_anndata(adata, "cell_type", "Unknown").encode(adata)
    adata.X.group["data"][0] += 1
    with pytest.raises(InputError, match="changed since the model was made.* at position 0;"):
        data[np.array([3, 0])]
    assert len(data[np.array([3, 1])]) == 2
    adata.file.close()
    with pytest.raises(InputError, match="if their file was closed or changed, open it again"):
        data[np.array([3, 1])]


# ---- the order ----------------------------------------------------------------------------------


class Asked:
    """Counts that note which rows are held together."""

    def __init__(self, n_together: int):
        self.held, self._n_together = [], n_together

    def n_together(self, batch_size):
        return self._n_together

    def ahead(self, minibatches, n_together):
        for start in range(0, len(minibatches), n_together):
            self.held.append(np.concatenate(minibatches[start : start + n_together]))
            yield from minibatches[start : start + n_together]


def sorted_by_type(n: int = 3000) -> np.ndarray:
    """Labels of a file as they come: one batch after the other, a type after the other; -1 none."""
    label = np.r_[np.repeat([0, 1, 2], [300, 60, 20]), np.full(n, UNLABELED)]
    label[2000:2040] = 1
    return label


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_by_windows(monkeypatch, epoch):
    """Each cell once; each minibatch has its share of labelled cells, each window of each type."""
    monkeypatch.setattr(on_disk, "BLOCK", 16)
    label = sorted_by_type()
    sampler = BlockSampler(Asked(5), label, 32, seed=2)
    sampler.set_epoch(epoch)
    minibatches = list(sampler)
    assert sorted(np.concatenate(minibatches)) == list(range(len(label)))
    assert {len(m) for m in minibatches} <= {31, 32}
    share = (label >= 0).mean()
    n_labelled = np.array([(label[m] >= 0).sum() for m in minibatches])
    assert (abs(n_labelled - 32 * share) < 2).all()
    windows = sampler.counts.held
    assert len(windows) == -(-len(minibatches) // 5)
    for code in (-1, 0, 1, 2):
        expected = np.array([len(w) for w in windows]) * (label == code).mean()
        assert (abs([(label[w] == code).sum() for w in windows] - expected) < 3).all()
    apart = [(np.diff(np.sort(window[label[window] < 0])) > 1).sum() for window in windows]
    assert max(apart) <= 160 / 16 + 2  # blocks, where cells alone would stand apart 130 times


@pytest.mark.parametrize("balanced", [False, True])
def test_shares_of_processes_are_the_larger_minibatch(balanced):
    """Each reads its own cells of the same windows."""
    label, settings = sorted_by_type(), {"seed": 2, "balanced": balanced}
    whole = BlockSampler(Asked(5), label, 32, **settings)
    parts = [BlockSampler(Asked(5), label, 16, share=Share(r, 2), **settings) for r in (0, 1)]
    for minibatch, *shares in zip(whole, *parts, strict=True):
        assert sorted(np.concatenate(shares)) == sorted(minibatch)
    held = [sampler.counts.held for sampler in (whole, *parts)]
    for window, *shares in zip(*held, strict=True):
        assert sorted(np.concatenate(shares)) == sorted(window)


def test_class_balance_by_windows(monkeypatch):
    """As many of each type, in each window; a rare cell as often as another, and not at once."""
    monkeypatch.setattr(on_disk, "BLOCK", 16)
    label = sorted_by_type()
    sampler = BlockSampler(Asked(5), label, 32, seed=2, balanced=True)
    drawn = np.concatenate(list(sampler))
    assert np.bincount(label[drawn] + 1).tolist() == [2960, 140, 140, 140]
    assert sorted(drawn[label[drawn] < 0]) == np.flatnonzero(label < 0).tolist()
    assert np.bincount(drawn[label[drawn] == 2])[-20:].tolist() == [7] * 20
    for window in sampler.counts.held[:-1]:
        assert np.ptp(np.bincount(label[window][label[window] >= 0], minlength=3)) <= 3
        rare = window[label[window] == 2]
        assert np.bincount(rare).max(initial=0) <= 2


def test_in_one_window_the_order_is_as_random_as_in_memory():
    """How often two cells share a minibatch, in 1,000 epochs: the same, give or take 5 sd."""
    label = np.array([0, 0, 1, -1, -1, -1, -1, -1])
    together = []
    for sampler in (BlockSampler(Asked(9), label, 4, 0), MinibatchSampler(label, 4, 7)):
        together.append(np.zeros((8, 8)))
        for epoch in range(1000):
            sampler.set_epoch(epoch)
            for positions in sampler:
                together[-1][np.ix_(positions, positions)] += 1
    share = together[1] / 1000
    spread = np.sqrt(2 * 1000 * share * (1 - share))
    assert (abs(together[0] - together[1]) <= 5 * spread).all()
    assert 0 < share[0, 1] < share[0, 3] < 1  # labelled cells are dealt out


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = BlockSampler(Asked(2), sorted_by_type(), 64, seed, first_epoch=epoch)
        return np.concatenate(list(sampler)).tolist()

    assert order(1, 2) == order(1, 2) != order(1, 3) != order(2, 3)
