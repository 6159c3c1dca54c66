"""The statistics of differential expression, by counting on draws made by hand."""

import statistics
from math import log, log2

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array, csr_matrix

from pyro_scanvi import InputError
from pyro_scanvi.posterior import fold_changes
from pyro_scanvi.posterior.comparisons import Comparison
from pyro_scanvi.posterior.fold_changes import Group, RawStatistics, Settings


def group(rho, mean=None) -> Group:
    """A group with given draws; every gene is expressed unless its raw mean is given."""
    rho = np.asarray(rho, dtype=np.float32)
    ones = np.ones(rho.shape[1])
    return Group(rho, RawStatistics(ones if mean is None else np.asarray(mean), ones, ones))


def random_groups(n_genes: int = 300, n_draws: int = 40) -> tuple[Group, Group]:
    """More genes than are computed at once, some of them changed."""
    rng = np.random.default_rng(0)
    shift = np.where(np.arange(n_genes) % 3 == 0, 1.0, 0.0)
    logits = rng.normal(size=(2, n_draws, n_genes)) * 0.4
    return group(np.exp(logits[0] + shift) / 1000), group(np.exp(logits[1]) / 1000)


@pytest.mark.parametrize("test_mode", ["three", "two"])
def test_change_by_counting(test_mode):
    one, two = random_groups()
    found = fold_changes.change(
        one, two, Settings(delta=0.3, pseudocounts=1e-4, test_mode=test_mode)
    )
    for gene in (0, 1, 255, 256, 299):
        pairs = list(zip(one.rho[:, gene].tolist(), two.rho[:, gene].tolist(), strict=True))
        tested = [log2(a + 1e-4) - log2(b + 1e-4) for a, b in pairs]
        up = sum(r >= 0.3 for r in tested) / 40
        down = sum(r <= -0.3 for r in tested) / 40
        proba = max(up, down) if test_mode == "three" else up + down
        shown = [log2(a + 1e-7) - log2(b + 1e-7) for a, b in pairs]
        expected = {
            "proba_de": proba,
            "proba_not_de": 1 - proba,
            "bayes_factor": log((proba + 1e-8) / (1 - proba + 1e-8)),
            "scale1": statistics.fmean(a for a, _ in pairs),
            "scale2": statistics.fmean(b for _, b in pairs),
            "pseudocounts": 1e-4,
            "delta": 0.3,
            "lfc_mean": statistics.fmean(shown),
            "lfc_median": statistics.median(shown),
            "lfc_std": statistics.pstdev(shown),
            "lfc_min": min(shown),
            "lfc_max": max(shown),
        }
        assert {k: v[gene] for k, v in found.items()} == pytest.approx(expected, rel=1e-6)


def test_vanilla_by_counting():
    one, two = group([[1, 5, 3], [2, 5, 3]]), group([[0, 6, 4], [3, 4, 5]])
    found = fold_changes.vanilla(one, two, Settings("vanilla"))
    np.testing.assert_allclose(found["proba_m1"], [0.5, 0.5, 0])
    np.testing.assert_allclose(found["proba_m1"] + found["proba_m2"], 1)
    np.testing.assert_allclose(found["scale2"], [1.5, 5, 4.5])
    np.testing.assert_allclose(found["bayes_factor"], [0, 0, -log((1 + 1e-8) / 1e-8)], atol=1e-12)


@pytest.mark.parametrize("delta", [0.25, None])
def test_swapped_groups(delta):
    """Changes are negated; the probability of a change is the same."""
    one, two = random_groups()
    settings = Settings(delta=delta)
    there, back = fold_changes.change(one, two, settings), fold_changes.change(two, one, settings)
    np.testing.assert_allclose(back["proba_de"], there["proba_de"])
    np.testing.assert_allclose(back["lfc_mean"], -there["lfc_mean"])
    np.testing.assert_allclose(back["lfc_max"], -there["lfc_min"])
    np.testing.assert_allclose(back["scale1"], there["scale2"])


def test_a_change_of_delta_itself_counts_both_ways():
    one, two = group([[2.0, 1.0]]), group([[1.0, 2.0]])
    found = fold_changes.change(one, two, Settings(delta=1, pseudocounts=1e-30))
    np.testing.assert_array_equal(found["proba_de"], 1)


def test_variation_within_the_groups_is_no_change_between_them():
    """Both halve or double at random: "two" takes half of that for a change, "three" a quarter.

    Four standard errors of 20,000 draws: a false alarm in 8,000.
    """
    rng = np.random.default_rng(0)
    one, two = (group(rng.choice([1.0, 2.0], size=(20_000, 1))) for _ in range(2))
    for test_mode, expected in (("three", 0.25), ("two", 0.5)):
        found = fold_changes.change(one, two, Settings(test_mode=test_mode))["proba_de"]
        np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 20_000))


def test_calls_by_hand():
    """Expected shares of false calls are .01, .02, .05 and .1625; then 1."""
    proba = np.array([0.5, 0.97, 0.89, 0.99])
    for target, expected in ((0.05, [0, 1, 1, 1]), (0.0499, [0, 1, 0, 1]), (0.001, [0, 0, 0, 0])):
        found = fold_changes.expected_fdr_calls(proba, target + 1e-12)
        np.testing.assert_array_equal(found, np.array(expected, dtype=bool))


@pytest.mark.parametrize("target", [0.05, 0.2])
def test_false_calls_are_as_many_as_announced(target):
    """Where the probabilities are true. Five standard errors: a false alarm in 1.7 million."""
    rng = np.random.default_rng(0)
    proba = rng.beta(0.3, 0.5, size=40_000)
    truth = rng.random(40_000) < proba
    calls = fold_changes.expected_fdr_calls(proba, target)
    error = 5 * np.sqrt(target * (1 - target) / calls.sum())
    assert abs((~truth[calls]).mean() - target) < error + 1 / calls.sum()


def test_of_sure_genes_the_larger_change_comes_first():
    """Whether up or down; unsure genes come last."""
    folds = 2.0 ** np.array([2, -3, 0, 1])
    draws = (lambda cells: np.tile(folds, (5, 1))), (lambda cells: np.ones((5, 4)))
    comparison = Comparison(np.array([0]), np.array([1]), ("x", "y"))
    genes = np.array(["up", "down", "same", "less"])
    table = fold_changes.compare(comparison, draws, np.ones((2, 4)), genes, Settings())
    assert list(table.index) == ["down", "up", "less", "same"]
    assert list(table["is_de_fdr_0.05"]) == [True, True, True, False]
    assert (table["comparison"] == "x vs y").all()


def test_pseudocounts_from_unexpressed_genes():
    """Largest draws of the unexpressed genes: 3 and 5 in group 1, 7 in group 2."""
    one = group([[1, 3, 9, 2], [2, 1, 9, 5]], mean=[1, 0, 0.01, 0.0099])
    two = group([[7, 1, 1, 1], [1, 1, 1, 1]], mean=[0, 1, 1, 1])
    assert fold_changes.estimated_pseudocounts(one, two) == pytest.approx(7 / 4)
    assert fold_changes.estimated_pseudocounts(one, group(two.rho)) == pytest.approx(4.8 / 4)
    assert fold_changes.estimated_pseudocounts(group(one.rho), group(two.rho)) == 1e-10


def test_delta_from_the_genes():
    """Three tight clusters of mean changes, at -2, 0 and 3: 0.6 (2 + 3) / 2."""
    shift = np.repeat([-2.0, 0.0, 3.0], [20, 60, 20]) + np.linspace(-0.01, 0.01, 100)
    one, two = group(2.0 ** shift[None]), group(np.ones((1, 100)))
    assert fold_changes.estimated_delta(one, two, 1e-10) == pytest.approx(1.5, abs=0.01)
    near = group(2.0 ** np.linspace(-0.01, 0.01, 100)[None])
    assert fold_changes.estimated_delta(near, two, 1e-10) == 0.1
    with pytest.raises(InputError, match="delta=None needs 3 genes"):
        fold_changes.estimated_delta(group([[1, 2]]), group([[1, 2]]), 1e-10)


@pytest.mark.parametrize("kind", [np.asarray, csr_matrix, csr_array])
def test_raw_statistics(kind, monkeypatch):
    monkeypatch.setattr(fold_changes, "CELLS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, size=(60, 9)).astype(np.float32)
    counts[:, 0] += 1
    cells = np.flatnonzero(rng.random(60) < 0.6)
    matrix = kind(counts.copy())
    if kind is not np.asarray:
        matrix.data[3], counts[matrix.nonzero()[0][3], matrix.indices[3]] = 0, 0  # a stored zero
    found = fold_changes.raw_statistics(matrix, cells)
    table = pd.DataFrame(counts[cells])
    np.testing.assert_allclose(found.mean, table.mean())
    np.testing.assert_allclose(found.non_zeros, (table > 0).mean())
    scaled = table.div(table.sum(axis=1), axis=0) * 1e4
    np.testing.assert_allclose(found.normalized_mean, scaled.mean(), rtol=1e-6)
