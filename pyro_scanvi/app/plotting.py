"""Pictures of a trained model, each drawn into axes, and the way of a picture into a page."""

import base64
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scanpy.plotting.palettes import default_20, default_102

from pyro_scanvi.threads import as_told

UNKNOWN_COLOUR = "lightgrey"
ROWS = 20  # of a legend, which then has more than two columns
MOST_NUMBERS = 25  # labels of a confusion matrix whose cells are counted in the picture
# Letters and not mathematics; the same bytes from the same numbers.
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.hashsalt": "pyro_scanvi",
    "legend.frameon": False,
    "legend.fontsize": "small",
}


def umap_of(latent: np.ndarray, seed: int = 0) -> np.ndarray:
    """UMAP of latent states (N, K) by scanpy, (N, 2)."""
    adata = ad.AnnData(obsm={"X_scanvi": latent})
    # numba sets the threads of OpenMP, which are torch's too, and speaks of its own insides.
    with as_told(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        n_neighbors = min(15, max(2, adata.n_obs - 1))
        sc.pp.neighbors(adata, use_rep="X_scanvi", n_neighbors=n_neighbors, random_state=seed)
        start = "spectral" if adata.n_obs > 3 else "random"  # three cells have no spectrum to use
        sc.tl.umap(adata, init_pos=start, random_state=seed)
    return adata.obsm["X_umap"]


def palette(names: Iterable[str], unlabeled: str) -> dict[str, str]:
    """One colour for each name, by the order in which they come; the unlabelled are grey."""
    labels = [name for name in dict.fromkeys(names) if name != unlabeled]
    colours = default_102 if len(labels) > len(default_20) else default_20
    return dict(zip(labels, cycle(colours), strict=False)) | {unlabeled: UNKNOWN_COLOUR}


def plot_names(points: np.ndarray, names: np.ndarray, colours: Mapping[str, str], ax: Axes) -> Axes:
    """Cells (N, 2) coloured by name (N,), above a legend of the names that occur."""
    shown = [name for name in colours if (names == name).any()]
    _scatter(points, [colours[name] for name in names], ax)
    handles = [Line2D([], [], marker="o", linestyle="", color=colours[name]) for name in shown]
    columns = max(2, -(-len(shown) // ROWS))
    ax.legend(handles, shown, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns)
    return ax


def plot_numbers(points: np.ndarray, values: np.ndarray, ax: Axes) -> Axes:
    """Cells (N, 2) coloured by a share (N,), with a scale from 0 to 1."""
    drawn = _scatter(points, values, ax, cmap="viridis", vmin=0, vmax=1)
    ax.figure.colorbar(drawn, ax=ax, shrink=0.7)
    return ax


def _scatter(points: np.ndarray, colours: Any, ax: Axes, **scale: Any) -> PathCollection:
    """All cells in one layer, so that no name lies over the others by its place in the legend."""
    size = float(np.clip(120_000 / len(points), 1, 40))
    ax.set_axis_off()
    x, y = points.T
    return ax.scatter(x, y, c=colours, s=size, linewidths=0, rasterized=True, **scale)


def plot_confusion(counts: pd.DataFrame, ax: Axes) -> Axes:
    """Cells by their label (rows) and by what they are taken for (columns); shares of a row."""
    total = counts.sum(axis=1).to_numpy()[:, None]
    shares = counts.to_numpy() / np.maximum(total, 1)
    drawn = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.figure.colorbar(drawn, ax=ax, shrink=0.7, label="share of the cells of a label")
    ax.set_xticks(range(counts.shape[1]), counts.columns, rotation=90)
    ax.set_yticks(range(counts.shape[0]), counts.index)
    ax.set(xlabel="taken for", ylabel="label")
    if len(counts) <= MOST_NUMBERS:
        for i, j in np.argwhere(counts.to_numpy()):
            colour = "white" if shares[i, j] > 0.5 else "black"
            ax.text(j, i, counts.iat[i, j], ha="center", va="center", color=colour, fontsize=8)
    return ax


def plot_reliability(bins: pd.DataFrame, ax: Axes) -> Axes:
    """Share of right answers by confidence; bins as of :func:`~.scoring.reliability`, by it."""
    ax.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    spread = np.abs(bins[["low", "high"]].to_numpy().T - bins["right"].to_numpy())
    ax.errorbar(bins.index, bins["right"], spread, marker="o", linestyle="", capsize=3)
    ax.set(xlabel="mean confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    return ax


def plot_history(history: pd.DataFrame, column: str, title: str, ax: Axes) -> Axes:
    """A column of the history by epoch, a curve for each split."""
    for name, rows in history.dropna(subset=[column]).groupby("split"):
        ax.plot(rows["epoch"] + 1, rows[column], label=name)
    ax.set(xlabel="epoch", title=title)
    ax.legend()
    return ax


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Pictures whose names may hold any letter, and which are the same for the same numbers."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A letter that the font lacks is a box.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def as_uri(draw: Callable[[Axes], object], width: float = 6, height: float = 4.5) -> str:
    """What is drawn, inches wide and high, as an SVG in a data URI, for the source of an image."""
    figure, file = Figure(figsize=(width, height)), io.BytesIO()  # of which pyplot does not know
    draw(figure.add_subplot())
    figure.savefig(file, format="svg", dpi=150, bbox_inches="tight", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
