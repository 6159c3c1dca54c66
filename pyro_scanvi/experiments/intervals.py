"""Tidy tables of measurements, summed up with intervals, and compared in pairs.

A table has one row for each measurement: ``seed``, ``setting``, ``metric``, ``value``, and what
else tells rows apart, such as ``part`` or ``cell``. What repeats a measurement is its unit, mostly
the seed: values are averaged within a unit first, and the interval is over units.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from pyro_scanvi.names import listed
from pyro_scanvi.validation import InputError, check_known, check_seed

COLUMNS = ("seed", "setting", "metric", "value")
N_RESAMPLES = 2000
Interval = Callable[[np.ndarray, float], tuple[float, float]]


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    r"""Student's interval of a mean, :math:`\bar x \pm t_{n-1} s / \sqrt n`; NaN for one value.

    Examples
    --------
    >>> low, high = t_interval(np.array([1.0, 2.0, 3.0]))
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    if len(values) < 2:
        return np.nan, np.nan
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentiles of the means of 2,000 resamples; NaN for one value.

    For many values that are not Normal, such as squared norms; of five it is too narrow.
    """
    if len(values) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(N_RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summary(
    frame: pd.DataFrame,
    by: Sequence[str] = ("setting", "metric"),
    unit: str = "seed",
    interval: Interval = t_interval,
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean and interval of each group of rows.

    Parameters
    ----------
    frame
        A tidy table.
    by
        Columns that tell groups apart, in the order of the rows.
    unit
        Column whose values are independent repeats.
    interval
        :func:`t_interval`, :func:`bootstrap_interval`, or one's own of values and level.
    level
        Of the interval.

    Returns
    -------
    DataFrame
        `by`, ``n`` (units), ``mean``, ``low``, ``high``. Values that are missing are left out.

    Raises
    ------
    InputError
        If the table lacks a column, or the level is no share.

    Examples
    --------
    >>> frame = tidy([{"seed": s, "setting": "a", "metric": "m", "value": s} for s in (1, 2, 3)])
    >>> summary(frame).round(3)
      setting metric  n  mean    low   high
    0       a      m  3   2.0 -0.484  4.484
    """
    _check(frame, (*by, unit, "value"), level)
    of_units = frame.groupby([*by, unit], sort=False, observed=True)["value"].mean().dropna()
    rows = []
    for group, values in of_units.groupby(list(by), sort=False):
        low, high = interval(values.to_numpy(), level)
        names = dict(zip(by, group, strict=True))
        rows.append(names | {"n": len(values), "mean": values.mean(), "low": low, "high": high})
    return pd.DataFrame(rows, columns=[*by, "n", "mean", "low", "high"])


def against(
    frame: pd.DataFrame,
    baseline: str,
    by: Sequence[str] = ("metric",),
    unit: str = "seed",
    interval: Interval = t_interval,
    level: float = 0.95,
) -> pd.DataFrame:
    """Differences of each setting from a baseline, in pairs of one seed.

    What seeds share, such as which labels are hidden, cancels in them.

    Parameters
    ----------
    frame
        A tidy table.
    baseline
        The setting that is subtracted.
    by
        Further columns that tell groups apart.
    unit, interval, level
        As in :func:`summary`.

    Returns
    -------
    DataFrame
        ``setting``, `by`, ``n`` (pairs), ``difference`` (mean), ``low``, ``high``.

    Raises
    ------
    InputError
        If there is no such setting, or a setting has seeds that the baseline has not, or lacks
        some: differences would not be in pairs.

    Examples
    --------
    >>> rows = [("a", 1, 1.0), ("b", 1, 3.0), ("a", 2, 5.0), ("b", 2, 7.5), ("b", 3, 9.0)]
    >>> names = ("setting", "seed", "value")
    >>> frame = tidy([dict(zip(names, row)) | {"metric": "m"} for row in rows])
    >>> against(frame[frame["seed"] < 3], "a")[["setting", "n", "difference"]]
      setting  n  difference
    0       b  2        2.25
    """
    _check(frame, ("setting", *by, unit, "value"), level)
    check_known([baseline], frame["setting"].unique(), "a setting of the table", InputError)
    wide = frame.pivot_table("value", [*by, unit], "setting", sort=False, observed=True)
    others, columns = wide.columns.drop(baseline), ["setting", *by]
    rows = []
    for setting in others:
        _check_paired(wide[[setting, baseline]], by, unit)
        differences = (wide[setting] - wide[baseline]).rename("value").reset_index()
        differences["setting"] = setting
        rows.append(summary(differences, columns, unit, interval, level))
    found = pd.concat(rows) if rows else pd.DataFrame(columns=[*columns, "n", "mean"])
    return found.rename(columns={"mean": "difference"}).reset_index(drop=True)


def tidy(rows: Sequence[dict]) -> pd.DataFrame:
    """A table of rows, the common columns first and the value last."""
    frame = pd.DataFrame(rows)
    others = [c for c in frame if c not in COLUMNS]
    return frame[["seed", "setting", *others, "metric", "value"]]


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Refuse seeds that are none, or come twice."""
    seeds = [int(s) if isinstance(s, np.integer) else s for s in seeds]
    for seed in seeds:
        check_seed(seed)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={seeds}, expected one or more, each once, such as range(5)")
    return seeds


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table of :func:`summary` or :func:`against` as lines of Markdown.

    Examples
    --------
    >>> print(markdown(pd.DataFrame({"setting": ["a"], "mean": [0.12345]})))
    | setting | mean |
    |---|---|
    | a | 0.123 |
    """

    def shown(entry: object) -> str:
        return f"{entry:.{digits}g}" if isinstance(entry, float) else str(entry)

    lines = [list(table.columns), *table.itertuples(index=False)]
    rows = ["| " + " | ".join(map(shown, line)) + " |" for line in lines]
    rows.insert(1, "|" + "---|" * table.shape[1])
    return "\n".join(rows)


def _check(frame: pd.DataFrame, columns: Sequence[str], level: float) -> None:
    missing = [c for c in columns if c not in frame]
    if missing:
        raise InputError(f"the table has no column {listed(missing)}, only {listed(frame)}")
    if not 0 < level < 1:
        raise InputError(f"level={level!r}, expected a share between 0 and 1, such as 0.95")


def _check_paired(pairs: pd.DataFrame, by: Sequence[str], unit: str) -> None:
    """A metric that one of the two does not have at all has no differences, and is left out."""
    known = pairs.notna()
    shared = known.groupby(list(by), sort=False).transform("any").all(axis=1)
    alone = pairs.index[shared & ~known.all(axis=1)]
    if len(alone):
        setting, baseline = pairs.columns
        raise InputError(
            f"{setting!r} and {baseline!r} do not share {unit} "
            f"{listed(dict.fromkeys(alone.get_level_values(unit)))}; compare settings over the "
            "same ones"
        )
