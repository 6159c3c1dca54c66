"""The command line: ``pyro-scanvi annotate`` and ``pyro-scanvi demo``."""

import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import anndata as ad
import typer
from rich.console import Console

from pyro_scanvi import datasets
from pyro_scanvi.app.baselines import score_table
from pyro_scanvi.app.report import check_report, write_page
from pyro_scanvi.app.seen import Seen, leak_sentence
from pyro_scanvi.data.columns import check_names
from pyro_scanvi.data.counts import empty_cells
from pyro_scanvi.estimator.scanvi import DEFAULTS, SCANVI
from pyro_scanvi.storage.files import check_makeable, make_folder, user_path
from pyro_scanvi.storage.stores import (
    Compression,
    check_output,
    check_storable,
    layout_of,
    read_anndata,
    write_anndata,
)
from pyro_scanvi.validation import Advice, InputError

app = typer.Typer(
    help="Label every cell of an AnnData from a few labelled ones, with scANVI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
complaints = Console(stderr=True)

Source = Annotated[
    Path, typer.Argument(metavar="IN", help="Cells by genes, raw counts: .h5ad or .zarr.")
]
Output = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Where to write the result: .h5ad or .zarr."),
]
LabelsKey = Annotated[str, typer.Option(help="Column of obs with the labels.")]
UnlabeledCategory = Annotated[
    str,
    typer.Option(help="Value of that column where the label is not known; or there is no value."),
]
CoarseLabelsKey = Annotated[
    str | None,
    typer.Option(
        help="Column of obs with coarser labels, read where the label is not known; none if not "
        "given."
    ),
]
BatchKey = Annotated[
    str | None, typer.Option(help="Column of obs with the batch; one batch if not given.")
]
Layer = Annotated[
    str | None,
    typer.Option(
        help="Layer with the raw counts; raw is raw.X where no layer has that name; X if not given."
    ),
]
UseRaw = Annotated[
    bool, typer.Option("--use-raw", help="Read the counts in raw.X; off by default.")
]
NTopGenes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Learn from so many genes, the most variable of each batch; all if not given."
    ),
]
CategoricalCovariateKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of obs with a further covariate; repeat for more; none if not given."
    ),
]
ContinuousCovariateKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of obs with a numeric covariate; repeat for more; none if not given."
    ),
]
SizeFactorKey = Annotated[
    str | None, typer.Option(help="Column of obs with size factors; total counts if not given.")
]
MaxEpochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Passes over the data; if not given, min(round(20000 / cells * 400), 150).",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Cells in a minibatch.")]
NHidden = Annotated[int, typer.Option(min=1, help="Units in a hidden layer.")]
NLatent = Annotated[int, typer.Option(min=1, help="Dimensions of the latent space.")]
DropoutRate = Annotated[
    float, typer.Option(min=0, max=0.99, help="Probability of dropping a unit in training.")
]
LinearClassifier = Annotated[
    bool, typer.Option(help="Classify the latent space by one linear layer.")
]
EarlyStopping = Annotated[
    bool, typer.Option(help="Stop when the ELBO of the held-out cells rises no more.")
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Seed of weights, split, shuffling and sampling."),
]
Report = Annotated[
    Path | None,
    typer.Option(help="Page of HTML about the result, one .html file; none if not given."),
]
DropEmptyCells = Annotated[
    bool,
    typer.Option("--drop-empty-cells", help="Leave out cells without counts; off by default."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there already; off by default.")
]
CompressionChoice = Annotated[
    Compression, typer.Option(help="Of an .h5ad: keep takes that of IN; .zarr has its own.")
]


@app.command()
def annotate(
    context: typer.Context,
    source: Source,
    output: Output,
    labels_key: LabelsKey,
    unlabeled_category: UnlabeledCategory = "Unknown",
    coarse_labels_key: CoarseLabelsKey = None,
    batch_key: BatchKey = None,
    layer: Layer = None,
    use_raw: UseRaw = False,
    n_top_genes: NTopGenes = None,
    categorical_covariate_key: CategoricalCovariateKey = None,
    continuous_covariate_key: ContinuousCovariateKey = None,
    size_factor_key: SizeFactorKey = None,
    max_epochs: MaxEpochs = None,
    batch_size: BatchSize = 128,
    n_hidden: NHidden = 128,
    n_latent: NLatent = DEFAULTS["n_latent"],
    dropout_rate: DropoutRate = DEFAULTS["dropout_rate"],
    linear_classifier: LinearClassifier = DEFAULTS["linear_classifier"],
    early_stopping: EarlyStopping = False,
    seed: Seed = 0,
    report: Report = None,
    drop_empty_cells: DropEmptyCells = False,
    compression: CompressionChoice = Compression.KEEP,
    overwrite: Overwrite = False,
) -> None:
    """Label the cells of IN and write them to OUT.

    OUT is IN plus obs["scanvi_prediction"], obs["scanvi_confidence"],
    obsm["scanvi_probabilities"], obsm["X_scanvi"] and uns["pyro_scanvi"]; all genes are kept. The
    folder of OUT has to be there, so that a typing error is found before training.
    """
    with _plain_errors(context):
        source, output, report = user_path(source), user_path(output), report and user_path(report)
        _check_outputs(output, report, source, overwrite)
        adata, layout = _read_for(output, source, compression)
        if drop_empty_cells:
            adata = _without_empty_cells(adata, layer, use_raw)
        SCANVI.setup_anndata(
            adata,
            labels_key,
            unlabeled_category,
            layer,
            batch_key,
            size_factor_key,
            categorical_covariate_key,
            continuous_covariate_key,
            use_raw,
            n_top_genes,
            coarse_labels_key=coarse_labels_key,
        )
        model = SCANVI(
            adata,
            seed=seed,
            n_hidden=n_hidden,
            n_latent=n_latent,
            dropout_rate=dropout_rate,
            linear_classifier=linear_classifier,
        )
        model.train(max_epochs, batch_size=batch_size, early_stopping=early_stopping)
        _write_annotated(model, output, layout, report)


@app.command()
def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo_output"),
    labels_per_type: Annotated[
        int, typer.Option(min=1, help="Labels kept of each type, at most half of a type.")
    ] = 10,
    max_epochs: MaxEpochs = None,
    seed: Seed = 0,
) -> None:
    """Annotate 700 real blood cells from a few labels, and score the result on the hidden ones."""
    with _plain_errors(context):
        folder = user_path(folder)
        check_makeable(folder)
        adata = datasets.pbmc68k_counts()
        adata.obs["given"] = datasets.hide_labels(adata.obs["cell_type"], labels_per_type, seed)
        SCANVI.setup_anndata(adata, "given", "Unknown")
        model = SCANVI(adata, seed=seed)
        model.train(max_epochs)
        model.annotate()
        make_folder(folder)
        _write_report(model, folder / "report.html")
        write_anndata(adata, folder / "annotated.h5ad")
        _say(f"annotated cells: {folder / 'annotated.h5ad'}")
        console.print(score_table(model))


def _read_for(
    output: Path, source: Path, compression: Compression
) -> tuple[ad.AnnData, Mapping[str, Any]]:
    """The input, and how the output is laid out, which has been seen to hold it."""
    adata = read_anndata(source)
    layout = layout_of(output, source, compression)
    check_storable(adata, output, layout)
    return adata, layout


def _write_annotated(
    model: SCANVI, output: Path, layout: Mapping[str, Any], report: Path | None
) -> None:
    model.annotate()
    write_anndata(model.adata, output, layout)
    _say(f"annotated cells: {output}")
    if report is not None:
        _write_report(model, report)


def _write_report(model: SCANVI, path: Path) -> None:
    seen = Seen.by(model)
    _say(f"report: {write_page(seen, path)}")
    if leak := leak_sentence(seen.leak()):
        _say(leak)


def _check_outputs(output: Path, report: Path | None, source: Path, overwrite: bool) -> None:
    """Refuse an output or a report that cannot be written."""
    check_output(output, overwrite, source)
    if report is not None:
        check_report(report, overwrite, source, output)


def _without_empty_cells(adata: ad.AnnData, layer: str | None, use_raw: bool) -> ad.AnnData:
    check_names(adata)
    empty = empty_cells(adata, layer, use_raw)
    _say(f"cells without counts, left out: {empty.sum()}")
    return adata[~empty].copy()


def _say(message: str, to: Console = console, style: str = "") -> None:
    # Names and paths may hold brackets, and a line is to stay a line.
    to.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _plain_errors(context: typer.Context) -> Iterator[None]:
    """Say what is wrong with the input in a sentence; what is our fault keeps its traceback."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)  # what libraries will change
        warnings.showwarning = lambda message, *_: _say(
            f"note: {_with_options(message, context)}", complaints, "yellow"
        )
        try:
            yield
        except InputError as error:
            _say(f"error: {_with_options(error, context)}", complaints, "red")
            sys.exit(2)


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _with_options(told: Warning | InputError | str, context: typer.Context) -> str:
    """A message, and the options of this command for the arguments that it advises to change."""
    advised = told.mend if isinstance(told, InputError | Advice) else {}
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [
        options[name] if value is None or value is True else f"{options[name]} {_quoted(value)}"
        for name, value in advised.items()
        if name in options
    ]
    return f"{told} (on the command line: {', '.join(given)})" if given else str(told)


if __name__ == "__main__":
    app()
