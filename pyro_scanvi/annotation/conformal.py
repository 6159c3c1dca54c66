r"""Sets of labels that hold the true one as often as they promise.

Held-out cells i with known labels :math:`y_i` give scores :math:`s_i = 1 - p(y_i \mid x_i)`. A set
holds each label y whose score :math:`1 - p(y \mid x)` is at most a threshold (Sadinle et al. 2019,
JASA 114:223):

- by type, the :math:`\lceil (n_y + 1) c \rceil`-th smallest of the :math:`n_y` scores of label y:
  of the cells of each type a share of c at least has its label in the set. It needs
  :math:`n_y \ge c / (1 - c)` cells, nine for c = .9; a label that has fewer is in every set.
- over all cells, the c-quantile of all scores, where cell i counts
  :math:`w_i = \pi_{y_i} / f_{y_i}`: the share of its label among the cells that are asked about, by
  its share among the held-out ones (Podkopaev & Ramdas 2021, UAI, eq. 9). Labels are given ten a
  type, and cells do not come so.

Both hold whatever the model is, as far as the held-out cells of a type are like the others.
"""

import numpy as np

ROUNDING = 1e-6  # of probabilities in float32, and of a sum of weights


def thresholds_by_label(
    score: np.ndarray, label: np.ndarray, n_labels: int, coverage: float
) -> np.ndarray:
    """The largest score that a set takes in, for each label, (L,).

    Parameters
    ----------
    score
        1 - the probability of the true label of held-out cells, (n,).
    label
        Their true codes, (n,).
    n_labels
        L.
    coverage
        The share c of cells whose true label is in their set.

    Examples
    --------
    Nine cells are enough for nine in ten, and then the worst counts:

    >>> score = np.arange(1, 10) / 10
    >>> thresholds_by_label(score, np.zeros(9, dtype=int), 2, 0.9)
    array([0.9, inf])
    """
    found = [quantile(score[label == code], coverage) for code in range(n_labels)]
    return np.array(found)


def thresholds_overall(
    score: np.ndarray, label: np.ndarray, shares: np.ndarray, coverage: float
) -> np.ndarray:
    """The same where the cells of all types together are to be covered, (L,).

    Parameters
    ----------
    score, label, coverage
        As of :func:`thresholds_by_label`.
    shares
        Of each label among the cells that are asked about, (L,).

    Examples
    --------
    With the shares of the held-out cells it is one quantile of all of them:

    >>> score = np.arange(1, 20) / 20
    >>> label = np.arange(19) % 2
    >>> thresholds_overall(score, label, np.array([10, 9]) / 19, 0.9)
    array([0.9, 0.9])
    """
    held_out = np.bincount(label, minlength=len(shares))
    weight = np.divide(shares, held_out, out=np.zeros(len(shares)), where=held_out > 0)
    # A new cell that had the label would count too, with a score that nobody knows; nothing is
    # known of a label that no held-out cell has.
    own = np.where(held_out > 0, weight, np.inf)
    return np.array([quantile(score, coverage, weight[label], more) for more in own])


def quantile(
    score: np.ndarray, coverage: float, weight: np.ndarray | None = None, more: float = 1.0
) -> float:
    """Smallest score that a share of `coverage` of the weight lies at or under.

    Parameters
    ----------
    score
        (n,).
    coverage
        The share.
    weight
        Of each score, (n,); None is 1.
    more
        Weight of one more cell, whose score may be as large as it likes.

    Returns
    -------
    float
        Infinite where the scores that are known are too few.
    """
    weight = np.ones(len(score)) if weight is None else weight
    order = np.argsort(score)
    under = np.cumsum(weight[order])
    total = (under[-1] if len(under) else 0.0) + more
    enough = under >= coverage * total * (1 - ROUNDING)
    return float(score[order][enough.argmax()]) if enough.any() else np.inf


def label_sets(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Which labels are in the set of each cell, (N, L), booleans; the most probable one always is.

    Examples
    --------
    >>> p = np.array([[0.9, 0.1], [0.55, 0.45]])
    >>> label_sets(p, np.array([0.6, 0.6])).tolist()
    [[True, False], [True, True]]
    """
    within = 1 - probabilities <= thresholds + ROUNDING
    within[np.arange(len(within)), probabilities.argmax(1)] = True
    return within
