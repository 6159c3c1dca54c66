"""The way of pictures into a page, and UMAP, which they are drawn upon."""

import base64
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anndata as ad
import matplotlib
import numpy as np
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_scanvi.threads import as_told

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


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Pictures whose names may hold any letter, and which are the same for the same numbers."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A letter that the font lacks is a box.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def as_uri(draw: Callable[..., Axes], width: float = 6, height: float = 4.5) -> str:
    """What `draw` draws into ``ax=``, inches wide and high, as an SVG in a data URI."""
    figure, file = Figure(figsize=(width, height)), io.BytesIO()  # of which pyplot does not know
    draw(ax=figure.add_subplot())
    figure.savefig(file, format="svg", dpi=150, bbox_inches="tight", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
