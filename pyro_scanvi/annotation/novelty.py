r"""How far a cell lies from the labelled cells: is it of a type that has no label?

The score is the Mahalanobis distance in latent space to the nearest label,

.. math:: d(z) = \min_y\, (z - m_y)^\top \Sigma^{-1} (z - m_y),

with the mean of the labelled cells of y and a covariance within labels that all of them share
(Lee et al. 2018, NeurIPS, eq. 2), shrunk towards a multiple of I (Ledoit & Wolf 2004). A cell is
told to be new if it lies farther than all but a stated share of labelled cells, each of whose
distances is to means and a covariance that were found without it.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import KFold

N_FOLDS = 10


@dataclass(frozen=True)
class Novelty:
    """The score, and that of labelled cells that were left out in turn.

    Attributes
    ----------
    mean
        Of each label, (L, K).
    precision
        Inverse covariance within labels, (K, K).
    held_out
        Scores of labelled cells, (n,).
    """

    mean: np.ndarray
    precision: np.ndarray
    held_out: np.ndarray

    @classmethod
    def fit(cls, latent: np.ndarray, label: np.ndarray, seed: int = 0) -> "Novelty":
        """From labelled cells: states (n, K) and codes, each label with a cell, (n,)."""
        held_out = np.empty(len(latent))
        folds = KFold(min(N_FOLDS, len(latent)), shuffle=True, random_state=seed)
        for rest, fold in folds.split(latent):
            held_out[fold] = _distance(latent[fold], *_moments(latent[rest], label[rest]))
        return cls(*_moments(latent, label), held_out)

    def score(self, latent: np.ndarray) -> np.ndarray:
        """d, (N,), of states (N, K)."""
        return _distance(latent, self.mean, self.precision)

    def rank(self, latent: np.ndarray) -> np.ndarray:
        """1 - p, (N,): p is the share of labelled cells, and of the cell, that lie as far or more.

        Of cells like the labelled ones a share of a at most has p <= a, for every a that is a
        multiple of 1 / (n + 1) (Bates et al. 2023, Ann Stat 51:149: conformal p-values).
        """
        n = len(self.held_out)
        nearer = np.searchsorted(np.sort(self.held_out), self.score(latent), side="left")
        return 1 - (1 + n - nearer) / (n + 1)


def _moments(latent: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the labels that occur, and the precision within them."""
    codes, inverse, count = np.unique(label, return_inverse=True, return_counts=True)
    mean = np.zeros((len(codes), latent.shape[1]))
    np.add.at(mean, inverse, latent)
    mean /= count[:, None]
    within = LedoitWolf(assume_centered=True).fit(latent - mean[inverse])
    # Each mean has taken one cell's worth of the spread.
    free = max(len(label) - len(codes), 1) / len(label)
    return mean, free * within.precision_


def _distance(latent: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance to the nearest mean, (N,)."""
    scaled = latent @ precision
    of_cells, of_means = (scaled * latent).sum(1), (mean @ precision * mean).sum(1)
    return (of_cells[:, None] - 2 * scaled @ mean.T + of_means).min(1)
