"""A model for others: its folder with a card, as the Hugging Face hub shows it, there and back.

A folder of :func:`to_hub_folder` can be uploaded as it is, by hand or by the hub's own command, and
:meth:`SCANVI.load <pyro_scanvi.SCANVI.load>` opens what was downloaded. Only :func:`push_to_hub`
and :func:`downloaded` need ``huggingface_hub``, which this package does not bring along.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from pyro_scanvi.data.minibatches import UNLABELED
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.metrics import label_scores
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.labels import CONSENSUS
from pyro_scanvi.storage import models
from pyro_scanvi.storage.files import user_path
from pyro_scanvi.storage.parts import name_of_part, parts_in, with_parts
from pyro_scanvi.validation import InputError

TAGS = ("biology", "genomics", "single-cell", "model_cls_name:SCANVI", "modality:rna")
VERSIONS = {"pyro_scanvi_version": "pyro-scanvi", "anndata_version": "anndata"}


@dataclass(frozen=True)
class Card:
    """What a model cannot say of itself.

    Attributes
    ----------
    license
        Of model and cells, by the hub's names: "mit", "cc-by-4.0", "other". Nobody else can choose
        it for you, so there is no default.
    title, description
        What it is and what for: tissue, species, where the cells and their labels come from.
    tags
        Further ones, such as "tissue:lung"; those that all models have come by themselves.
    figures
        What you measured, by name, such as ``{"accuracy on a donor left out": 0.91}``.
    repo_id
        "owner/name" on the hub, for the lines that say how to open the model.

    Raises
    ------
    InputError
        If the licence or the title is no name in one line.
    """

    license: str
    title: str = "scANVI model"
    description: str = ""
    tags: Sequence[str] = ()
    figures: Mapping[str, float | str] = field(default_factory=dict)
    repo_id: str = ""

    def __post_init__(self) -> None:
        for name in ("license", "title"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip() or "\n" in value:
                raise InputError(f"{name}={value!r}, expected a name in one line")
        if isinstance(self.tags, str):
            raise InputError(f"tags={self.tags!r}, expected a list of tags: [{self.tags!r}]")


def to_hub_folder(
    model: SCANVI,
    folder: str | Path,
    card: Card,
    overwrite: bool = False,
    save_anndata: bool = False,
) -> Path:
    """Save a trained model with its card, ``README.md``: a folder that is ready for the hub.

    Parameters
    ----------
    model
        Of its labelled cells the card says how many of each type there are, and, where labels are
        found by rules, how good those were on cells whose label they did not see.
    folder, overwrite, save_anndata
        As for :meth:`SCANVI.save <pyro_scanvi.SCANVI.save>`. Do not save cells that you may not
        publish; names of types, batches, categories and genes are published in any case.
    card
        What to say beside.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        If the model is not trained, or :meth:`SCANVI.save <pyro_scanvi.SCANVI.save>` refuses;
        nothing is written then.
    """
    directory = user_path(folder)
    models.check_target(directory, overwrite)
    text = written(model, card, with_cells=save_anndata)
    model.save(directory, overwrite, save_anndata, card=text)
    return directory


def push_to_hub(
    model: SCANVI, repo_id: str, card: Card, private: bool = True, save_anndata: bool = False
) -> str:
    """Upload a trained model with its card; the repository is made if it is not there.

    Who you are is known to ``huggingface_hub``: log in by its own command first.

    Parameters
    ----------
    model, card, save_anndata
        As for :func:`to_hub_folder`.
    repo_id
        "owner/name".
    private
        Whether a repository that is made can be seen by its owner alone.

    Returns
    -------
    str
        What the hub says of the upload: its address.

    Raises
    ------
    ImportError
        If ``huggingface_hub`` is not installed.
    InputError
        As of :func:`to_hub_folder`; or if `repo_id` is no "owner/name".
    """
    _check_repo(repo_id)
    hub = _hub()
    with tempfile.TemporaryDirectory() as beside:
        own = replace(card, repo_id=repo_id)
        folder = to_hub_folder(model, Path(beside) / "model", own, save_anndata=save_anndata)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        stale = [models.CELLS, models.RULES]  # of a model that was there before: not of this one
        return str(
            hub.upload_folder(repo_id=repo_id, folder_path=str(folder), delete_patterns=stale)
        )


def downloaded(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a model on the hub, for ``SCANVI.load`` and ``SCANVI.load_query_data``.

    Parameters
    ----------
    repo_id
        "owner/name".
    revision
        A commit, tag or branch; name a commit where others must get the same model.

    Raises
    ------
    ImportError
        If ``huggingface_hub`` is not installed.
    InputError
        If `repo_id` is no "owner/name".
    """
    _check_repo(repo_id)
    return Path(_hub().snapshot_download(repo_id, revision=revision))


def written(model: SCANVI, card: Card, with_cells: bool = False) -> str:
    """The text of a card: YAML for the hub, then Markdown for people."""
    data, _ = model.encoded(None, None)  # refuses a model that is not trained, or cells that moved
    known = data.label[data.label != UNLABELED]
    tags = [*TAGS, f"annotated:{len(known) > 0}"]
    tags += [f"{name}:{version(package)}" for name, package in VERSIONS.items()]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # no HTML
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # YAML has no surrogates
    environment.filters |= {"cell": _cell, "told": _told}
    template = files("pyro_scanvi.estimator").joinpath("card.md").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        card=card,
        tags=[*tags, *card.tags],
        n_cells=len(data),
        n_labelled=len(known),
        n_genes=len(model.fields.genes),
        types=_counted(model.fields.classes, known),
        batches=_counted(model.fields.batches, data.batch) if model.fields.batch_key else [],
        setup=model.view_anndata_setup().drop(columns="n_categories").itertuples(),
        figures=list(_figures(model, card)),
        settings=list(_settings(model)),
        with_cells=with_cells,
        **_own(model),
    )


def _figures(model: SCANVI, card: Card) -> Iterator[tuple[str, Any]]:
    """What the user measured, what the rules did on held-out labels, the last ELBOs."""
    yield from card.figures.items()
    if model.label_method == CONSENSUS:
        rules = model.consensus()
        for name, value in label_scores(rules.label, rules.held_out).items():
            yield f"{name.replace('_', ' ')} on held-out labels ({len(rules.label)} cells)", value
    if len(model.history):
        for split, elbo in model.history.groupby("split")["elbo"].last().items():
            yield f"ELBO, {split} (nats per cell)", float(elbo)


def _settings(model: SCANVI) -> Iterator[tuple[str, Any]]:
    """Arguments of the model and of its training, without those that were left open."""
    names = {place: name_of_part(part) for place, part in parts_in(model.vae_arguments).items()}
    yield "class of the module", type(model.module).__qualname__
    yield "labels by", model.label_method
    yield "seed", model.seed
    yield "epochs", model.n_epochs_trained
    yield from with_parts(model.vae_arguments, names).items()
    yield from ((f"train: {k}", v) for k, v in model.training_settings.items() if v is not None)


def _own(model: SCANVI) -> dict[str, Any]:
    """Arguments that opening the model takes beside its folder."""
    name = type(model.module).__name__
    own_class, parts = type(model.module) is not SCANVAE, sorted(parts_in(model.vae_arguments))
    given = f", module_class={name}" if own_class else ""
    given += f", parts={{{', '.join(f'{p!r}: ...' for p in parts)}}}" if parts else ""
    return {"own_class": own_class, "parts": parts, "own": given}


def _counted(names: np.ndarray, codes: np.ndarray) -> list[tuple[str, int]]:
    return list(zip(map(str, names), np.bincount(codes, minlength=len(names)), strict=True))


def _cell(value: Any) -> str:
    """A text as a cell of a table holds it, whatever its letters."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(str(value).split()))


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_repo(repo_id: str) -> None:
    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise InputError(f"repo_id={repo_id!r}, expected the owner and the name: 'owner/name'")


def _hub() -> ModuleType:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            "huggingface_hub is not installed; pip install huggingface_hub, or do without: "
            "to_hub_folder() writes a folder that the hub's page takes, and SCANVI.load(folder) "
            "opens one that was downloaded by other means"
        ) from error
