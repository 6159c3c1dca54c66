"""The linear rules are scikit-learn's, and what they say of a cell that they held out is honest."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from pyro_scanvi.annotation.readers import Reader, cross_entropy, fit_reader, in_company


def cells(n=60, n_features=200, n_labels=3, seed=0, apart=1.0):
    """More features than cells, as of genes; the first ones tell the label."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % n_labels
    features = rng.normal(size=(n, n_features))
    features[:, :n_labels] += apart * np.eye(n_labels)[label]
    return features, label


@pytest.mark.parametrize("n_labels", [2, 3])
def test_it_is_logistic_regression_of_all_features(n_labels):
    """Though it is solved in the span of the cells."""
    features, label = cells(n_labels=n_labels)
    reader, _ = fit_reader(features, label, strengths=[0.1])
    expected = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(features, label)
    new = cells(seed=1, n_labels=n_labels)[0]
    found = reader(new)
    np.testing.assert_allclose(found, expected.predict_log_proba(new), atol=5e-3)
    assert found.shape == (60, n_labels) and reader.weight.shape == (n_labels, 200)


def test_log_probabilities_by_hand():
    reader = Reader(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([0.5, -0.5]))
    features = np.array([[3.0, 1.0]])
    expected = log_softmax([3.5, 1.5])
    np.testing.assert_allclose(reader(features)[0], expected)


def test_held_out_cells_of_noise_are_read_no_better_than_by_chance():
    """Which a rule that saw their label reads without an error, from 200 features of 60 cells.

    The number of right ones is about Binomial(60, 1/3), whose .9999 quantile is 35.
    """
    features, label = cells(apart=0.0)
    reader, held_out = fit_reader(features, label, strengths=[10.0])
    assert (reader(features).argmax(1) == label).all()
    assert (held_out.argmax(1) == label).sum() <= 35


def test_the_strength_is_the_one_of_the_smallest_held_out_cost():
    features, label = cells(apart=3.0)
    costs = {C: cross_entropy(fit_reader(features, label, 0, [C])[1], label) for C in (1e-3, 1, 9)}
    best = min(costs, key=costs.get)
    chosen, _ = fit_reader(features, label, 0, list(costs))
    expected, _ = fit_reader(features, label, 0, [best])
    np.testing.assert_array_equal(chosen.weight, expected.weight)


def test_a_cell_that_alone_has_its_label_does_not_count():
    """No rule of the folds can know it."""
    features, label = cells()
    label = np.where(np.arange(60) == 0, 3, label)
    reader, held_out = fit_reader(features, label)
    assert reader.weight.shape == (4, 200) and held_out[0].argmax() != 3
    assert in_company(label).sum() == 59
    without = -held_out[np.arange(1, 60), label[1:]].mean()
    assert cross_entropy(held_out, label) == pytest.approx(without)
