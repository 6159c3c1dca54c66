"""What is shown of an annotated model: pictures of it, and its scores beside the baselines."""

import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from pyro_scanvi.app import plotting
from pyro_scanvi.app.baselines import baseline_probabilities
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.metrics import label_scores, within_type_leak
from pyro_scanvi.names import name_of
from pyro_scanvi.storage.files import disk_errors, make_folder, replacing

LONGEST_NAME = 40  # letters, in the legend of a picture


def write_report(model: SCANVI, folder: Path) -> list[Path]:
    """UMAP of the latent space and loss curves of an annotated model, as PNG, into a folder.

    Parameters
    ----------
    model
        :meth:`~pyro_scanvi.SCANVI.annotate` has written into its AnnData.
    folder
        It is made if it is not there.

    Returns
    -------
    list
        The pictures.

    Raises
    ------
    InputError
        If the disk refuses them.
    """
    matplotlib.use("agg")
    make_folder(folder)
    labels_key, unlabeled = model.fields.labels_key, model.fields.unlabeled_category
    columns = [labels_key, "scanvi_prediction", "scanvi_confidence"]
    obs = model.fields.with_named_unlabeled(model.adata.obs[columns].copy())
    drawn = {column: obs[column].astype(object).map(name_of) for column in columns[:2]}
    short = _short_names({unlabeled, *pd.concat(drawn)})
    for column, names in drawn.items():
        obs[column] = names.map(short).astype("category")
    picture = ad.AnnData(obs=obs, obsm={"X_scanvi": model.adata.obsm["X_scanvi"]})
    plotting.compute_umap(picture, model.seed)
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        # A letter that the font lacks is a box, and a long name makes a picture smaller.
        warnings.filterwarnings("ignore", message="Glyph|Tight layout", category=UserWarning)
        figures = {
            "umap.png": plotting.umap_figure(picture, columns, short[unlabeled]),
            "losses.png": plotting.loss_figure(model.history),
        }
        return [_saved(figure, folder / name) for name, figure in figures.items()]


def _saved(figure: Figure, path: Path) -> Path:
    with disk_errors(path), replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    matplotlib.pyplot.close(figure)
    return path


def _short_names(names: set[str]) -> dict[str, str]:
    """Each name with its middle left out, if it is long; as they are where some would be alike."""
    half = LONGEST_NAME // 2
    short = {n: n if len(n) <= LONGEST_NAME else f"{n[:half]}...{n[-half:]}" for n in names}
    return short if len(set(short.values())) == len(names) else {n: n for n in names}


def leak_sentence(model: SCANVI) -> str:
    """Whether labelled cells lie among their kind, by the labels that cells were given or told.

    Empty where no label has two labelled cells and an unlabelled one.
    """
    obs, fields = model.adata.obs, model.fields
    given = fields.with_named_unlabeled(obs[[fields.labels_key]])[fields.labels_key].map(name_of)
    labelled = (given != fields.unlabeled_category).to_numpy()
    types = np.where(labelled, given, obs["scanvi_prediction"].map(name_of))
    leak = within_type_leak(model.adata.obsm["X_scanvi"], types, labelled).mean()
    if np.isnan(leak):
        return ""
    return (
        f"leak of labels into the latent space: {leak:.2f} (about .5 where labelled cells lie "
        "among their kind; 1 where they lie on islands, or are all of one batch that lies apart)"
    )


def score_table(model: SCANVI) -> Table:
    """Scores on the cells whose label was hidden, beside the baselines."""
    obs = model.adata.obs
    labelled = (obs[model.fields.labels_key] != model.fields.unlabeled_category).to_numpy()
    truth = obs["cell_type"].astype(str).to_numpy()
    codes = np.searchsorted(model.fields.classes, truth[~labelled])
    soft = model.adata.obsm["scanvi_probabilities"].to_numpy()[~labelled]
    methods = {"pyro_scanvi": soft} | baseline_probabilities(model.adata, truth, labelled)
    table = Table(
        title=f"{(~labelled).sum()} cells with hidden labels, {labelled.sum()} labelled cells"
    )
    for column in ("method", "accuracy", "macro-F1", "expected calibration error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, probabilities in methods.items():
        scores = label_scores(codes, probabilities)
        table.add_row(name, *(f"{score:.3f}" for score in scores.values()))
    return table
