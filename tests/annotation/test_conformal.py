"""Sets of labels: thresholds by hand, limits, and coverage in simulation."""

import numpy as np
import pytest
from scipy.stats import binom

from pyro_scanvi.annotation.conformal import (
    label_sets,
    quantile,
    thresholds_by_label,
    thresholds_overall,
)

COVERAGE = 0.9
N_LABELS = 3


@pytest.mark.parametrize(("n", "expected"), [(8, np.inf), (9, 9), (19, 18), (20, 19)])
def test_the_quantile_counts_one_more_cell(n, expected):
    """The ceil((n + 1) .9)-th smallest score, in any order; of fewer than nine there is none."""
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert quantile(scores, COVERAGE) == expected


def test_weights_are_cells_that_are_there_more_often():
    """Sum by hand: 1, 2 and 2, of 6 with one more, so that .5 is reached at the second score."""
    scores, weight = np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 2.0])
    assert quantile(scores, 0.5, weight) == 0.2
    assert quantile(scores, 0.51, weight) == 0.3
    assert quantile(scores, 0.9, weight) == np.inf
    assert quantile(scores, 0.9, weight, more=0.5) == 0.3


def test_of_the_held_out_shares_all_labels_have_one_threshold():
    rng = np.random.default_rng(1)
    label, score = np.arange(40) % 2, rng.random(40)
    found = thresholds_overall(score, label, np.array([0.5, 0.5]), COVERAGE)
    np.testing.assert_allclose(found, quantile(score, COVERAGE))


def test_a_label_that_no_held_out_cell_has_is_in_every_set():
    score, label = np.full(20, 0.1), np.zeros(20, dtype=int)
    shares = np.array([0.9, 0.1])
    assert thresholds_overall(score, label, shares, COVERAGE)[1] == np.inf
    assert thresholds_by_label(score, label, 2, COVERAGE)[1] == np.inf


def test_the_most_probable_label_is_always_in():
    p = np.array([[0.4, 0.35, 0.25], [0.9, 0.05, 0.05]])
    assert label_sets(p, np.zeros(3)).tolist() == [[True, False, False]] * 2
    assert label_sets(p, np.full(3, np.inf)).all()
    assert label_sets(p, np.array([0.0, 0.65, 0.7]))[0].tolist() == [True, True, False]


def probabilities_of(label, rng, noise=1.5):
    """A rule that is unsure and too sure at once, as rules are."""
    logits = 3.0 * np.eye(N_LABELS)[label] * [1.0, 0.7, 0.4]
    logits = logits + noise * rng.normal(size=(len(label), N_LABELS))
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def scores_of(label, rng):
    p = probabilities_of(label, rng)
    return 1 - p[np.arange(len(label)), label], p


@pytest.mark.parametrize("by_type", [True, False])
def test_sets_cover_as_they_promise(by_type):
    """Held-out cells have equal shares of labels, the others have not.

    2,000 draws of 90 held-out cells and of a new one: at most the .001 quantile of a binomial with
    the promised share misses, for each label by type; so the test fails by chance in at most
    .3 % of all seeds.
    """
    rng, n_draws, shares = np.random.default_rng(2), 2000, np.array([0.7, 0.2, 0.1])
    held_out, holds = np.arange(90) % N_LABELS, np.zeros(N_LABELS)
    new = rng.choice(N_LABELS, n_draws, p=[1 / 3] * 3 if by_type else shares)
    for label in new:
        score, _ = scores_of(held_out, rng)
        _, p = scores_of(np.array([label]), rng)
        if by_type:
            limits = thresholds_by_label(score, held_out, N_LABELS, COVERAGE)
        else:
            limits = thresholds_overall(score, held_out, shares, COVERAGE)
        holds[label] += label_sets(p, limits)[0, label]
    asked = np.bincount(new, minlength=N_LABELS)
    if not by_type:
        holds, asked = holds.sum(keepdims=True), asked.sum(keepdims=True)
    assert (holds >= binom.ppf(0.001, asked, COVERAGE)).all()
    assert (holds < asked).all(), "the sets leave labels out"
