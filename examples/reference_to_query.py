"""The whole life of a model on cells of your own: reference, save, load, query, predictions.

Trains on all batches of an .h5ad or .zarr but one, saves the model, and opens it in a new process
that maps the batch left out and predicts its labels, which it has never seen:

    python examples/reference_to_query.py run CELLS.h5ad --query-batch NAME --folder OUT

The report compares with logistic regression on the same reference cells.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import anndata as ad
import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from pyro_scanvi import SCANVI
from pyro_scanvi.app.baselines import baseline_probabilities
from pyro_scanvi.metrics import label_scores
from pyro_scanvi.storage.files import make_folder, user_path
from pyro_scanvi.storage.stores import read_anndata, write_anndata

UNLABELED = "Unknown"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()

Source = Annotated[Path, typer.Argument(metavar="CELLS", help="Raw counts, .h5ad or .zarr.")]
QueryBatch = Annotated[str, typer.Option(help="The batch to leave out and to map.")]
Folder = Annotated[Path, typer.Option(help="Folder for the model and the results; made if new.")]
LabelsKey = Annotated[str, typer.Option(help="Column of obs with the labels.")]
BatchKey = Annotated[str, typer.Option(help="Column of obs with the batch.")]
Epochs = Annotated[int, typer.Option(min=1, help="Epochs on the reference.")]
QueryEpochs = Annotated[int, typer.Option(min=0, help="Epochs on the query.")]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, split, shuffling and sampling.")]


@app.command()
def run(
    source: Source,
    query_batch: QueryBatch,
    folder: Folder = Path("reference_to_query"),
    labels_key: LabelsKey = "cell_type",
    batch_key: BatchKey = "batch",
    epochs: Epochs = 100,
    query_epochs: QueryEpochs = 50,
    seed: Seed = 0,
) -> None:
    """Train on the reference, save it, and map the query in a new process."""
    folder = user_path(folder)
    adata = read_anndata(user_path(source))
    make_folder(folder)
    is_query = (adata.obs[batch_key] == query_batch).to_numpy()
    reference = adata[~is_query].copy()
    SCANVI.setup_anndata(reference, labels_key, UNLABELED, batch_key=batch_key)
    model = SCANVI(reference, seed=seed, encode_covariates=True)
    model.train(epochs)
    model.save(folder / "model", overwrite=True, save_anndata=True)
    write_anndata(adata[is_query].copy(), folder / "query.h5ad")
    arguments = [folder, "--labels-key", labels_key, "--query-epochs", query_epochs]
    subprocess.run([sys.executable, __file__, "map", *map(str, arguments)], check=True)


@app.command("map")
def map_query(
    folder: Annotated[Path, typer.Argument(help="What the first command wrote.")],
    labels_key: LabelsKey = "cell_type",
    query_epochs: QueryEpochs = 50,
) -> None:
    """Open the saved model, map the query onto it, predict and report."""
    folder = user_path(folder)
    query = read_anndata(folder / "query.h5ad")
    truth = query.obs[labels_key].astype(str).to_numpy()
    query.obs[labels_key] = UNLABELED  # what the biologist has: cells without labels
    reference = SCANVI.load(folder / "model")
    query = SCANVI.prepare_query_anndata(query, reference)
    model = SCANVI.load_query_data(query, reference, freeze_batchnorm_decoder=True)
    found = {"mapped, not trained on": model.predict(soft=True)}
    model.train(query_epochs)
    found["mapped and trained on"] = model.predict(soft=True)
    found |= baselines(reference, query)
    model.annotate()
    write_anndata(query, folder / "annotated.h5ad")
    console.print(proof(model.state_diff(reference)), soft_wrap=True)
    console.print(score_table(found, truth, f"{query.n_obs} query cells of a batch never seen"))


def proof(diff: pd.DataFrame) -> str:
    """What training has changed of the reference, and what is new."""
    new = diff.query("new > 0").to_string(index=False)
    total = (diff["entries"] - diff["new"]).sum()
    return f"{diff['changed'].sum()} of the reference's {total} weights changed; new:\n{new}"


def baselines(reference: SCANVI, query: ad.AnnData) -> dict[str, pd.DataFrame]:
    """Label probabilities of the query cells by scikit-learn, from the reference cells."""
    labels = reference.adata.obs[reference.fields.labels_key].astype(str)
    both = ad.concat([reference.adata, query])
    known = np.arange(both.n_obs) < len(labels)
    given = np.r_[labels, np.full(query.n_obs, UNLABELED)]
    classes = np.unique(labels)
    found = baseline_probabilities(both, given, known)
    return {name: pd.DataFrame(soft, columns=classes) for name, soft in found.items()}


def score_table(found: dict[str, pd.DataFrame], truth: np.ndarray, title: str) -> Table:
    """Scores of each method; a type that the reference lacks counts as an error."""
    table = Table("method", "accuracy", "macro-F1", "expected calibration error", title=title)
    for name, soft in found.items():
        codes = soft.columns.astype(str).get_indexer(truth)
        scores = label_scores(codes, soft.to_numpy())
        table.add_row(name, *(f"{score:.3f}" for score in scores.values()))
    return table


if __name__ == "__main__":
    app()
