"""Options that commands share, by what they are of: columns, network, training, files."""

import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anndata as ad
import typer

from pyro_scanvi.data.columns import check_names
from pyro_scanvi.data.counts import empty_cells
from pyro_scanvi.estimator.scanvi import DEFAULTS, SCANVI
from pyro_scanvi.names import nearest
from pyro_scanvi.storage.files import user_path

T = TypeVar("T")


def path_argument(metavar: str, text: str) -> Any:
    """A path that a command is given by its place."""
    return typer.Argument(metavar=metavar, help=text, parser=user_path)


def path_option(text: str) -> Any:
    """A path that a command is given by an option."""
    return typer.Option(metavar="PATH", help=text, parser=user_path)


Source = Annotated[Path, path_argument("IN", "Cells by genes, raw counts: .h5ad or .zarr.")]
Output = Annotated[Path, path_argument("OUT", "Where to write the result: .h5ad or .zarr.")]
Model = Annotated[
    Path, path_argument("MODEL", "Folder of a model, as train and SCANVI.save write it.")
]
Report = Annotated[
    Path | None, path_option("Page of HTML about the result, one .html file; none if not given.")
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Seed of weights, split, shuffling and sampling."),
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
CheckpointDir = Annotated[
    Path | None,
    path_option(
        "Folder of checkpoints, from which the same command goes on if it was stopped; none if not "
        "given."
    ),
]


def read_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Options of a TOML file, for those that the command line does not give."""
    if path is None:
        return None
    try:
        given = tomllib.loads(user_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and TOMLDecodeError are of these
        raise typer.BadParameter(f"{path} cannot be read as TOML: {error}") from None
    named = {name.replace("-", "_"): value for name, value in given.items()}
    known = {p.name for p in context.command.params if p.param_type_name == "option"}
    for name in named:
        if name not in known - {"config"}:
            hint = nearest(name, known, "see --help")
            raise typer.BadParameter(f"{path} sets {name!r}, which is no option here; {hint}")
    context.default_map = {**(context.default_map or {}), **named}
    return path


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace what is there already; off by default."),
    ] = False
    json: Annotated[
        Path | None,
        path_option(
            "Summary in JSON: figures, settings, versions, seconds; - for stdout; none if not "
            "given."
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            is_eager=True,
            callback=read_settings,
            help='TOML file of options, labels-key = "cell_type"; the command line goes first; '
            "none if not given.",
        ),
    ] = None


@dataclass(frozen=True)
class Columns:
    """Where counts, batches and covariates stand."""

    batch_key: Annotated[
        str | None,
        typer.Option(help="Column of obs with the batch; one batch if not given."),
    ] = None
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layer with the raw counts; raw is raw.X where no layer has that name; X if not "
            "given."
        ),
    ] = None
    use_raw: Annotated[
        bool, typer.Option("--use-raw", help="Read the counts in raw.X; off by default.")
    ] = False
    n_top_genes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Learn from so many genes, the most variable of each batch; all if not given.",
        ),
    ] = None
    categorical_covariate_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of obs with a further covariate; repeat for more; none if not given."
        ),
    ] = None
    continuous_covariate_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of obs with a numeric covariate; repeat for more; none if not given."
        ),
    ] = None
    size_factor_key: Annotated[
        str | None,
        typer.Option(help="Column of obs with size factors, counts; total counts if not given."),
    ] = None
    drop_empty_cells: Annotated[
        bool,
        typer.Option("--drop-empty-cells", help="Leave out cells without counts; off by default."),
    ] = False

    def setup(self) -> dict[str, Any]:
        """Arguments of ``SCANVI.setup_anndata``."""
        return {
            "batch_key": self.batch_key,
            "layer": self.layer,
            "use_raw": self.use_raw,
            "n_top_genes": self.n_top_genes,
            "categorical_covariate_keys": self.categorical_covariate_key,
            "continuous_covariate_keys": self.continuous_covariate_key,
            "size_factor_key": self.size_factor_key,
        }

    def kept(self, adata: ad.AnnData, say: Callable[[str], None]) -> ad.AnnData:
        """The cells, without empty ones where they are to be left out."""
        if not self.drop_empty_cells:
            return adata
        check_names(adata)
        empty = empty_cells(adata, self.layer, self.use_raw)
        say(f"cells without counts, left out: {empty.sum()}")
        return adata[~empty].copy()


@dataclass(frozen=True)
class Labels:
    """Where labels stand."""

    labels_key: Annotated[str, typer.Option(help="Column of obs with the labels.")]
    unlabeled_category: Annotated[
        str,
        typer.Option(
            help="Value of that column where the label is not known; or there is no value."
        ),
    ] = "Unknown"
    coarse_labels_key: Annotated[
        str | None,
        typer.Option(
            help="Column of obs with coarser labels, read where the label is not known; none if "
            "not given."
        ),
    ] = None


@dataclass(frozen=True)
class Network:
    """Sizes of the model."""

    n_hidden: NHidden = 128
    n_latent: Annotated[int, typer.Option(min=1, help="Dimensions of the latent space.")] = (
        DEFAULTS["n_latent"]
    )
    dropout_rate: Annotated[
        float, typer.Option(min=0, max=0.99, help="Probability of dropping a unit in training.")
    ] = DEFAULTS["dropout_rate"]
    linear_classifier: Annotated[
        bool, typer.Option(help="Classify the latent space by one linear layer.")
    ] = DEFAULTS["linear_classifier"]


@dataclass(frozen=True)
class Training:
    """How it is trained."""

    max_epochs: MaxEpochs = None
    batch_size: BatchSize = 128
    early_stopping: Annotated[
        bool, typer.Option(help="Stop when the ELBO of the held-out cells rises no more.")
    ] = False
    checkpoint_dir: CheckpointDir = None
    seed: Seed = 0


def trained(
    adata: ad.AnnData,
    labels: Labels,
    columns: Columns,
    network: Network,
    training: Training,
    progress_bar: bool,
) -> SCANVI:
    """A model of these cells, set up and trained."""
    SCANVI.setup_anndata(adata, **vars(labels), **columns.setup())
    model = SCANVI(adata, seed=training.seed, **vars(network))
    return model.train(
        training.max_epochs,
        batch_size=training.batch_size,
        early_stopping=training.early_stopping,
        progress_bar=progress_bar,
        **resumed(training.checkpoint_dir),
    )


def resumed(checkpoint_dir: Path | None) -> dict[str, Any]:
    """Arguments of ``train`` that keep a checkpoint, and go on from one that is there."""
    return {} if checkpoint_dir is None else {"checkpoint_dir": checkpoint_dir, "ckpt_path": "last"}


def grouped(command: Callable[..., T]) -> Callable[..., T]:
    """The same command, with the fields of its dataclasses as parameters of its own."""
    own = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in own if is_dataclass(p.annotation)}
    flat = [p for p in own if p.name not in groups]
    for group in groups.values():
        flat += inspect.signature(group).parameters.values()

    @wraps(command)
    def called(**given: Any) -> T:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return command(**given)

    flat = [p.replace(kind=p.KEYWORD_ONLY) for p in flat]  # in any order
    vars(called)["__signature__"] = inspect.Signature(flat)
    called.__annotations__ = {p.name: p.annotation for p in flat}
    return called
