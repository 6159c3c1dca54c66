"""Minibatches and the way to them: laws of the containers, the sampler, the loaders, the split."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from pyro_scanvi.data.minibatches import (
    UNLABELED,
    CellData,
    Cells,
    MinibatchSampler,
    library_prior,
    ordered_loader,
    split,
    training_loader,
)

OPTIONAL = ("continuous", "categorical", "size_factor")


def cell_data(n: int = 9, counts=np.asarray, covariates: bool = True) -> CellData:
    """`n` cells of 5 genes, every third one unlabelled; `counts` makes the matrix."""
    rng = np.random.default_rng(0)
    more = {
        "continuous": rng.normal(size=(n, 2)).astype(np.float32),
        "categorical": rng.integers(3, size=(n, 2)),
        "size_factor": rng.gamma(2, size=(n, 1)).astype(np.float32),
    }
    return CellData(
        counts=counts(rng.poisson(1, size=(n, 5))),
        batch=rng.integers(2, size=n),
        label=np.where(np.arange(n) % 3 == 0, UNLABELED, rng.integers(4, size=n)),
        **(more if covariates else {}),
    )


def assert_equal_cells(found: Cells, expected: Cells) -> None:
    for field in fields(Cells):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        else:
            assert ours == theirs


# ---- Cells --------------------------------------------------------------------------------------


def test_counts_alone_are_one_batch_without_labels():
    cells = Cells.from_counts(torch.ones(3, 2))
    assert (len(cells), cells.n_obs) == (3, 3)
    assert cells.batch.tolist() == [0, 0, 0]
    assert cells.label.tolist() == [UNLABELED] * 3
    assert cells.index.tolist() == [0, 1, 2]
    assert not cells.labelled.any()
    assert all(getattr(cells, name) is None for name in OPTIONAL)


def test_hide_labels_hides_nothing_else():
    cells = cell_data()[np.arange(9)]
    hidden = cells.hide_labels()
    assert cells.labelled.tolist() == [False, True, True] * 3
    assert not hidden.labelled.any()
    assert_equal_cells(replace(hidden, label=cells.label), cells)


@pytest.mark.parametrize("covariates", [True, False])
def test_to_moves_every_tensor(covariates):
    cells = cell_data(covariates=covariates)[np.arange(4)]
    if covariates:
        more = {"evidence": torch.zeros(4, 3), "annotations": torch.zeros(4, 1).long()}
        cells = replace(cells, weight=torch.ones(4), classified=torch.ones(4) > 0, **more)
    cells = replace(cells, shared={"pi": torch.ones(3)}, extra={"p": torch.ones(4, 2)}).to("meta")
    assert {cells.shared["pi"].device.type, cells.extra["p"].device.type} == {"meta"}
    others = ("n_obs", "shared", "extra", "pooled")
    tensors = [getattr(cells, f.name) for f in fields(cells) if f.name not in others]
    assert {t.device.type for t in tensors if t is not None} == {"meta"}
    assert [t is None for t in tensors].count(True) == (0 if covariates else len(OPTIONAL) + 4)
    assert cells.n_obs == 9


# ---- CellData -----------------------------------------------------------------------------------

MATRICES = {
    "CSR": csr_matrix,
    "CSR float64": lambda x: csr_matrix(x.astype(float)),
    "CSR uint8": lambda x: csr_matrix(x.astype(np.uint8)),
    "dense float32": lambda x: x.astype(np.float32),
    "dense int8, Fortran": lambda x: np.asfortranarray(x.astype(np.int8)),
}


@pytest.mark.parametrize("counts", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("positions", [[4], [5, 2, 8], [3, 3], range(9)], ids=str)
def test_minibatches_do_not_depend_on_how_counts_are_stored(counts, positions):
    positions = np.array(positions)
    cells = cell_data(counts=counts)[positions]
    assert cells.x.dtype == torch.float32
    assert_equal_cells(cells, cell_data()[positions])


@pytest.mark.parametrize("counts", [csr_matrix, np.asarray])
def test_a_minibatch_holds_the_cells_asked_for(counts):
    data, positions = cell_data(counts=counts), np.array([6, 0, 7])
    cells = data[positions]
    dense = data.counts.toarray() if counts is csr_matrix else data.counts
    for i, position in enumerate(positions):
        assert cells.x[i].tolist() == dense[position].tolist()
        for name in ("batch", "label", *OPTIONAL):
            assert getattr(cells, name)[i].tolist() == getattr(data, name)[position].tolist()
    assert cells.index.tolist() == positions.tolist()
    assert cells.n_obs == len(data) == 9


def test_absent_covariates_stay_absent():
    cells = cell_data(covariates=False)[np.arange(3)]
    assert all(getattr(cells, name) is None for name in OPTIONAL)


@pytest.mark.parametrize("counts", [csr_matrix, np.asarray])
def test_a_subset_is_a_data_set_of_its_own(counts):
    data = cell_data(counts=counts)
    part = data.subset(np.array([8, 1, 4]))
    expected = replace(data[np.array([4, 8])], n_obs=3, index=torch.tensor([2, 0]))
    assert len(part) == 3
    assert_equal_cells(part[np.array([2, 0])], expected)


def test_subset_by_a_mask():
    data, mask = cell_data(), np.arange(9) > 5
    assert_equal_cells(
        data.subset(mask)[np.arange(3)], data.subset(np.flatnonzero(mask))[np.arange(3)]
    )


def test_a_subset_keeps_sparse_counts_sparse():
    assert cell_data(counts=csr_matrix).subset(np.arange(3)).counts.format == "csr"


def test_a_position_is_kept_through_subsets_of_subsets():
    """Where the index counts within the subset at hand."""
    part = cell_data().subset(np.arange(9) > 2).subset(np.array([5, 0, 2]))
    cells = part[np.array([2, 0])]
    assert cells.position.tolist() == [5, 8] and cells.index.tolist() == [2, 0]
    assert cell_data()[np.array([4, 1])].position.tolist() == [4, 1]
    assert Cells.from_counts(torch.ones(3, 2)).position.tolist() == [0, 1, 2]


# ---- the sampler --------------------------------------------------------------------------------

SIZES = {  # cells, labelled cells, batch size
    "last minibatch of one elsewhere": (513, 40, 128),
    "even": (512, 512, 128),
    "few labels": (1000, 7, 64),
    "no labels": (100, 0, 32),
    "one minibatch": (30, 10, 128),
    "minibatches of one": (5, 2, 1),
    "one cell": (1, 1, 128),
}


def few_labels(n: int, n_labelled: int) -> np.ndarray:
    return np.where(np.random.default_rng(n).permutation(n) < n_labelled, 0, UNLABELED)


@pytest.mark.parametrize(("n", "n_labelled", "batch_size"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_laws_of_an_epoch(n, n_labelled, batch_size, epoch):
    label = few_labels(n, n_labelled)
    sampler = MinibatchSampler(label, batch_size, seed=3)
    sampler.set_epoch(epoch)
    minibatches = list(sampler)
    sizes = [len(positions) for positions in minibatches]
    assert len(minibatches) == len(sampler) == -(-n // batch_size)
    assert sorted(np.concatenate(minibatches)) == list(range(n))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size
    # A minibatch has its share of the labels, give or take less than one at either end.
    found = np.array([(label[positions] != UNLABELED).sum() for positions in minibatches])
    assert (abs(found - np.array(sizes) * n_labelled / n) < 2).all()


def test_no_minibatch_of_one():
    """513 cells by 128 leave one over, on which batch norm would fail."""
    sizes = [len(p) for p in MinibatchSampler(few_labels(513, 40), 128, seed=0)]
    assert sizes == [103, 103, 103, 102, 102]


def test_few_labels_reach_different_minibatches():
    label = few_labels(1000, 5)
    for seed in range(20):
        holders = [(label[p] == 0).sum() for p in MinibatchSampler(label, 100, seed)]
        assert max(holders) == 1


def orders(seed: int, epochs=range(3)) -> list[list[int]]:
    sampler = MinibatchSampler(few_labels(50, 20), 16, seed)
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found.append(np.concatenate(list(sampler)).tolist())
    return found


def test_the_order_depends_on_seed_and_epoch_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    first = orders(seed=0)
    np.random.seed(2)
    torch.manual_seed(2)
    assert orders(seed=0) == first
    assert orders(seed=0, epochs=[2]) == first[2:]
    different = first + orders(seed=1)
    assert len({tuple(order) for order in different}) == len(different)


def test_training_on_goes_on_in_the_order_of_epochs():
    later = MinibatchSampler(few_labels(50, 20), 16, seed=0, first_epoch=2)
    assert np.concatenate(list(later)).tolist() == orders(seed=0)[2]


def test_every_cell_comes_first_as_often_as_others():
    """Of 2,000 epochs, each of 10 cells leads 200 times, sd 13.4; the bound is 5 sd."""
    sampler = MinibatchSampler(np.arange(10) // 5 - 1, 5, seed=0)
    first = []
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        first.append(next(iter(sampler))[0])
    assert abs(np.bincount(first, minlength=10) - 200).max() < 5 * 13.4


# ---- loaders ------------------------------------------------------------------------------------


def test_training_loader():
    data = cell_data(n=23, counts=csr_matrix)
    loader = training_loader(data, batch_size=5, seed=4)
    sampler = MinibatchSampler(data.label, 5, seed=4)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # as Lightning does
        sampler.set_epoch(epoch)
        for cells, positions in zip(loader, sampler, strict=True):
            assert_equal_cells(cells, data[positions])


def test_loaders_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    for loader in (training_loader(cell_data(), 4, seed=0), ordered_loader(cell_data(), 4)):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"), [(7, 3, [3, 2, 2]), (4, 9, [4]), (1, 1, [1])]
)
def test_ordered_loader(n, batch_size, sizes):
    loader = ordered_loader(cell_data(n=n), batch_size)
    minibatches = list(loader)
    assert [len(cells) for cells in minibatches] == sizes
    assert torch.cat([cells.index for cells in minibatches]).tolist() == list(range(n))


# ---- split --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "train_size", "held_out"),
    [
        (1, 0.5, 0),
        (9, 0.9, 0),
        (10, 0.9, 1),
        (19, 0.9, 1),
        (30, 0.9, 3),
        (100, 0.75, 25),
        (100, 1.0, 0),
    ],
)
def test_the_held_out_share_of_a_class_is_rounded_down(n, train_size, held_out):
    label = np.r_[np.full(n, 5), np.full(40, UNLABELED)]
    train, validation = split(label, train_size, seed=0)
    assert (label[validation] == 5).sum() == held_out
    assert (label[train] == 5).sum() == n - held_out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("train_size", [0.5, 0.8, 0.9, 1.0])
def test_split_is_disjoint_complete_and_stratified(train_size, seed):
    label = np.random.default_rng(seed).integers(-1, 4, size=200)
    train, validation = split(label, train_size, seed)
    assert sorted([*train, *validation]) == list(range(200))
    for code in range(-1, 4):
        share = (label[train] == code).sum() / (label == code).sum()
        assert train_size <= share + 1e-9
        assert share < train_size + 1 / (label == code).sum()


def test_split_depends_on_the_seed_alone():
    label = np.arange(60) % 3
    held_out = [split(label, 0.8, seed)[1].tolist() for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


# ---- prior of a latent library ------------------------------------------------------------------


@pytest.mark.parametrize("counts", [csr_matrix, np.asarray])
def test_library_prior(counts):
    """Batch 0 holds totals e and e^3, batch 1 one total of e^2, batch 2 no cell at all."""
    totals = np.exp([[1.0], [3.0], [2.0]])
    data = CellData(counts(totals), np.array([0, 0, 1]), np.zeros(3, dtype=int))
    means, variances = library_prior(data, n_batch=3)
    np.testing.assert_allclose(means, [2, 2, 2])
    np.testing.assert_allclose(variances, [1, 2 / 3, 2 / 3])


def test_library_prior_of_equal_cells_is_proper():
    data = CellData(np.ones((4, 2)), np.zeros(4, dtype=int), np.zeros(4, dtype=int))
    means, variances = library_prior(data, n_batch=1)
    np.testing.assert_allclose(means, np.log(2))
    assert (variances > 0).all()
