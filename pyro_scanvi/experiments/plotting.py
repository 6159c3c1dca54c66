"""Points with intervals, the picture of all experiments."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pyro_scanvi.names import listed
from pyro_scanvi.validation import InputError

SPREAD = 0.6  # of the colours of one row


def points(
    table: pd.DataFrame,
    rows: str = "setting",
    colour: str | None = None,
    value: str = "mean",
    ax: Axes | None = None,
) -> Axes:
    """A row for each setting: its mean as a point, its interval as a line.

    Parameters
    ----------
    table
        Of :func:`~.intervals.summary`, or of :func:`~.intervals.against` with
        ``value="difference"``.
    rows, colour
        Columns: what stands on the vertical axis, and what has a colour of its own.
    value
        Column of the points.
    ax
        Axes to draw on; None makes some.
    """
    axis = plt.subplots()[1] if ax is None else ax
    names = list(dict.fromkeys(table[rows]))
    groups = [(None, table)] if colour is None else list(table.groupby(colour, sort=False))
    shifts = np.linspace(-SPREAD / 2, SPREAD / 2, len(groups)) if len(groups) > 1 else [0.0]
    for (group, members), shift in zip(groups, shifts, strict=True):
        height = members[rows].map(names.index) + shift
        ends = [members[value] - members["low"], members["high"] - members[value]]
        ends = np.nan_to_num(np.maximum(np.array(ends, dtype=float), 0))
        axis.errorbar(members[value], height, xerr=ends, fmt="o", capsize=2, label=group)
    axis.set_yticks(range(len(names)), labels=names)
    axis.invert_yaxis()
    if colour is not None:
        axis.legend(title=colour, frameon=False)
    return axis


def of_metric(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of one metric; InputError if there are none."""
    found = frame[frame["metric"] == metric]
    if not len(found):
        known = listed(dict.fromkeys(frame["metric"]))
        raise InputError(f"metric={metric!r}, the table has {known}")
    return found
