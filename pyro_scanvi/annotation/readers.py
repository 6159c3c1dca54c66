r"""Linear rules from features to labels, as strong as held-out labels tell.

.. math:: \log p(y \mid f) = w_y^\top f + b_y - \log \sum_k \exp(w_k^\top f + b_k)

by logistic regression with a penalty :math:`\lVert w \rVert^2 / 2C`. C is that of the smallest
cross-entropy over folds, in which a labelled cell is read by a rule that did not see its label.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

STRENGTHS = tuple(10.0**power for power in (-3, -2, -1, -0.5, 0, 1, 2))  # of C
N_FOLDS = 5  # ten take twice as long and are no better
SMALLEST = 1e-9  # probability of a label that the cells of a fold lack
MOST_STEPS = 1000  # of the solver


@dataclass(frozen=True)
class Reader:
    """A linear rule.

    Attributes
    ----------
    weight, bias
        (L, D) and (L,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Log probability of each label, (N, L), from features (N, D), in whose type it reads."""
        found = features @ self.weight.T.astype(features.dtype, copy=False)
        return log_softmax(found + self.bias, axis=1)


def fit_reader(
    features: np.ndarray, label: np.ndarray, seed: int = 0, strengths: Sequence[float] = STRENGTHS
) -> tuple[Reader, np.ndarray]:
    """A rule from labelled cells, and what such rules say of cells that they did not see.

    Parameters
    ----------
    features
        Of the labelled cells, (n, D).
    label
        Their codes, 0 to L - 1, each at least once and one of them twice, (n,).
    seed
        Of the folds.
    strengths
        C to choose from.

    Returns
    -------
    tuple
        The rule, and log probabilities of the labelled cells by the rules of their folds, (n, L).
        Of the only cell of a label they are those of rules that do not know the label.
    """
    # All rules lie in the span of the cells: a rotation into it changes neither them nor their
    # penalty, and makes them as small as the number of cells.
    _, size, basis = np.linalg.svd(features, full_matrices=False)
    basis = basis[size > size[0] * np.finfo(features.dtype).eps]
    inside = features @ basis.T
    held_out = _held_out(inside, label, strengths, seed)
    best = min(held_out, key=lambda C: cross_entropy(held_out[C], label))
    _, rule = next(_path(inside, label, [best]))
    weight, bias = _rule(rule)
    return Reader(weight @ basis, bias), held_out[best]


def cross_entropy(log_probabilities: np.ndarray, label: np.ndarray) -> float:
    """Mean over cells, without those that alone have their label; nats."""
    shared = in_company(label)
    return float(-log_probabilities[np.arange(len(label)), label][shared].mean())


def in_company(label: np.ndarray) -> np.ndarray:
    """Whether another cell has the same label, (n,); all where no cell does."""
    shared = np.bincount(label)[label] > 1
    return shared if shared.any() else ~shared


def _held_out(
    features: np.ndarray, label: np.ndarray, strengths: Sequence[float], seed: int
) -> dict[float, np.ndarray]:
    """What the rules of the other folds say of each cell, log (n, L), for each C."""
    soft = {C: np.full((len(label), label.max() + 1), SMALLEST) for C in strengths}
    n_folds = min(N_FOLDS, np.bincount(label).max())
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    with _quickly():
        for rest, fold in folds.split(features, label):
            for C, rule in _path(features[rest], label[rest], strengths):
                # The cells of a fold may lack a label.
                soft[C][np.ix_(fold, rule.classes_)] = rule.predict_proba(features[fold])
    return {C: np.log(np.maximum(found, SMALLEST)) for C, found in soft.items()}


def _path(
    features: np.ndarray, label: np.ndarray, strengths: Sequence[float]
) -> Iterator[tuple[float, LogisticRegression]]:
    """The rule of each C in turn, which starts from the one before: quicker than from zero."""
    rule = LogisticRegression(solver="newton-cg", max_iter=MOST_STEPS, warm_start=True)
    for C in strengths:
        yield C, rule.set_params(C=C).fit(features, label)


@contextmanager
def _quickly() -> Iterator[None]:
    """Without scikit-learn's checks of its input, and its word on labels of few cells."""
    checks = {"assume_finite": True, "skip_parameter_validation": True}
    with warnings.catch_warnings(), config_context(**checks):
        warnings.filterwarnings("ignore", message="The least populated class")
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield


def _rule(fitted: LogisticRegression) -> tuple[np.ndarray, np.ndarray]:
    """A row for each label, of two labels too."""
    weight, bias = fitted.coef_, fitted.intercept_
    if len(bias) > 1:
        return weight, bias
    return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
