"""The consensus: its formula, what it learns, and its way through a file."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import softmax

from pyro_scanvi.annotation.arrays import from_arrays, to_arrays
from pyro_scanvi.annotation.consensus import fit_consensus, labelled_cells, log_normalised
from pyro_scanvi.annotation.strangers import likeness

N_GENES, N_LABELS = 150, 3


def cells(n=90, seed=0, strength=1.0):
    """Counts of a few marker genes, and a latent state that tells the types too."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % N_LABELS
    same = np.random.default_rng(9)  # for all cells
    rates = np.ones((N_LABELS, N_GENES)) * np.exp(same.normal(size=N_GENES))
    for code in range(N_LABELS):
        rates[code, 10 * code : 10 * code + 10] *= np.exp(strength)
    counts = rng.poisson(rates[label])
    latent = strength * same.normal(size=(N_LABELS, 4))[label] + rng.normal(size=(n, 4))
    return counts.astype(float), latent, label


@pytest.fixture(scope="module")
def learned():
    return fit_consensus(*cells())


def test_the_formula(learned):
    """[p1 p2] to the power of beta / 2, normalised; counts are read in float32."""
    counts, latent, _ = cells(seed=1)
    features = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    one, two = np.exp(learned.of_counts(features)), np.exp(learned.of_latent(latent))
    expected = (one * two) ** (learned.inverse_temperature / 2)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(learned(counts, latent), expected, rtol=1e-5)


def test_sparse_or_dense_is_the_same(learned):
    counts, latent, label = cells()
    found = to_arrays(fit_consensus(csr_matrix(counts), latent, label))
    for name, values in to_arrays(learned).items():
        np.testing.assert_array_equal(found[name], values)


def test_the_scale_of_a_latent_dimension_does_not_matter(learned):
    counts, latent, label = cells()
    scale = np.array([1e-2, 1.0, 10.0, 100.0])
    other = fit_consensus(counts, latent * scale, label)
    new, states, _ = cells(seed=1)
    np.testing.assert_allclose(other(new, states * scale), learned(new, states), atol=1e-3)


def test_it_is_calibrated_where_rules_overfit():
    """Weak signals, far more genes than cells: the sum of both costs is near its best temperature.

    Of 3,000 new cells; a temperature of a rule that had seen its cells is several times as cold.
    """
    learned = fit_consensus(*cells(120, strength=0.4))
    counts, latent, label = cells(3000, seed=5, strength=0.4)
    both = learned.of_counts(log_normalised(counts)) + learned.of_latent(latent)

    def cost(beta):
        p = softmax(beta / 2 * both, axis=1)
        return -np.log(p[np.arange(3000), label]).mean()

    assert cost(learned.inverse_temperature) < cost(4 * learned.inverse_temperature)
    assert cost(learned.inverse_temperature) < cost(learned.inverse_temperature / 4)
    assert cost(learned.inverse_temperature) < np.log(N_LABELS), "better than knowing nothing"


def test_few_cells_that_are_all_read_rightly_do_not_make_it_sure():
    """Their likelihood alone has no best temperature: it grows up to any bound."""
    learned = fit_consensus(*cells(15, strength=3.0))
    assert (learned.score < 0.5).all()
    assert 1 < learned.inverse_temperature < 2


def test_scores_are_of_cells_that_were_not_seen(learned):
    """Of new cells they are distributed alike; not so those of the cells that it learned from.

    Means of 90 and 3,000 scores, which differ by less than .12 (five standard errors of the first).
    """
    counts, latent, label = cells(3000, seed=5)
    new = 1 - learned(counts, latent)[np.arange(3000), label]
    assert abs(learned.score.mean() - new.mean()) < 0.12
    np.testing.assert_array_equal(np.bincount(learned.label), [30, 30, 30])


def test_a_label_of_a_single_cell_has_no_score():
    counts, latent, label = cells()
    label = np.where(np.arange(90) == 0, N_LABELS, label)
    found = fit_consensus(counts, latent, label)
    assert len(found.score) == 89 and set(found.label) == {0, 1, 2}
    assert found(counts, latent).shape == (90, 4)


def test_through_arrays_to_the_bit(learned):
    counts, latent, _ = cells(seed=1)
    again = from_arrays({k: v.copy() for k, v in to_arrays(learned).items()})
    np.testing.assert_array_equal(again(counts, latent), learned(counts, latent))
    np.testing.assert_array_equal(again.novelty.rank(latent), learned.novelty.rank(latent))
    assert likeness(again, counts) == likeness(learned, counts)


def test_what_is_held_out_is_read_by_rules_that_did_not_see_it(learned):
    """Labels at random are guessed by chance: a third, and five standard errors."""
    counts, latent, label = cells()
    guessed = fit_consensus(counts, latent, np.random.default_rng(3).permutation(label))
    np.testing.assert_allclose(guessed.held_out.sum(1), 1)
    assert (guessed.held_out.argmax(1) == guessed.label).mean() < 0.58
    assert (learned.held_out.argmax(1) == learned.label).mean() > 0.8


def test_arrays_of_before_know_of_held_out_cells_how_their_own_label_fared(learned):
    arrays = to_arrays(learned)
    arrays["score"] = 1 - arrays.pop("held_out")[np.arange(90), learned.label]
    again = from_arrays(arrays)
    np.testing.assert_allclose(again.score, learned.score, rtol=1e-12)
    assert np.isnan(again.held_out).sum() == 90 * 2


def test_of_too_many_cells_an_equal_share_of_each_label():
    label = np.repeat([-1, 0, 1, 2], [50, 1, 100, 300])
    chosen = labelled_cells(label, most=100)
    np.testing.assert_array_equal(np.bincount(label[chosen]), [1, 25, 75])
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(labelled_cells(label), np.flatnonzero(label >= 0))


def test_mixed_up_genes_look_strange(learned):
    """Cells of one type do not."""
    counts, _, label = cells(seed=1)
    assert likeness(learned, counts) > 0.95 and likeness(learned, counts[label == 1]) > 0.95
    mixed = counts[:, np.random.default_rng(0).permutation(N_GENES)]
    assert abs(likeness(learned, mixed)) < 0.4  # five standard errors of 150 genes
    assert abs(likeness(learned, np.ones_like(counts))) < 1e-6
