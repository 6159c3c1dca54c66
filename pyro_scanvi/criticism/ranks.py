r"""Ranks of the truth among draws, and whether they are uniform.

If data and truth are drawn from a model, and S draws from its posterior, the rank of the truth
among them is uniform on 0, ..., S (Talts et al. 2018, arXiv 1804.06788, theorem 1). The test is
that of Säilynoja et al. (2022), Stat Comput 32:32: of n ranks, the number below k is
:math:`\mathrm{Bin}(n, k / (S + 1))`; the smallest two-sided p value over all k is compared with
that of uniform ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import binom
from torch import Tensor

from pyro_scanvi.criticism.optional import arviz_base
from pyro_scanvi.names import nearest
from pyro_scanvi.validation import InputError

MOST_POINTS = 100  # at which the ECDF is looked at
NULL_SEED = 0
NULLS_PER_ALARM = (
    20  # simulations of uniform ranks for each unit of 1 / (false alarm of a quantity)
)
FEWEST_NULLS = 2000
COLUMNS = ["site", "quantity"]


@dataclass(frozen=True)
class Calibration:
    """Ranks of what was drawn among draws of its posterior.

    Attributes
    ----------
    ranks
        One row for each simulation and quantity: simulation, site, quantity, rank. The rank is the
        number of draws below the truth, 0 to `n_draws`; ties are broken at random.
    n_draws
        Number S of draws.
    effective
        Effective number of proposals, or of draws of a chain, of each simulation; None where draws
        are independent. Where it is near 1 the draws are mostly the truth, and nothing is tested.
    """

    ranks: pd.DataFrame
    n_draws: int
    effective: pd.Series | None = None

    def test(self, false_alarm: float = 0.01) -> pd.DataFrame:
        """Whether the ranks of each quantity are uniform.

        Parameters
        ----------
        false_alarm
            Probability that any quantity fails though all are calibrated (Bonferroni).

        Returns
        -------
        DataFrame
            A row for each quantity: site, quantity, p, fails, and the mean of the rank divided by
            S, which is 1/2, with its z value: a bias; `spread`, the variance of the rank divided
            by that of uniform ones: below 1 the posterior is too wide, above 1 too narrow.

        Raises
        ------
        InputError
            For a probability that is none.
        """
        if not 0 < false_alarm < 1:
            raise InputError(f"false_alarm={false_alarm!r}, expected a probability")
        groups = list(self.ranks.groupby(COLUMNS, sort=False)["rank"])
        level = false_alarm / len(groups)
        rows = [self._row(ranks.to_numpy(), level) for _, ranks in groups]
        names = pd.DataFrame([name for name, _ in groups], columns=COLUMNS)
        return names.join(pd.DataFrame(rows))

    def passes(self, false_alarm: float = 0.01) -> bool:
        """Whether no quantity fails; see :meth:`test`."""
        return not self.test(false_alarm)["fails"].any()

    def plot(self, site: str | None = None, false_alarm: float = 0.01) -> np.ndarray:
        """Rank histogram and ECDF difference of each quantity, a row each.

        Parameters
        ----------
        site
            Of which the quantities are shown; None is all.
        false_alarm
            Of the bands, for all quantities of the calibration together.

        Returns
        -------
        array of Axes
            (quantities, 2).
        """
        names = self.ranks[COLUMNS].drop_duplicates()
        names = names if site is None else names[names["site"] == site]
        if names.empty:
            raise self._unknown(site)
        shape = len(names), 2
        _, axes = plt.subplots(*shape, figsize=(8, 2.2 * shape[0]), squeeze=False)
        for (left, right), (of, quantity) in zip(axes, names.to_numpy(), strict=True):
            self.plot_ranks(of, quantity, ax=left, false_alarm=false_alarm)
            self.plot_ecdf(of, quantity, ax=right, false_alarm=false_alarm)
        axes[0, 0].figure.tight_layout()
        return axes

    def plot_ranks(
        self,
        site: str,
        quantity: str,
        n_bins: int = 20,
        ax: Axes | None = None,
        false_alarm: float = 0.01,
    ) -> Axes:
        """Histogram of the ranks of a quantity, with the band of uniform ones for each bar."""
        ranks, ax = self._of(site, quantity), ax or plt.gca()
        edges = np.linspace(0, self.n_draws + 1, min(n_bins, self.n_draws + 1) + 1).round()
        share = np.diff(edges) / (self.n_draws + 1)
        level = false_alarm / len(share) / self._n_quantities
        low, high = binom.ppf([[level / 2], [1 - level / 2]], len(ranks), share)
        ax.stairs(high, edges, baseline=low, fill=True, color="lightgrey", label="uniform")
        ax.stairs(np.histogram(ranks, edges - 0.5)[0], edges, color="C0", label="ranks")
        ax.set(xlabel=f"rank of {quantity} of {site}", ylabel="simulations")
        return ax

    def plot_ecdf(
        self, site: str, quantity: str, ax: Axes | None = None, false_alarm: float = 0.01
    ) -> Axes:
        """ECDF of the ranks less that of uniform ones, with the simultaneous band of the test."""
        ranks, ax = self._of(site, quantity), ax or plt.gca()
        points = _points(self.n_draws)
        level = false_alarm / self._n_quantities
        low, high = band(len(ranks), self.n_draws, level)
        share = points / (self.n_draws + 1)
        ax.fill_between(share, low - share, high - share, color="lightgrey", label="uniform")
        ax.plot(share, _below(ranks, points) / len(ranks) - share, color="C0", label="ranks")
        ax.set(xlabel=f"rank of {quantity} of {site} / (S + 1)", ylabel="ECDF difference")
        return ax

    def to_datatree(self, seed: int = 0) -> Any:
        """Group ``prior_sbc`` for ``arviz_plots.plot_ecdf_pit``.

        It holds (rank + v) / (S + 1) of each quantity, where v is uniform: a number that is
        uniform on [0, 1] if the ranks are.

        Raises
        ------
        ImportError
            Without ArviZ.
        """
        rng = np.random.default_rng(seed)
        pit = {
            " ".join(name): (ranks.to_numpy() + rng.random(len(ranks)))[None] / (self.n_draws + 1)
            for name, ranks in self.ranks.groupby(COLUMNS, sort=False)["rank"]
        }
        return arviz_base().from_dict({"prior_sbc": pit})

    @property
    def _n_quantities(self) -> int:
        return len(self.ranks[COLUMNS].drop_duplicates())

    def _of(self, site: str, quantity: str) -> np.ndarray:
        chosen = (self.ranks["site"] == site) & (self.ranks["quantity"] == quantity)
        if not chosen.any():
            raise self._unknown(f"{site} {quantity}")
        return self.ranks.loc[chosen, "rank"].to_numpy()

    def _unknown(self, name: str | None) -> InputError:
        known = [" ".join(row) for row in self.ranks[COLUMNS].drop_duplicates().to_numpy()]
        return InputError(f"there are no ranks of {name!r}; {nearest(name, known, str(known))}")

    def _row(self, ranks: np.ndarray, level: float) -> dict[str, Any]:
        p = p_value(ranks, self.n_draws, level)
        levels = self.n_draws + 1
        variance = (levels**2 - 1) / 12
        centred = ranks - self.n_draws / 2
        return {
            "p": p,
            "fails": p <= level,
            "mean": ranks.mean() / self.n_draws,
            "z": centred.mean() / np.sqrt(variance / len(ranks)),
            "spread": (centred**2).mean() / variance,
        }


def p_value(ranks: np.ndarray, n_draws: int, smallest: float = 0.01) -> float:
    """Of uniformity, by the smallest p value over the ECDF, as simulated under uniformity.

    Parameters
    ----------
    ranks
        (n,), 0 to `n_draws`.
    n_draws
        Number S of draws.
    smallest
        The smallest p value that has to be told from 0; it takes 20 / `smallest` simulations.

    Examples
    --------
    >>> p_value(np.arange(100) % 10, n_draws=9) > 0.5, p_value(np.arange(100) % 5, n_draws=9)
    (True, 0.0004997501249375312)
    """
    points = _points(n_draws)
    table = _pointwise(len(ranks), n_draws)
    found = table[_below(ranks, points), np.arange(len(points))].min()
    null = _null(len(ranks), n_draws, _n_nulls(smallest))
    return float((1 + (null <= found * (1 + 1e-9)).sum()) / (1 + len(null)))


def band(n: int, n_draws: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """ECDF of n uniform ranks, lowest and highest at each point, left with probability `level`."""
    null = np.sort(_null(n, n_draws, _n_nulls(level)))
    pointwise = null[max(int(level * len(null)) - 1, 0)]
    inside = _pointwise(n, n_draws) > pointwise
    low = inside.argmax(0)
    high = n - inside[::-1].argmax(0)
    return low / n, high / n


def ranks_of(truth: Tensor, draws: Tensor, same: Tensor, uniform: Tensor) -> Tensor:
    """Number of draws below the truth, ties broken by a uniform number of its own, (N, ...).

    Parameters
    ----------
    truth, draws
        (N, ...) and (S, N, ...).
    same
        Whether a draw is the truth itself, (S, N), whatever rounding makes of its quantities.
    uniform
        On [0, 1), (N, ...).
    """
    same = same.reshape(*same.shape, *[1] * (draws.ndim - same.ndim))
    below = ((draws < truth) & ~same).sum(0)
    ties = ((draws == truth) | same).sum(0)
    return below + (uniform * (ties + 1)).floor().long().clamp(max=ties)


def tidy(ranks: Mapping[tuple[str, str], np.ndarray]) -> pd.DataFrame:
    """One row for each simulation and quantity."""
    parts = [
        pd.DataFrame({"simulation": np.arange(len(r)), "site": s, "quantity": q, "rank": r})
        for (s, q), r in ranks.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _n_nulls(smallest: float) -> int:
    return max(FEWEST_NULLS, int(NULLS_PER_ALARM / smallest))


def _points(n_draws: int) -> np.ndarray:
    """Ranks k at which the number of ranks below k is looked at."""
    n = min(n_draws, MOST_POINTS)
    return np.unique(np.linspace(1, n_draws, n).round().astype(int))


def _below(ranks: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(ranks), points)


@lru_cache(maxsize=8)
def _pointwise(n: int, n_draws: int) -> np.ndarray:
    """Two-sided p value of each number of ranks below each point, (n + 1, points)."""
    share = _points(n_draws) / (n_draws + 1)
    count = np.arange(n + 1)[:, None]
    tails = np.minimum(binom.cdf(count, n, share), binom.sf(count - 1, n, share))
    return np.minimum(2 * tails, 1)


@lru_cache(maxsize=8)
def _null(n: int, n_draws: int, n_nulls: int) -> np.ndarray:
    """The smallest p value over points of n uniform ranks, simulated."""
    rng = np.random.default_rng(NULL_SEED)
    points, table = _points(n_draws), _pointwise(n, n_draws)
    shares = np.diff(np.concatenate([[0], points, [n_draws + 1]])) / (n_draws + 1)
    found, at_once = [], max(1, 2**22 // len(shares))
    for start in range(0, n_nulls, at_once):
        size = min(at_once, n_nulls - start)
        below = rng.multinomial(n, shares, size=size).cumsum(1)[:, :-1]
        found.append(table[below, np.arange(len(points))].min(1))
    return np.concatenate(found)
