"""Pictures of labelled cells: each function draws into the axes that it is given, and returns them.

As scanpy's with ``show=False``: with ``ax=`` no figure is made, without it pyplot makes one, and
nothing is shown or saved. Names may be of any type, such as a column of ``obs``.
"""

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from scanpy.plotting.palettes import default_20, default_102
from sklearn.metrics import confusion_matrix
from sklearn.utils import check_consistent_length

from pyro_scanvi import metrics
from pyro_scanvi.names import names_of
from pyro_scanvi.validation import InputError, check_known

UNKNOWN_COLOUR = "lightgrey"
ROWS = 20  # of a legend, which then has more columns
MOST_NUMBERS = 25  # labels of a confusion matrix whose cells are counted in the picture
TITLES = {  # of curves
    "elbo": "ELBO, nats per cell",
    "cross_entropy": "cross-entropy, nats per labelled cell",
    "accuracy": "accuracy of the classifier on labelled cells",
}


def confidence(types: Iterable, confidence: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """How sure the answers are, by predicted type: median, quartiles, and what lies far out.

    Parameters
    ----------
    types
        Predicted label of each cell, (N,): ``adata.obs["scanvi_prediction"]``.
    confidence
        Its probability, (N,): ``adata.obs["scanvi_confidence"]``.
    ax
        Axes to draw on; None makes some.
    """
    names, values = _names(types), np.asarray(confidence)
    check_consistent_length(names, values)
    axis, known = _axes(ax), np.unique(names)
    chosen = [values[names == name] for name in known]
    labels = [f"{name} ({len(v)})" for name, v in zip(known, chosen, strict=True)]
    axis.boxplot(chosen, orientation="horizontal", tick_labels=labels, flierprops={"marker": "."})
    axis.set(xlabel="confidence", xlim=(-0.02, 1.02))
    axis.invert_yaxis()
    return axis


def reliability(correct: ArrayLike, confidence: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Share of right answers by confidence, with 95 % intervals, above or below the diagonal.

    Points are the rows of :func:`~pyro_scanvi.metrics.reliability`.

    Parameters
    ----------
    correct
        Whether each answer is right, (n,), of cells whose label the model has not seen.
    confidence
        Its probability, (n,).
    ax
        Axes to draw on; None makes some.
    """
    check_consistent_length(correct, confidence)
    axis = _axes(ax)
    bins = metrics.reliability(np.asarray(correct), np.asarray(confidence))
    axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    spread = np.abs(bins[["low", "high"]].to_numpy().T - bins["right"].to_numpy())
    axis.errorbar(bins["confidence"], bins["right"], spread, marker="o", linestyle="", capsize=3)
    axis.set(xlabel="mean confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    return axis


def confusion(truth: Iterable, predicted: Iterable, *, ax: Axes | None = None) -> Axes:
    """Cells by their label (rows) and by what they are taken for (columns).

    Colours are shares of a row. Of 25 labels or fewer the cells are counted in the picture.

    Parameters
    ----------
    truth, predicted
        Label of each cell, and what it is taken for, (n,).
    ax
        Axes to draw on; None makes some.
    """
    rows, columns = _names(truth), _names(predicted)
    check_consistent_length(rows, columns)
    axis = _axes(ax)
    known = np.unique(np.concatenate([rows, columns]))
    counts = confusion_matrix(rows, columns, labels=known)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.figure.colorbar(drawn, ax=axis, shrink=0.7, label="share of the cells of a label")
    axis.set_xticks(range(len(known)), known, rotation=90)
    axis.set_yticks(range(len(known)), known)
    axis.set(xlabel="taken for", ylabel="label")
    if len(known) <= MOST_NUMBERS:
        for i, j in np.argwhere(counts):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axis.text(j, i, counts[i, j], ha="center", va="center", color=colour, fontsize=8)
    return axis


def history(history: pd.DataFrame, column: str = "elbo", *, ax: Axes | None = None) -> Axes:
    """A column of the history of training by epoch, a curve for each split.

    Parameters
    ----------
    history
        ``model.history``.
    column
        Which: "elbo", "cross_entropy", "accuracy", "kl_z", ...
    ax
        Axes to draw on; None makes some.

    Raises
    ------
    InputError
        If there is no such column, or no epoch has been trained.
    """
    if not len(history):
        raise InputError("the history is empty, so there is no curve; call model.train() first")
    scores = [name for name in history.columns if name not in ("epoch", "split")]
    check_known([column], scores, "a column of the history", InputError)
    axis = _axes(ax)
    for name, rows in history.dropna(subset=[column]).groupby("split"):
        axis.plot(rows["epoch"] + 1, rows[column], label=name)
    axis.set(xlabel="epoch", title=TITLES.get(column, column))
    axis.legend()
    return axis


def leak(leak: pd.Series, *, ax: Axes | None = None) -> Axes:
    """Whether labelled cells lie on islands, by type: about .5 where they lie among their kind.

    Parameters
    ----------
    leak
        Of each type, from :func:`~pyro_scanvi.metrics.within_type_leak`.
    ax
        Axes to draw on; None makes some.
    """
    axis = _axes(ax)
    axis.barh(names_of(leak.index), leak, color="C0")
    axis.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    axis.set(xlabel="leak of labels (1: they lie on islands)", xlim=(0, 1))
    axis.invert_yaxis()
    return axis


def composition(
    types: Iterable,
    batch: Iterable,
    *,
    colours: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Shares of the types in each batch, a bar for each, and its number of cells.

    Parameters
    ----------
    types, batch
        Of each cell, (N,).
    colours
        Of each type by name; None chooses them.
    ax
        Axes to draw on; None makes some.
    """
    names, batches = _names(types), _names(batch)
    check_consistent_length(names, batches)
    axis, counts = _axes(ax), pd.crosstab(batches, names)
    total = counts.sum(axis=1)
    shares = counts.div(total, axis=0)
    starts = shares.cumsum(axis=1) - shares
    rows = [f"{name} ({n})" for name, n in total.items()]
    chosen = _colours(counts.columns, colours)
    for name in counts.columns:
        axis.barh(rows, shares[name], left=starts[name], color=chosen[name])
    axis.set(xlabel="share of the cells", xlim=(0, 1))
    axis.invert_yaxis()
    shown = {name: chosen[name] for name in counts.columns}
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    axis.legend(_handles(shown, "s"), shown, ncols=_columns(shown), **beside)
    return axis


def map_of_names(
    points: np.ndarray,
    names: Iterable,
    *,
    colours: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Cells coloured by a name, such as their type, above a legend of the names that occur.

    Parameters
    ----------
    points
        Where they lie, (N, 2): ``adata.obsm["X_umap"]``.
    names
        Of each cell, (N,).
    colours
        Of each name; None chooses them.
    ax
        Axes to draw on; None makes some.
    """
    called = _names(names)
    check_consistent_length(points, called)
    axis = _axes(ax)
    chosen = _colours(np.unique(called), colours)
    _scatter(points, [chosen[name] for name in called], axis)
    shown = {name: colour for name, colour in chosen.items() if (called == name).any()}
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    axis.legend(_handles(shown, "o"), shown, ncols=max(2, _columns(shown)), **below)
    return axis


def map_of_shares(points: np.ndarray, shares: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """Cells coloured by a share, such as confidence or novelty, with a scale from 0 to 1.

    Parameters
    ----------
    points
        Where they lie, (N, 2).
    shares
        Of each cell, (N,).
    ax
        Axes to draw on; None makes some.
    """
    check_consistent_length(points, shares)
    axis = _axes(ax)
    drawn = _scatter(points, np.asarray(shares), axis, cmap="viridis", vmin=0, vmax=1)
    axis.figure.colorbar(drawn, ax=axis, shrink=0.7)
    return axis


def palette(names: Iterable[str], unlabeled: str = "") -> dict[str, str]:
    """A colour for each name, by the order in which they come; the unlabelled are grey."""
    labels = [name for name in dict.fromkeys(names) if name != unlabeled]
    colours = default_102 if len(labels) > len(default_20) else default_20
    return dict(zip(labels, cycle(colours), strict=False)) | {unlabeled: UNKNOWN_COLOUR}


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax


def _names(values: Iterable) -> np.ndarray:
    return np.array(names_of(values), dtype=object)


def _colours(names: Iterable[str], given: Mapping[str, str] | None) -> Mapping[str, str]:
    """Those given, or some; InputError if a name has none."""
    found = palette(names) if given is None else given
    check_known(names, found, "among the colours", InputError)
    return found


def _handles(colours: Mapping[str, str], marker: str) -> list[Line2D]:
    return [Line2D([], [], marker=marker, linestyle="", color=c) for c in colours.values()]


def _columns(colours: Mapping[str, str]) -> int:
    return -(-len(colours) // ROWS)


def _scatter(points: np.ndarray, colours: Any, ax: Axes, **scale: Any) -> PathCollection:
    """All cells in one layer, so that no name lies over the others by its place in the legend."""
    size = float(np.clip(120_000 / len(points), 1, 40))
    ax.set_axis_off()
    x, y = np.asarray(points).T
    return ax.scatter(x, y, c=colours, s=size, linewidths=0, rasterized=True, **scale)
