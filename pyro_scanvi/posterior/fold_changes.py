r"""Fold changes between draws of two groups of cells: arrays in, a table of genes out.

A draw of a group is the expression rho of one of its cells, decoded at a sample of q(z | x). Draw
i of group 1 is paired with draw i of group 2. The log fold change of a gene between the two is

.. math:: r = \log_2(\rho_1 + c) - \log_2(\rho_2 + c)

with a pseudocount c. Mode "change" asks how often r lies beyond delta (Boyeau et al. (2019),
bioRxiv 794289), mode "vanilla" how often rho_1 exceeds rho_2 (Lopez et al. (2018), Nat Methods
15:1053).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.mixture import GaussianMixture

from pyro_scanvi.data.minibatches import CELLS_AT_ONCE
from pyro_scanvi.posterior.comparisons import Comparison
from pyro_scanvi.validation import InputError, check_known, is_number, make_plain

SMALLEST_PROBABILITY = 1e-8  # keeps Bayes factors finite; they end at 18.4
RAW_TOTAL = 1e4  # counts that a cell is scaled to for raw_normalized_mean
UNEXPRESSED_MEAN = 0.01  # a gene of fewer counts a cell is not expressed in a group
UNEXPRESSED_QUANTILE = 0.9
SMALLEST_PSEUDOCOUNT = 1e-10
REPORTED_SHARE = 1e-3  # of the pseudocount, in the fold changes that are reported
DELTA_SHARE, SMALLEST_DELTA = 0.6, 0.1
GENES_AT_ONCE = 256

# From P(r >= delta) and P(r <= -delta) to the probability of differential expression.
TEST_MODES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "three": np.maximum,
    "two": lambda up, down: np.minimum(up + down, 1),
}


@dataclass(frozen=True)
class Settings:
    """What a comparison computes; see :meth:`pyro_scanvi.SCANVI.differential_expression`."""

    mode: str = "change"
    delta: float | None = 0.25
    pseudocounts: float | None = None
    test_mode: str = "three"
    fdr_target: float = 0.05
    all_stats: bool = True

    def __post_init__(self):
        make_plain(self)
        check_known([self.mode], MODES, "a mode", InputError)
        check_known([self.test_mode], TEST_MODES, "a test_mode", InputError)
        if not (is_number(self.fdr_target) and 0 < self.fdr_target < 1):
            raise InputError(f"fdr_target={self.fdr_target!r}, expected a share in (0, 1)")
        if self.delta is not None and not (is_number(self.delta) and 0 <= self.delta < np.inf):
            raise InputError(f"delta={self.delta!r}, expected a log2 fold change of at least 0")
        c = self.pseudocounts
        if c is not None and not (is_number(c) and 0 < c < np.inf):
            raise InputError(f"pseudocounts={c!r}, expected a positive number")


@dataclass(frozen=True)
class RawStatistics:
    """Of the counts of a group: mean, share of cells with a count, mean per 10,000; (G,) each."""

    mean: np.ndarray
    non_zeros: np.ndarray
    normalized_mean: np.ndarray


@dataclass(frozen=True)
class Group:
    """One side of a comparison: draws of expression, (S, G), and what its counts say."""

    rho: np.ndarray
    raw: RawStatistics


def compare(
    comparison: Comparison,
    draws: tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]],
    counts: csr_matrix | np.ndarray,
    genes: np.ndarray,
    settings: Settings,
) -> pd.DataFrame:
    """Test every gene between two groups.

    Parameters
    ----------
    comparison
        The cells of both.
    draws
        For each group, from positions of cells to draws of their expression, (S, G), in the order
        in which they are paired.
    counts
        Raw counts of all cells, (N, G), sparse or dense.
    genes
        Names of the genes.
    settings
        What to compute.

    Returns
    -------
    DataFrame
        One row a gene, the surest first.
    """
    sides = zip((comparison.cells1, comparison.cells2), draws, strict=True)
    one, two = (Group(draw(cells), raw_statistics(counts, cells)) for cells, draw in sides)
    mode = MODES[settings.mode]
    table = pd.DataFrame(mode.statistics(one, two, settings), index=genes)
    if settings.all_stats:
        table = table.assign(**_raw_columns(one, two))
    table = table.sort_values(mode.sorted_by, ascending=False, key=np.abs, kind="stable")
    if mode.calls_genes:
        calls = expected_fdr_calls(table["proba_de"].to_numpy(), settings.fdr_target)
        table[f"is_de_fdr_{settings.fdr_target}"] = calls
    return table.assign(**comparison.columns())


def change(group1: Group, group2: Group, settings: Settings) -> dict[str, np.ndarray]:
    r"""How probable is a log fold change beyond delta?

    .. math::

        p_{de} = \max\{P(r \ge \delta),\ P(r \le -\delta)\}
        \quad\text{or}\quad p_{de} = P(|r| \ge \delta)

    for ``test_mode`` "three" and "two". The Bayes factor is their log odds, in nats.
    """
    c = settings.pseudocounts or estimated_pseudocounts(group1, group2)
    delta = estimated_delta(group1, group2, c) if settings.delta is None else settings.delta
    lfc = _by_genes(group1.rho, group2.rho, lambda a, b: _changes(a, b, delta, c))
    proba_de = TEST_MODES[settings.test_mode](lfc.pop("up"), lfc.pop("down"))
    return {
        "proba_de": proba_de,
        "proba_not_de": 1 - proba_de,
        **_odds_and_scales(proba_de, group1, group2),
        "pseudocounts": np.full(len(proba_de), c),
        "delta": np.full(len(proba_de), delta, dtype=float),
    } | lfc


def vanilla(group1: Group, group2: Group, settings: Settings) -> dict[str, np.ndarray]:
    """How probable is it that expression is higher in group 1? The Bayes factor is the log odds."""
    proba_m1 = (group1.rho > group2.rho).mean(0)
    return {
        "proba_m1": proba_m1,
        "proba_m2": 1 - proba_m1,
        **_odds_and_scales(proba_m1, group1, group2),
    }


@dataclass(frozen=True)
class Mode:
    """A test, the columns that its table is sorted by, and whether it calls genes."""

    statistics: Callable[[Group, Group, Settings], dict[str, np.ndarray]]
    sorted_by: list[str]
    calls_genes: bool


MODES = {
    # Many genes may be sure; then the larger change comes first.
    "change": Mode(change, ["proba_de", "lfc_mean"], calls_genes=True),
    "vanilla": Mode(vanilla, ["proba_m1"], calls_genes=False),
}


def bayes_factor(probability: np.ndarray) -> np.ndarray:
    """Log odds in nats, kept within about 18.4 of zero."""
    p = probability + SMALLEST_PROBABILITY
    return np.log(p) - np.log(1 - probability + SMALLEST_PROBABILITY)


def expected_fdr_calls(proba_de: np.ndarray, fdr_target: float) -> np.ndarray:
    r"""The most genes whose expected share of false calls is at most `fdr_target`, as a mask.

    .. math:: \frac{1}{d} \sum_{i \le d} (1 - p_{(i)}) \le \alpha

    for the d largest probabilities. Boyeau et al. (2019).
    """
    surest_first = np.argsort(-proba_de, kind="stable")
    expected = np.cumsum(1 - proba_de[surest_first]) / np.arange(1, len(proba_de) + 1)
    calls = np.zeros(len(proba_de), dtype=bool)
    calls[surest_first[: (expected <= fdr_target).sum()]] = True
    return calls


def estimated_pseudocounts(group1: Group, group2: Group) -> float:
    """A pseudocount from the genes that a group does not express, as scvi-tools 1.4.2 does.

    Of each such gene take the largest draw, of these the 0.9 quantile, of both groups the larger,
    and divide by the number of genes.
    """
    noise = max(map(_noise, (group1, group2)))
    return max(noise / group1.rho.shape[1], SMALLEST_PSEUDOCOUNT)


def _noise(group: Group) -> float:
    unexpressed = group.raw.mean < UNEXPRESSED_MEAN
    if not unexpressed.any():
        return 0.0
    return float(np.quantile(group.rho[:, unexpressed].max(0), UNEXPRESSED_QUANTILE))


def estimated_delta(group1: Group, group2: Group, pseudocounts: float) -> float:
    """A threshold from three normal components of the genes' mean log fold changes.

    0.6 times the mean distance of the outer two from zero, and at least 0.1; scvi-tools' rule.
    """
    n_genes = group1.rho.shape[1]
    if n_genes < 3:
        raise InputError(f"delta=None needs 3 genes or more to estimate it, got {n_genes}")

    def means(rho1: np.ndarray, rho2: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": log_fold_change(rho1, rho2, pseudocounts).mean(1)}

    lfc = _by_genes(group1.rho, group2.rho, means)["mean"]
    mixture = GaussianMixture(3, random_state=0).fit(lfc[:, None])
    outer = np.sort(mixture.means_.ravel())[[0, -1]]
    return max(DELTA_SHARE * float(np.abs(outer).mean()), SMALLEST_DELTA)


def log_fold_change(rho1: np.ndarray, rho2: np.ndarray, pseudocounts: float) -> np.ndarray:
    """r of each pair of draws."""
    return np.log2(rho1 + pseudocounts) - np.log2(rho2 + pseudocounts)


def raw_statistics(counts: csr_matrix | np.ndarray, cells: np.ndarray) -> RawStatistics:
    """Statistics of the counts of the cells at positions `cells`, some thousand cells at once."""
    sums = np.zeros((3, counts.shape[1]))
    for rows in np.array_split(cells, -(-len(cells) // CELLS_AT_ONCE)):
        x = counts[rows].astype(float)  # a sum of a sparse matrix is taken in its own type
        scale = RAW_TOTAL / np.asarray(x.sum(1)).ravel()
        more = x.sum(0), (x != 0).sum(0), x.T @ scale
        sums += np.stack([np.asarray(values).ravel() for values in more])
    return RawStatistics(*sums / len(cells))


def _changes(
    rho1: np.ndarray, rho2: np.ndarray, delta: float, pseudocounts: float
) -> dict[str, np.ndarray]:
    tested = log_fold_change(rho1, rho2, pseudocounts)
    shown = log_fold_change(rho1, rho2, REPORTED_SHARE * pseudocounts)
    return {
        "up": (tested >= delta).mean(1),
        "down": (tested <= -delta).mean(1),
        "lfc_mean": shown.mean(1),
        "lfc_median": np.median(shown, axis=1),
        "lfc_std": shown.std(1),
        "lfc_min": shown.min(1),
        "lfc_max": shown.max(1),
    }


def _by_genes(rho1: np.ndarray, rho2: np.ndarray, ask: Callable) -> dict[str, np.ndarray]:
    """What `ask` answers for some genes at once, (genes, S), joined."""
    answers = [ask(*block) for block in _blocks(rho1, rho2)]
    return {name: np.concatenate([a[name] for a in answers]) for name in answers[0]}


def _blocks(*draws: np.ndarray) -> Iterator[list[np.ndarray]]:
    for start in range(0, draws[0].shape[1], GENES_AT_ONCE):
        genes = slice(start, start + GENES_AT_ONCE)
        yield [np.ascontiguousarray(rho[:, genes].T, dtype=float) for rho in draws]


def _odds_and_scales(
    probability: np.ndarray, group1: Group, group2: Group
) -> dict[str, np.ndarray]:
    return {
        "bayes_factor": bayes_factor(probability),
        "scale1": group1.rho.mean(0, dtype=float),
        "scale2": group2.rho.mean(0, dtype=float),
    }


def _raw_columns(group1: Group, group2: Group) -> dict[str, np.ndarray]:
    one, two = group1.raw, group2.raw
    return {
        "raw_mean1": one.mean,
        "raw_mean2": two.mean,
        "non_zeros_proportion1": one.non_zeros,
        "non_zeros_proportion2": two.non_zeros,
        "raw_normalized_mean1": one.normalized_mean,
        "raw_normalized_mean2": two.normalized_mean,
    }
