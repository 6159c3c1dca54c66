"""Scores of label probabilities and of a latent space, where scikit-learn has none."""

import numpy as np
import pandas as pd
from scipy.stats import binomtest, rankdata
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import NearestNeighbors

N_BINS = 15


def confidence_bins(confidence: np.ndarray, n_bins: int = N_BINS) -> np.ndarray:
    """Which of so many bins of equal width on [0, 1] each is in, from 0; ends belong below, (N,).

    Examples
    --------
    >>> confidence_bins(np.array([0.0, 0.5, 0.51, 1.0]), n_bins=2)
    array([0, 0, 1, 1])
    """
    return np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)


def expected_calibration_error(
    correct: np.ndarray, confidence: np.ndarray, n_bins: int = N_BINS
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
    bins = confidence_bins(confidence, n_bins)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(correct))


def reliability(correct: np.ndarray, confidence: np.ndarray) -> pd.DataFrame:
    """Are answers as often right as they say? By the bins of the expected calibration error.

    Parameters
    ----------
    correct
        Whether each answer is right, (n,).
    confidence
        Its probability, (n,).

    Returns
    -------
    DataFrame
        A row for each bin with cells: ``cells``; mean ``confidence``; share that is ``right``, and
        the ends of its 95 % interval (Wilson), ``low`` and ``high``.

    Examples
    --------
    >>> reliability(np.array([True, False]), np.array([0.9, 0.9]))[["cells", "right"]]
       cells  right
    0      2    0.5
    """
    bins = confidence_bins(confidence)
    rows = []
    for code in np.unique(bins):
        chosen = bins == code
        right = int(correct[chosen].sum())
        spread = binomtest(right, int(chosen.sum())).proportion_ci(method="wilson")
        rows.append((chosen.sum(), confidence[chosen].mean(), correct[chosen].mean(), *spread))
    return pd.DataFrame(rows, columns=["cells", "confidence", "right", "low", "high"])


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


def within_type_leak(
    latent: np.ndarray, types: np.ndarray, labelled: np.ndarray, n_neighbors: int = 10
) -> pd.Series:
    r"""How well a latent space tells which cells of a type were labelled: do they lie on islands?

    .. math:: \mathrm{leak}_t = P(s_i > s_j) + \tfrac{1}{2} P(s_i = s_j)

    for a labelled cell i and an unlabelled cell j of type t, where s is the number of labelled
    cells among the `n_neighbors` nearest of that type, i and j themselves left out. If labels were
    given at random, it is .5 in expectation, whatever the latent space; 1 if every labelled cell
    lies nearer to labelled ones than any unlabelled cell does.

    Parameters
    ----------
    latent
        Cells by dimensions, (N, K).
    types
        True type of each cell, (N,): labels that were hidden too.
    labelled
        Whether its label was given in training, (N,).
    n_neighbors
        Fewer in a type that has not so many cells.

    Returns
    -------
    pandas.Series
        The leak of each type. Types without two labelled cells and an unlabelled one are left out.

    Examples
    --------
    The labelled half lies apart:

    >>> latent = np.r_[np.arange(5.0), 100 + np.arange(5.0)][:, None]
    >>> within_type_leak(latent, np.array(["B"] * 10), np.arange(10) < 5, n_neighbors=2)
    B    1.0
    Name: leak, dtype: float64
    """
    types, labelled = np.asarray(types).astype(str), np.asarray(labelled, dtype=bool)
    found = {}
    for name in np.unique(types):
        of_type = types == name
        given = labelled[of_type]
        if given.sum() >= 2 and not given.all():
            found[name] = _leak(np.asarray(latent)[of_type], given, n_neighbors)
    return pd.Series(found, name="leak", dtype=float)


def _leak(latent: np.ndarray, given: np.ndarray, n_neighbors: int) -> float:
    """That of the cells of one type."""
    k = min(n_neighbors, len(given) - 2)
    near = NearestNeighbors(n_neighbors=k + 1).fit(latent).kneighbors(return_distance=False)
    count = given[near[:, :k]].sum(1)
    # All pairs as if nobody left anybody out ...
    n_given = given.sum()
    above = rankdata(count)[given].sum() - n_given * (n_given + 1) / 2
    # ... then those that are neighbours, of which one leaves out the other and takes the next.
    cell, place = np.nonzero(given[:, None] != given[near[:, :k]])
    pairs = np.c_[cell, near[cell, place]]
    pairs = np.unique(np.where(given[cell][:, None], pairs, pairs[:, ::-1]), axis=0)
    one, other = pairs[:, 0], pairs[:, 1]
    next_given = given[near[:, k]].astype(int)
    of_one = count[one] + next_given[one] * _beside(near[one, :k], other)
    of_other = count[other] + (next_given[other] - 1) * _beside(near[other, :k], one)
    above += (_wins(of_one, of_other) - _wins(count[one], count[other])).sum()
    return float(above / (n_given * (len(given) - n_given)))


def _beside(near: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Whether each cell is among the neighbours of its row."""
    return (near == cell[:, None]).any(1)


def _wins(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where one is larger, a half where they are equal."""
    return (one > other) + 0.5 * (one == other)
