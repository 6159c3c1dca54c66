"""Posterior predictive checks: what is seen of the cells beside what the model would draw of them.

For each draw of the guide the observed sites of the model are drawn anew, for all cells, and a
statistic of what was drawn is compared with that of the data. A model that fits gives numbers that
lie among those of its draws. The states were inferred from the very cells, so the p values lie
closer to 1/2 than uniform ones would (Gelman, Meng & Stern 1996, Stat Sinica 6:733): a small one
says that something is off, a large number of middling ones says little.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from rich.progress import track
from torch import Tensor

from pyro_scanvi.data.minibatches import CellData, Cells, ordered_loader
from pyro_scanvi.model.pyro_internals import Site, elements
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.names import name_of
from pyro_scanvi.posterior.draws import (
    Draws,
    evaluating,
    minibatch_size,
    observed_sites,
    passes,
    seeded,
)
from pyro_scanvi.posterior.trained import Trained
from pyro_scanvi.validation import InputError, check_at_least, check_known, plain_arguments

ALL = "all"
LEVELS = (0.5, 0.9)  # of central intervals whose coverage is counted
QUANTILES = (0.05, 0.5, 0.95)  # of totals


@dataclass(frozen=True)
class PredictiveChecks:
    """Statistics of the data, and of draws from p(x' | x).

    Attributes
    ----------
    features
        One row for each site, group of cells, statistic ("zeros", the share of them, "mean",
        "variance") and feature (a gene of "x", a column of another site).
    totals
        The same of the total of a cell over the features of a site: its mean, standard deviation
        ("sd") and quantiles over cells. Where the model reads the library from the counts its mean
        fits by construction.
    coverage
        For each site, group, feature and level: the share of cells whose value lies in the central
        predictive interval of that level, ties broken at random. Of cells whose states were not
        inferred from that very value it would be the level; here it is somewhat more.

    `features` and `totals` have `observed`, the `mean`, `sd` and the interval `low` to `high` of
    the draws, `p`, the share of draws above the observed value (ties count half), and `z`, how
    many standard deviations of the draws it lies above their mean (NaN where they do not vary).
    """

    features: pd.DataFrame
    totals: pd.DataFrame
    coverage: pd.DataFrame

    def plot_zeros(self, site: str = "x", group: str = ALL, ax: Axes | None = None) -> Axes:
        """Share of zeros of each feature: what is drawn, with its interval, by what is observed."""
        rows = _chosen(self.features, site=site, group=group, statistic="zeros")
        return _plot_against(rows, "share of zeros", ax or plt.gca())

    def plot_mean_variance(self, site: str = "x", group: str = ALL, ax: Axes | None = None) -> Axes:
        """Variance of each feature by its mean, observed and drawn, on logarithmic axes."""
        ax = ax or plt.gca()
        mean, variance = (
            _chosen(self.features, site=site, group=group, statistic=s).set_index("feature")
            for s in ("mean", "variance")
        )
        ax.plot(mean["observed"], variance["observed"], "o", ms=3, color="black", label="observed")
        ax.plot(mean["mean"], variance["mean"], "o", ms=3, color="C0", alpha=0.6, label="drawn")
        ax.set(xscale="log", yscale="log", xlabel="mean", ylabel="variance")
        ax.legend(frameon=False)
        return ax

    def plot_totals(self, site: str = "x", ax: Axes | None = None) -> Axes:
        """Statistics of the totals of cells: what is drawn by what is observed, all groups."""
        rows = _chosen(self.totals, site=site)
        return _plot_against(rows, "total of a cell, statistics", ax or plt.gca())

    def plot_p_values(
        self, statistic: str = "zeros", site: str = "x", group: str = ALL, ax: Axes | None = None
    ) -> Axes:
        """Histogram of the p values of features."""
        ax = ax or plt.gca()
        rows = _chosen(self.features, site=site, group=group, statistic=statistic)
        ax.hist(rows["p"], [i / 20 for i in range(21)], color="C0")
        ax.set(xlabel=f"p value of {statistic}", ylabel="features")
        return ax


@plain_arguments
def posterior_predictive_checks(
    model: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    by: str | None = None,
    n_draws: int = 50,
    interval: float = 0.9,
    batch_size: int | None = None,
    seed: int | None = None,
    progress_bar: bool = True,
) -> PredictiveChecks:
    """Compare what is seen of cells with draws from the model, given the states of these cells.

    Memory grows with draws x groups x features and draws x cells, not with cells x features.

    Parameters
    ----------
    model
        A trained :class:`~pyro_scanvi.SCANVI`.
    adata, indices, batch_size
        As in :meth:`~pyro_scanvi.SCANVI.predict`.
    by
        Column of ``obs`` with groups of cells, such as types or batches, which are checked beside
        all cells together; cells without a value are in none.
    n_draws
        Draws for each cell.
    interval
        Probability of the interval of draws, between 0 and 1.
    seed
        Of the draws; None draws on from torch's generator.
    progress_bar
        Whether to show one.

    Returns
    -------
    PredictiveChecks

    Raises
    ------
    InputError
        For cells that do not fit the model, no such column, or sizes that are none.
    """
    check_at_least(1, n_draws=n_draws)
    if not 0 < interval < 1:
        raise InputError(f"interval={interval!r}, expected a probability between 0 and 1")
    data, names = model.encoded(adata, indices)
    groups = _groups(model.adata if adata is None else adata, names, by)
    with seeded(seed):
        counted = _count(model.module, data, groups, n_draws, batch_size, progress_bar)
    found = [c.tables(site, groups, interval, model.fields.genes) for site, c in counted.items()]
    features, totals, coverage = (
        pd.concat(tables, ignore_index=True) for tables in zip(*found, strict=True)
    )
    return PredictiveChecks(features, totals, coverage)


@dataclass
class _Sums:
    """Of one set of values, or several: over cells, by group and feature, (S, groups, F) each."""

    n: Tensor
    zeros: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, n_draws: int, n_groups: int, n_features: int, like: Tensor) -> "_Sums":
        shape = n_draws, n_groups, n_features
        empty = (like.new_zeros(shape, dtype=torch.float64) for _ in range(4))
        return cls(*empty)

    def add(self, draws: slice, member: Tensor, value: Tensor, counts: Tensor) -> None:
        """Values (S, N, F) of cells that are members of groups, (groups, N), where they count."""
        value, counts = value.double(), counts.double()
        self.n[draws] += member @ counts
        self.zeros[draws] += member @ (counts * (value == 0))
        self.total[draws] += member @ (counts * value)
        self.squares[draws] += member @ (counts * value.square())

    def statistics(self) -> dict[str, np.ndarray]:
        """(S, groups, F) each; NaN of groups without a value."""
        mean = self.total / self.n
        variance = (self.squares - self.n * mean.square()) / (self.n - 1)
        named = {"zeros": self.zeros / self.n, "mean": mean, "variance": variance.clamp(min=0)}
        return {name: value.cpu().numpy() for name, value in named.items()}


@dataclass
class _Counted:
    """What is kept of one site while cells pass by."""

    observed: _Sums
    drawn: _Sums
    covered: Tensor  # levels, groups, F
    totals: list[np.ndarray] = field(default_factory=list)  # 1 + S, N

    @classmethod
    def of(cls, n_draws: int, n_groups: int, value: Tensor) -> "_Counted":
        n_features = value.reshape(len(value), -1).shape[-1]
        observed, drawn = (_Sums.of(s, n_groups, n_features, value) for s in (1, n_draws))
        shape = len(LEVELS), n_groups, n_features
        return cls(observed, drawn, value.new_zeros(shape, dtype=torch.float64))

    def tables(
        self, site: str, groups: dict[str, np.ndarray], interval: float, genes: Iterable[str]
    ) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """Features, totals and coverage."""
        features = self._features(site, genes)
        seen, drawn = self.observed.statistics(), self.drawn.statistics()
        rows = [
            _compared(seen[s][0, g], drawn[s][:, g], interval).assign(
                site=site, group=group, statistic=s, feature=features
            )
            for s in seen
            for g, group in enumerate(groups)
        ]
        share = (self.covered / self.observed.n[0]).cpu().numpy()
        covered = [
            pd.DataFrame({"site": site, "group": g, "feature": features, "level": v, "coverage": c})
            for v, by_group in zip(LEVELS, share, strict=True)
            for g, c in zip(groups, by_group, strict=True)
        ]
        named = ["site", "group", "statistic", "feature"]
        table = pd.concat(rows, ignore_index=True)
        return _ordered(table, named), self._of_totals(site, groups, interval), pd.concat(covered)

    def _of_totals(self, site: str, groups: dict[str, np.ndarray], interval: float) -> pd.DataFrame:
        totals = np.concatenate(self.totals, axis=1)  # 1 + S, N
        rows = []
        for group, member in groups.items():
            found = _total_statistics(totals[:, member])
            row = _compared(found[0], found[1:], interval)
            rows.append(row.assign(site=site, group=group, statistic=TOTALS))
        return _ordered(pd.concat(rows, ignore_index=True), ["site", "group", "statistic"])

    def _features(self, site: str, genes: Iterable[str]) -> list[str]:
        names, n = [*genes], self.covered.shape[-1]
        return names if site == "x" and n == len(names) else [str(i) for i in range(n)]


TOTALS = ["mean", "sd", *(f"quantile {q:g}" for q in QUANTILES)]


def _total_statistics(totals: np.ndarray) -> np.ndarray:
    """Over cells, (S, statistics); cells that were not measured are NaN."""
    if not totals.shape[1] or np.isnan(totals).all():
        return np.full((len(totals), len(TOTALS)), np.nan)
    quantiles = np.nanquantile(totals, QUANTILES, axis=1).T
    return np.column_stack([np.nanmean(totals, 1), np.nanstd(totals, 1), quantiles])


def _count(
    vae: SCANVAE,
    data: CellData,
    groups: dict[str, np.ndarray],
    n_draws: int,
    batch_size: int | None,
    progress_bar: bool,
) -> dict[str, _Counted]:
    """Of each observed site, over all cells."""
    member = torch.from_numpy(np.stack(list(groups.values()))).double()
    counted: dict[str, _Counted] = {}
    loader, start = ordered_loader(data, minibatch_size(batch_size)), 0
    with evaluating(vae, data):
        for cells in track(loader, "drawing", disable=not progress_bar):
            cells = cells.to(vae.y_prior.device)
            here = member[:, start : start + len(cells)].to(cells.x.device)
            _count_cells(vae, cells, here, n_draws, counted)
            start += len(cells)
    return counted


def _count_cells(
    vae: SCANVAE, cells: Cells, member: Tensor, n_draws: int, counted: dict[str, _Counted]
) -> None:
    """Of one minibatch."""
    below: dict[str, Tensor] = {}
    ties: dict[str, Tensor] = {}
    totals: dict[str, list[Tensor]] = {}
    for draws, sites in _passes(vae, cells, n_draws):
        for name, site in sites.items():
            value, drawn, counts = _values(site, draws.stop - draws.start, len(cells))
            if name not in counted:
                counted[name] = _Counted.of(n_draws, len(member), value)
            counted[name].drawn.add(draws, member, drawn, counts)
            below[name] = below.get(name, 0) + (drawn < value).sum(0)
            ties[name] = ties.get(name, 0) + (drawn == value).sum(0)
            if draws.start == 0:
                counted[name].observed.add(slice(0, 1), member, value[None], counts[:1])
                totals[name] = [_totals(value[None], counts[:1])]
            totals[name].append(_totals(drawn, counts))
            if draws.stop == n_draws:
                _cover(counted[name].covered, below[name], ties[name], n_draws, member, counts[0])
    for name, parts in totals.items():
        counted[name].totals.append(torch.cat(parts).cpu().numpy())


def _passes(vae: SCANVAE, cells: Cells, n_draws: int) -> Iterator[tuple[slice, dict[str, Site]]]:
    start = 0
    for n in passes(n_draws, cells.x.numel()):
        yield slice(start, start + n), observed_sites(Draws(vae, cells, n).replay())
        start += n


def _values(site: Site, n: int, n_cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Observed (N, F), drawn (n, N, F), and where they count, (n, N, F)."""
    p, value = site["fn"], site["value"]
    shape = p.shape()
    value = value.expand(shape[1:]).reshape(n_cells, -1)
    counts = torch.ones((), dtype=torch.bool, device=value.device)
    for mask in (elements(p)[1], _over_events(site)):
        counts = counts if mask is None else counts & mask
    counts = counts.expand(shape).reshape(n, n_cells, -1)
    return value, p.sample().expand(shape).reshape(n, n_cells, -1), counts


def _over_events(site: Site) -> Tensor | None:
    """The mask of a handler, with a dimension for each of an event."""
    if site["mask"] is None:
        return None
    mask = torch.as_tensor(site["mask"])
    return mask.reshape(*mask.shape, *[1] * site["fn"].event_dim)


def _totals(value: Tensor, counts: Tensor) -> Tensor:
    """Over features, (S, N); NaN where no feature counts."""
    total = (value.double() * counts).sum(-1)
    return torch.where(counts.any(-1), total, torch.nan)


def _cover(
    covered: Tensor, below: Tensor, ties: Tensor, n_draws: int, member: Tensor, counts: Tensor
) -> None:
    """Count the cells whose value lies in central intervals, by its rank among the draws."""
    rank = below + (torch.rand_like(below, dtype=torch.float64) * (ties + 1)).floor()
    place = (rank + torch.rand_like(rank)) / (n_draws + 1)  # uniform on [0, 1]
    for i, level in enumerate(LEVELS):
        covered[i] += member @ (((place - 0.5).abs() <= level / 2) & counts).double()


def _compared(observed: np.ndarray, drawn: np.ndarray, interval: float) -> pd.DataFrame:
    """A row for each entry; `drawn` is (S, entries)."""
    low, high = np.quantile(drawn, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
    mean, sd = drawn.mean(0), drawn.std(0, ddof=1) if len(drawn) > 1 else 0 * observed
    varies = sd > 1e-9 * np.abs(mean)
    z = np.where(varies, (observed - mean) / np.where(varies, sd, 1), np.nan)
    p = (drawn > observed).mean(0) + (drawn == observed).mean(0) / 2
    columns = {"observed": observed, "mean": mean, "sd": sd, "low": low, "high": high}
    return pd.DataFrame({**columns, "p": np.where(np.isnan(observed), np.nan, p), "z": z})


def _ordered(table: pd.DataFrame, first: list[str]) -> pd.DataFrame:
    return table[[*first, *(c for c in table.columns if c not in first)]]


def _groups(adata: ad.AnnData, names: pd.Index, by: str | None) -> dict[str, np.ndarray]:
    """Members of each group, (N,) each; all cells are the first."""
    groups = {ALL: np.ones(len(names), dtype=bool)}
    if by is None:
        return groups
    check_known([by], adata.obs.columns, "a column of obs", InputError)
    column = adata.obs[by].loc[names].astype("category").cat.remove_unused_categories().cat
    for code, value in enumerate(column.categories):
        groups[name_of(value)] = (column.codes == code).to_numpy()
    return groups


def _chosen(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    for column, value in values.items():
        check_known([value], table[column].unique(), f"a {column} of these checks", InputError)
        table = table[table[column] == value]
    return table


def _plot_against(rows: pd.DataFrame, what: str, ax: Axes) -> Axes:
    """What is drawn, with its interval, by what is observed, beside the diagonal."""
    error = np.abs(rows[["low", "high"]].to_numpy().T - rows["mean"].to_numpy())
    style = {"fmt": "o", "ms": 3, "lw": 0.8, "color": "C0"}
    ax.errorbar(rows["observed"], rows["mean"], error, **style)  # type: ignore[arg-type]
    ax.axline((0, 0), slope=1, color="grey", lw=0.8)
    ax.set(xlabel=f"{what}, observed", ylabel="drawn")
    return ax
