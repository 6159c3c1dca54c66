"""The data set that ships with scanpy, its counts, and labels to hide."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from pyro_scanvi import datasets
from pyro_scanvi.data.columns import check_names
from pyro_scanvi.data.counts import CountsPlace
from pyro_scanvi.datasets import hide_labels, pbmc68k_counts


@pytest.fixture(scope="module")
def cells():
    return pbmc68k_counts()


@pytest.fixture(scope="module")
def shipped():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sc.datasets.pbmc68k_reduced()


def test_shape_and_names(cells, shipped):
    assert cells.shape == (700, 765)
    assert list(cells.obs_names) == list(shipped.obs_names)
    assert list(cells.var_names) == list(shipped.raw.var_names)
    assert list(cells.obs["cell_type"]) == list(shipped.obs["bulk_labels"])
    assert cells.obs["cell_type"].nunique() == 10


def test_counts_are_counts(cells, shipped):
    check_names(cells)
    CountsPlace().own_counts(cells)
    assert cells.X.format == "csr"
    assert (cells.X.data % 1 == 0).all()
    assert cells.X.data.min() == 1
    assert ((cells.X.toarray() > 0) == (shipped.raw.X.toarray() > 0)).all()


def test_counts_give_back_what_scanpy_ships(cells, shipped):
    """log(1 + 10^4 count / n_counts), with scanpy's own total of all genes."""
    totals = shipped.obs["n_counts"].to_numpy()
    again = np.log1p(cells.X.toarray() / totals[:, None] * 1e4)
    np.testing.assert_allclose(again, shipped.raw.X.toarray(), atol=1e-3)


def test_totals_are_those_of_some_of_the_genes(cells, shipped):
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    all_genes = shipped.obs["n_counts"].to_numpy()
    assert (totals < all_genes).all()
    assert np.corrcoef(totals, all_genes)[0, 1] > 0.7


def test_a_changed_file_is_an_error(monkeypatch):
    monkeypatch.setattr(datasets, "LARGEST_RESIDUAL", 0.0)
    with pytest.raises(ValueError, match="has changed"):
        pbmc68k_counts()


# ---- hidden labels ------------------------------------------------------------------------------

SIZES = {"a": 1, "b": 2, "c": 7, "d": 40}
LABELS = pd.Series(np.repeat(list(SIZES), list(SIZES.values()))).sample(frac=1, random_state=0)


@pytest.mark.parametrize("n_per_label", [1, 3, 10, 100])
def test_at_most_half_of_a_type_is_kept(n_per_label):
    shown = hide_labels(LABELS, n_per_label, seed=0)
    kept = shown[shown != "Unknown"]
    assert (kept.astype(str) == LABELS[kept.index]).all()
    assert list(shown.index) == list(LABELS.index)
    found = kept.value_counts()
    for name, size in SIZES.items():
        assert found.get(name, 0) == min(n_per_label, size // 2)


def test_hidden_labels_depend_on_the_seed_alone():
    first, same, other = (hide_labels(LABELS, 3, seed) for seed in (0, 0, 1))
    pd.testing.assert_series_equal(first, same)
    assert (first != other).any()


def test_the_name_of_the_hidden():
    shown = hide_labels(LABELS, 1, seed=0, hidden="?")
    assert set(shown) == {"b", "c", "d", "?"}
