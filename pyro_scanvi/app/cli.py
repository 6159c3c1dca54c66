"""The command line, ``pyro-scanvi``: a command for each step from labels to a report."""

from pathlib import Path
from typing import Annotated

import anndata as ad
import numpy as np
import pandas as pd
import typer
from rich.markup import escape
from rich.table import Table

from pyro_scanvi import datasets
from pyro_scanvi.app.baselines import score_table
from pyro_scanvi.app.options import (
    BatchSize,
    CheckpointDir,
    Columns,
    Common,
    Labels,
    MaxEpochs,
    Model,
    Network,
    NHidden,
    Output,
    Report,
    Seed,
    Source,
    Training,
    grouped,
    path_argument,
    path_option,
    resumed,
    trained,
)
from pyro_scanvi.app.running import running
from pyro_scanvi.app.scoring import Judged
from pyro_scanvi.app.seen import given_labels
from pyro_scanvi.data.columns import check_keys
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.labels import WRITTEN
from pyro_scanvi.data.notes import UNS_KEY
from pyro_scanvi.estimator.saved import Saved
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.experiments import TABLES, Settings, compare, summary
from pyro_scanvi.names import listed, names_of
from pyro_scanvi.storage.files import (
    check_apart,
    check_makeable,
    check_new,
    disk_errors,
    make_folder,
    replacing,
)
from pyro_scanvi.storage.models import check_target
from pyro_scanvi.storage.storable import storable_names
from pyro_scanvi.storage.stores import (
    Compression,
    check_output,
    check_storable,
    layout_of,
    read_anndata,
    write_anndata,
)
from pyro_scanvi.validation import InputError, check_known

app = typer.Typer(
    help="Label every cell of an AnnData from a few labelled ones, with scANVI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CompressionChoice = Annotated[
    Compression, typer.Option(help="Of an .h5ad: keep takes that of IN; .zarr has its own.")
]


@app.command()
@grouped
def annotate(
    context: typer.Context,
    source: Source,
    output: Output,
    labels: Labels,
    columns: Columns,
    network: Network,
    training: Training,
    common: Common,
    report: Report = None,
    compression: CompressionChoice = Compression.KEEP,
) -> None:
    """Label the cells of IN and write them to OUT.

    OUT is IN plus obs["scanvi_prediction"], obs["scanvi_confidence"],
    obsm["scanvi_probabilities"], obsm["X_scanvi"] and uns["pyro_scanvi"]; all genes are kept. The
    folder of OUT has to be there, so that a typing error is found before training.
    """
    with running(context, common) as run:
        check_output(output, common.overwrite, source)
        run.check_report(report, source, output)
        adata = read_anndata(source)
        layout = layout_of(output, source, compression)
        check_storable(adata, output, layout)
        adata = columns.kept(adata, run.say)
        model = trained(adata, labels, columns, network, training, run.progress_bar)
        model.annotate()
        write_anndata(adata, output, layout, common.overwrite)
        run.say(f"annotated cells: {output}")
        run.tell(model, report)


@app.command()
@grouped
def train(
    context: typer.Context,
    source: Source,
    target: Annotated[Path, path_argument("MODEL", "Folder to save the model in.")],
    labels: Labels,
    columns: Columns,
    network: Network,
    training: Training,
    common: Common,
    report: Report = None,
    save_cells: Annotated[
        bool,
        typer.Option("--save-cells", help="Save the cells with the model; off by default."),
    ] = False,
) -> None:
    """Train a model on the cells of IN and save it: for query, evaluate and report."""
    with running(context, common) as run:
        check_apart(target, "model", source)
        check_target(target, common.overwrite)
        run.check_report(report, source, target)
        adata = columns.kept(read_anndata(source), run.say)
        model = trained(adata, labels, columns, network, training, run.progress_bar)
        model.save(target, common.overwrite, save_cells)
        run.say(f"model: {target}")
        run.tell(model, report)


@app.command()
@grouped
def query(
    context: typer.Context,
    reference: Model,
    source: Source,
    output: Output,
    common: Common,
    max_epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes over the new cells, to learn their batches; no training if not given.",
        ),
    ] = None,
    batch_size: BatchSize = 128,
    checkpoint_dir: CheckpointDir = None,
    seed: Seed = 0,
    fill_missing_genes: Annotated[
        bool,
        typer.Option(
            "--fill-missing-genes", help="Take genes that IN lacks for zeros; off by default."
        ),
    ] = False,
    save_model: Annotated[
        Path | None, path_option("Folder to save the model of the new cells in; none if not given.")
    ] = None,
    report: Report = None,
    compression: CompressionChoice = Compression.KEEP,
) -> None:
    """Label the new cells of IN by the MODEL of others, and write them to OUT.

    OUT is as that of annotate. IN has the columns of obs that MODEL was trained with, but for the
    labels; batches that MODEL has not seen become new ones. Training teaches the decoder these, and
    labels stay as they are, unless the encoder of MODEL reads covariates.
    """
    with running(context, common) as run:
        check_output(output, common.overwrite, source)
        run.check_report(report, source, output, reference)
        if save_model is not None:
            check_apart(save_model, "model", source, output, reference)
            check_target(save_model, common.overwrite)
        adata = read_anndata(source)
        layout = layout_of(output, source, compression)
        check_storable(adata, output, layout)
        cells = SCANVI.prepare_query_anndata(adata, reference) if fill_missing_genes else adata
        model = SCANVI.load_query_data(cells, reference, seed=seed)
        if max_epochs is not None:
            model.train(
                max_epochs,
                batch_size=batch_size,
                progress_bar=run.progress_bar,
                **resumed(checkpoint_dir),
            )
        model.annotate()
        if cells is not adata:
            _copy_answers(cells, adata)
        write_anndata(adata, output, layout, common.overwrite)
        run.say(f"annotated cells: {output}")
        if save_model is not None:
            model.save(save_model, common.overwrite)
            run.say(f"model: {save_model}")
        run.tell(model, report)


@app.command()
@grouped
def evaluate(
    context: typer.Context,
    source: Annotated[
        Path,
        path_argument(
            "IN", "Annotated cells, .h5ad or .zarr; with --model any cells with its genes."
        ),
    ],
    truth_key: Annotated[str, typer.Option(help="Column of obs with the true labels.")],
    common: Common,
    model: Annotated[
        Path | None,
        path_option("Folder of a model that labels the cells; what is written in IN if not given."),
    ] = None,
    new_cells: Annotated[
        bool,
        typer.Option(
            "--new-cells",
            help="The model was not trained on these cells, so that all are scored and not only "
            "those without a given label; off by default.",
        ),
    ] = False,
) -> None:
    """Score labels beside the truth: accuracy, macro-F1, calibration error, and each type.

    Cells are scored if their true label is known and none was given to the model in its own column
    of labels: what it was told it knows.
    """
    with running(context, common) as run:
        adata = read_anndata(source)
        fields, soft = _answers(adata, model)
        judged = _judged(adata, fields, soft, truth_key, new_cells)
        run.summary["figures"] = judged.record()
        scores = pd.DataFrame(judged.scores(), ["all of them"])
        run.console.print(_table("scores", scores.reset_index(names="cells that are scored")))
        run.console.print(_table("by type", judged.by_type().reset_index()))


@app.command()
@grouped
def report(
    context: typer.Context,
    model: Model,
    page: Annotated[Path, path_argument("OUT", "Page of HTML to write: .html.")],
    common: Common,
    cells: Annotated[
        Path | None,
        path_option("The cells that MODEL was trained on; those saved with it if not given."),
    ] = None,
) -> None:
    """Write a page of HTML about MODEL and its cells."""
    with running(context, common) as run:
        run.check_report(page, model, *([] if cells is None else [cells]))
        adata = None if cells is None else read_anndata(cells)
        run.tell(SCANVI.load(model, adata), page)


@app.command()
@grouped
def experiment(
    context: typer.Context,
    source: Source,
    output: Annotated[Path, path_argument("OUT", "Table of all measurements to write: .csv.")],
    labels_key: Annotated[
        str, typer.Option(help="Column of obs with the labels, most of which are hidden.")
    ],
    columns: Columns,
    common: Common,
    table: Annotated[
        str, typer.Option(help=f"Settings to compare: {', '.join(TABLES)}.")
    ] = "objectives",
    row: Annotated[
        list[str] | None,
        typer.Option(help="Row of that table; repeat for more; all rows if not given."),
    ] = None,
    n_seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each row; five or more make an interval.")
    ] = 5,
    labels_per_type: Annotated[
        int, typer.Option(min=1, help="Labels shown of each type, at most half of a type.")
    ] = 10,
    max_epochs: MaxEpochs = None,
    n_hidden: NHidden = 128,
) -> None:
    """Compare settings over seeds on the cells of IN, of which all are labelled.

    Each row of the table is trained with each seed; scores are of hidden labels and held-out cells.
    """
    with running(context, common) as run:
        check_new(output, "output", common.overwrite, source)
        check_known([table], TABLES, "a table of settings", InputError)
        rows = TABLES[table]
        check_known(row or [], rows, f"a row of {table}", InputError)
        adata = columns.kept(read_anndata(source), run.say)
        epochs = {} if max_epochs is None else {"max_epochs": max_epochs}
        found = compare(
            {name: rows[name] for name in row or rows},
            adata,
            range(n_seeds),
            truth=labels_key,
            n_per_label=labels_per_type,
            common=Settings({"n_hidden": n_hidden}, epochs),
            setup=columns.setup(),
            progress_bar=run.progress_bar,
        )
        with disk_errors(output), replacing(output, common.overwrite) as temporary:
            found.to_csv(temporary, index=False)
        run.say(f"measurements: {output}")
        means = summary(found)
        run.summary["figures"] = means.to_dict(orient="records")
        run.console.print(_table("means over seeds and their 95 % intervals", means))


@app.command()
def demo(
    context: typer.Context,
    folder: Annotated[Path, path_option("Folder for the results.")] = Path("demo_output"),
    labels_per_type: Annotated[
        int, typer.Option(min=1, help="Labels kept of each type, at most half of a type.")
    ] = 10,
    max_epochs: MaxEpochs = None,
    seed: Seed = 0,
) -> None:
    """Annotate 700 real blood cells from a few labels, and score the result on the hidden ones."""
    with running(context, Common()) as run:
        check_makeable(folder)
        adata = datasets.pbmc68k_counts()
        adata.obs["given"] = datasets.hide_labels(adata.obs["cell_type"], labels_per_type, seed)
        SCANVI.setup_anndata(adata, "given", "Unknown")
        model = SCANVI(adata, seed=seed)
        model.train(max_epochs)
        model.annotate()
        make_folder(folder)
        run.tell(model, folder / "report.html")
        write_anndata(adata, folder / "annotated.h5ad")
        run.say(f"annotated cells: {folder / 'annotated.h5ad'}")
        run.console.print(score_table(model))


def _copy_answers(cells: ad.AnnData, to: ad.AnnData) -> None:
    """What annotate has written, into the cells with all of their genes."""
    to.obs[list(WRITTEN)] = cells.obs[list(WRITTEN)]
    for name in ("scanvi_probabilities", "X_scanvi"):
        to.obsm[name] = cells.obsm[name]
    to.uns[UNS_KEY] = cells.uns[UNS_KEY]


def _answers(adata: ad.AnnData, model: Path | None) -> tuple[Fields, np.ndarray]:
    """Columns and categories, and probabilities (N, L): of a model, or as annotate wrote them."""
    if model is not None:
        return _answers_of(model, adata)
    if "scanvi_probabilities" not in adata.obsm:
        raise InputError(
            "the cells are not annotated: there is no obsm['scanvi_probabilities']; annotate them, "
            "or name a model",
            {"model": None},
        )
    fields, soft = Fields.from_uns(adata), pd.DataFrame(adata.obsm["scanvi_probabilities"])
    names = storable_names(names_of(fields.classes), taken=[str(adata.obs_names.name)])
    if list(soft.columns) != names:
        raise InputError(
            f"obsm['scanvi_probabilities'] has the columns {listed(soft.columns)}, expected the "
            f"labels that were set up, {listed(names)}; annotate the cells again"
        )
    return fields, soft.to_numpy()


def _answers_of(model: Path, adata: ad.AnnData) -> tuple[Fields, np.ndarray]:
    """As of a query without labels: batches and labels may be others than those of the model."""
    obs, key = adata.obs, Saved.read(model).fields.labels_key
    adata.obs = obs.drop(columns=key, errors="ignore")
    query = SCANVI.load_query_data(adata, model)
    soft = query.predict(soft=True).to_numpy()
    adata.obs = obs
    return query.fields, soft


def _judged(
    adata: ad.AnnData, fields: Fields, soft: np.ndarray, truth_key: str, new_cells: bool
) -> Judged:
    """The cells whose true label is known, and which the model was not told."""
    check_keys(adata, [truth_key])
    truth = np.array(names_of(adata.obs[truth_key]), dtype=object)
    known = adata.obs[truth_key].notna().to_numpy() & (truth != fields.unlabeled_category)
    hidden = given_labels(fields, adata.obs) == fields.unlabeled_category
    scored = known & (hidden | new_cells)
    if not scored.any():
        raise InputError(
            f"no cell can be scored: obs[{truth_key!r}] has {known.sum()} labels, all of cells "
            f"whose label in obs[{fields.labels_key!r}] the model was given. If it was not trained "
            "on these cells, say so with new_cells",
            {"new_cells": True},
        )
    return Judged.of(names_of(fields.classes), truth[scored], soft[scored])


def _table(title: str, frame: pd.DataFrame) -> Table:
    """For the terminal; numbers in three digits after the point."""
    table = Table(title=title, title_justify="left")
    for column in frame:
        is_text = frame[column].dtype == object
        table.add_column(escape(str(column)), justify="left" if is_text else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in row))
    return table


if __name__ == "__main__":
    app()
