"""Scores of predicted label probabilities: scikit-learn's, and the calibration error it lacks."""

import numpy as np
from sklearn.metrics import accuracy_score, f1_score


def expected_calibration_error(
    correct: np.ndarray, confidence: np.ndarray, n_bins: int = 15
) -> float:
    r"""Mean gap of confidence and accuracy over bins of equal width, weighted by their cells.

    .. math:: \sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|

    Guo et al. (2017), ICML, eq. 3.

    Parameters
    ----------
    correct
        Whether each prediction is right, (N,).
    confidence
        Probability of the predicted label, (N,).
    n_bins
        Number of bins on [0, 1].

    Examples
    --------
    Half of them are right, and the model was sure of each:

    >>> expected_calibration_error(np.array([1.0, 0.0]), np.array([1.0, 1.0]))
    0.5
    """
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(correct))


def label_scores(label: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 over the classes that occur, and expected calibration error.

    Parameters
    ----------
    label
        True codes, (N,).
    probabilities
        Of each label, (N, L).

    Examples
    --------
    >>> probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    >>> label_scores(np.array([0, 1, 0, 0]), probabilities)["accuracy"]
    0.75
    """
    predicted = probabilities.argmax(1)
    correct = (predicted == label).astype(float)
    return {
        "accuracy": float(accuracy_score(label, predicted)),
        "macro_f1": float(
            f1_score(label, predicted, labels=np.unique(label), average="macro", zero_division=0)
        ),
        "calibration_error": expected_calibration_error(correct, probabilities.max(1)),
    }
