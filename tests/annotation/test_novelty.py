"""The distance by scipy, and false alarms as often as it was said."""

import numpy as np
from scipy.spatial.distance import mahalanobis
from scipy.stats import binom
from sklearn.covariance import LedoitWolf

from pyro_scanvi.annotation.novelty import Novelty

SPREAD = np.diag([1.0, 2.0, 0.5])
MEANS = 4.0 * np.eye(3)


def cells(n, seed):
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 3
    return MEANS[label] + rng.normal(size=(n, 3)) @ SPREAD, label


def test_the_distance_to_the_nearest_label_by_scipy():
    latent, label = cells(60, 0)
    novelty = Novelty.fit(latent, label)
    mean = np.stack([latent[label == code].mean(0) for code in range(3)])
    within = LedoitWolf(assume_centered=True).fit(latent - mean[label])
    precision = within.precision_ * 57 / 60
    new = cells(9, 1)[0]
    expected = [min(mahalanobis(z, m, precision) ** 2 for m in mean) for z in new]
    np.testing.assert_allclose(novelty.score(new), expected, rtol=1e-8)


def test_it_turns_with_the_space():
    """A rotation of the latent space changes nothing."""
    latent, label = cells(60, 0)
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    new = cells(9, 1)[0]
    one, other = Novelty.fit(latent, label), Novelty.fit(latent @ turn, label)
    np.testing.assert_allclose(one.score(new), other.score(new @ turn), rtol=1e-8)
    np.testing.assert_allclose(one.held_out, other.held_out, rtol=1e-8)


def test_ranks_by_hand():
    novelty = Novelty(np.zeros((1, 1)), np.eye(1), np.array([1.0, 4.0, 9.0]))
    far = np.array([[0.5], [1.5], [2.0], [5.0]])  # squared: .25, 2.25, 4, 25
    np.testing.assert_allclose(novelty.rank(far), [0, 1 / 4, 1 / 4, 3 / 4])


def test_false_alarms_are_as_rare_as_said():
    """One new cell in each of 200 draws, at a rate of .1.

    The number of alarms lies within the .0005 and .9995 quantiles of a binomial of the rate, and of
    half the rate: means that were found without a cell lie a little farther from it than those that
    new cells are compared with. It fails by chance in at most .1 % of all seeds.
    """
    alarms = 0
    for seed in range(200):
        novelty = Novelty.fit(*cells(30, seed))
        alarms += novelty.rank(cells(1, 10_000 + seed)[0])[0] > 0.9 - 1e-9
    assert binom.ppf(0.0005, 200, 0.05) <= alarms <= binom.ppf(0.9995, 200, 0.1)


def test_a_new_type_is_far():
    latent, label = cells(60, 0)
    novelty = Novelty.fit(latent, label)
    assert (novelty.rank(latent + 30.0) > 0.95).all()
