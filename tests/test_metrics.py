"""Scores of predicted probabilities and of a latent space, and the baselines of the report."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from pyro_scanvi.app import baselines
from pyro_scanvi.app.baselines import baseline_probabilities
from pyro_scanvi.metrics import expected_calibration_error, label_scores, within_type_leak
from tests.examples import TYPES, simulated

# ---- scores -------------------------------------------------------------------------------------


def calibration_error_by_loop(correct, confidence, n_bins):
    """Guo et al. (2017), eq. 3, bin by bin; bins are open below and closed above."""
    total = 0.0
    for b in range(n_bins):
        inside = (confidence > b / n_bins) & (confidence <= (b + 1) / n_bins)
        if inside.any():
            total += inside.sum() * abs(correct[inside].mean() - confidence[inside].mean())
    return total / len(correct)


# Two bins. Below 0.5: one cell, right at 0.3, gap 0.7. Above: two of three are right at a mean
# confidence of 2.3 / 3, gap 0.1. Together (0.7 + 3 * 0.1) / 4.
BY_HAND = {
    "two bins": ([1, 0, 1, 1], [0.9, 0.8, 0.3, 0.6], 2, 0.25),
    "perfect: sure and right": ([1, 1, 1], [1.0, 1.0, 1.0], 15, 0.0),
    "perfect: three of four at 3/4": ([1, 1, 1, 0], [0.75] * 4, 15, 0.0),
    "worst: sure and wrong": ([0, 0], [1.0, 1.0], 15, 1.0),
    "worst: doubtful and right": ([1, 1], [0.0, 0.0], 15, 1.0),
    "gaps of two bins do not cancel": ([1, 0], [0.2, 0.8], 2, 0.8),
    "gaps within a bin cancel": ([1, 0], [0.7, 0.7], 1, 0.2),
    "a border belongs to the bin below": ([0, 1], [0.5, 0.6], 2, 0.45),
}


@pytest.mark.parametrize(
    ("correct", "confidence", "n_bins", "expected"), BY_HAND.values(), ids=BY_HAND
)
@pytest.mark.parametrize("dtype", [bool, float])
def test_calibration_error_by_hand(correct, confidence, n_bins, expected, dtype):
    found = expected_calibration_error(np.array(correct, dtype), np.array(confidence), n_bins)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_calibration_error_against_a_loop(n_bins):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=500)
    correct = rng.uniform(size=500) < confidence**2
    found = expected_calibration_error(correct, confidence, n_bins)
    assert found == pytest.approx(calibration_error_by_loop(correct, confidence, n_bins))
    order = rng.permutation(500)
    assert expected_calibration_error(correct[order], confidence[order], n_bins) == pytest.approx(
        found
    )


def one_hot(predicted: list[int], n: int = 4) -> np.ndarray:
    return np.eye(n)[predicted]


# Label, prediction, accuracy, macro-F1.
SCORES = {
    # F1 of class 0 is 2/3, of class 1 1/2, of class 2 0.
    "by hand": ([0, 0, 1, 2], [0, 1, 1, 1], 0.5, 7 / 18),
    "all right": ([0, 1, 2, 3], [0, 1, 2, 3], 1.0, 1.0),
    "all wrong": ([0, 1], [1, 0], 0.0, 0.0),
    # Class 3 does not occur: it is no class with F1 0.
    "a class that does not occur": ([0, 0], [0, 3], 0.5, 2 / 3),
}


@pytest.mark.parametrize(
    ("label", "predicted", "accuracy", "macro_f1"), SCORES.values(), ids=SCORES
)
def test_label_scores_by_hand(label, predicted, accuracy, macro_f1):
    scores = label_scores(np.array(label), one_hot(predicted))
    assert list(scores) == ["accuracy", "macro_f1", "calibration_error"]
    assert scores["accuracy"] == pytest.approx(accuracy)
    assert scores["macro_f1"] == pytest.approx(macro_f1)
    assert scores["calibration_error"] == pytest.approx(1 - accuracy)  # each is sure


@pytest.mark.parametrize("n_labels", [2, 5, 30])
def test_label_scores_against_scikit_learn(n_labels):
    rng = np.random.default_rng(n_labels)
    label = rng.integers(n_labels, size=200)
    probabilities = rng.dirichlet(np.ones(n_labels), size=200).astype(np.float32)
    predicted = probabilities.argmax(1)
    scores = label_scores(label, probabilities)
    assert scores["accuracy"] == pytest.approx(accuracy_score(label, predicted))
    assert scores["macro_f1"] == pytest.approx(f1_score(label, predicted, average="macro"))
    assert scores["calibration_error"] == pytest.approx(
        calibration_error_by_loop(predicted == label, probabilities.max(1), 15), abs=1e-6
    )


# ---- baselines ----------------------------------------------------------------------------------


class Spy(LogisticRegression):
    """Logistic regression that remembers what it is fitted to and asked about.

    What comes out of it is not compared with a fit of our own: its solver stops early, where it
    stops hangs on how the processor rounds, and probabilities then differ in the third decimal.
    """

    def fit(self, features, labels):
        self.fitted_to, self.fitted_labels = features.copy(), labels.copy()
        return super().fit(features, labels)

    def predict_proba(self, features):
        self.asked_about, self.answer = features.copy(), super().predict_proba(features)
        return self.answer


@pytest.fixture
def spies(monkeypatch) -> list[Spy]:
    """Every logistic regression that the baselines make, in order."""
    made = []

    def make(**settings) -> Spy:
        made.append(Spy(**settings))
        return made[-1]

    monkeypatch.setattr(baselines, "LogisticRegression", make)
    return made


def test_baselines_see_the_labels_of_the_labelled_alone(spies):
    adata = simulated(n=60)
    labels, labelled = adata.obs["truth"].to_numpy(), np.arange(60) % 5 < 2
    counts = adata.X.copy()
    found = baseline_probabilities(adata, labels, labelled)
    blind = baseline_probabilities(adata, np.where(labelled, labels, "?"), labelled)
    assert list(found) == list(blind) == ["logistic regression", "majority class"]

    exact = counts.astype(float)
    scaled = np.log1p(exact / exact.sum(axis=1, keepdims=True) * 1e4)
    assert len(spies) == 2
    for spy in spies:
        np.testing.assert_array_equal(spy.fitted_labels, labels[labelled])
        np.testing.assert_allclose(spy.fitted_to, scaled[labelled], rtol=1e-5)  # float32
        np.testing.assert_allclose(spy.asked_about, scaled[~labelled], rtol=1e-5)
    for probabilities, spy in zip((found, blind), spies, strict=True):
        assert probabilities["logistic regression"] is spy.answer

    shares = np.unique(labels[labelled], return_counts=True)[1] / labelled.sum()
    for probabilities in (found, blind):
        np.testing.assert_allclose(probabilities["majority class"], np.tile(shares, (36, 1)))
    np.testing.assert_array_equal(adata.X, counts)


def test_logistic_regression_knows_clear_types():
    """Chance is 1/3; the classes are in sorted order."""
    adata = simulated(n=60)
    labels, labelled = adata.obs["truth"].to_numpy(), np.arange(60) % 5 < 2
    found = baseline_probabilities(adata, labels, labelled)["logistic regression"]
    assert (np.array(TYPES)[found.argmax(axis=1)] == labels[~labelled]).mean() > 0.9


def leak_by_pairs(latent, given, k):
    """By its definition, pair by pair."""
    distance = np.linalg.norm(latent[:, None] - latent[None], axis=-1)

    def count(cell, left_out):
        order = [c for c in distance[cell].argsort() if c not in (cell, left_out)]
        return given[order[:k]].sum()

    wins = [
        (a > b) + 0.5 * (a == b)
        for i in np.flatnonzero(given)
        for j in np.flatnonzero(~given)
        for a, b in [(count(i, j), count(j, i))]
    ]
    return np.mean(wins)


@pytest.mark.parametrize(("n", "n_given", "k"), [(30, 10, 5), (40, 3, 10), (12, 9, 3), (4, 2, 10)])
def test_leak_is_what_its_pairs_say(n, n_given, k):
    rng = np.random.default_rng(n)
    latent, given = rng.normal(size=(n, 3)), np.arange(n) < n_given
    latent[given] += 0.5
    found = within_type_leak(latent, np.full(n, "B"), given, n_neighbors=k)
    assert found["B"] == pytest.approx(leak_by_pairs(latent, given, min(k, n - 2)))


def test_leak_of_random_labels_is_a_half():
    """Mean of 400 choices, 5 standard errors: a false alarm comes once in 1.7 million seeds.

    Clusters and few labels, so that most counts are equal.
    """
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(60, 2)) + 10 * rng.integers(0, 3, (60, 1))
    types = np.full(60, "B")
    leaks = [within_type_leak(latent, types, rng.permutation(60) < 6)["B"] for _ in range(400)]
    assert abs(np.mean(leaks) - 0.5) < 5 * np.std(leaks) / 20


def test_leak_leaves_out_types_that_cannot_tell():
    types = np.array(["one label"] * 5 + ["all"] * 5 + ["some"] * 5)
    labelled = np.array([1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], bool)
    assert list(within_type_leak(np.arange(15.0)[:, None], types, labelled).index) == ["some"]
