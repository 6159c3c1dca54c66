"""What a model is and was set up with, for people to read: its repr, and the table of its setup."""

import reprlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd

from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.minibatches import UNLABELED, CellData
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.names import listed
from pyro_scanvi.surgery import freezing


class Described(Protocol):
    """What is read of a SCANVI."""

    module: SCANVAE
    fields: Fields
    vae_arguments: dict[str, Any]
    is_trained: bool
    freeze: freezing.Freeze | None

    @property
    def n_epochs_trained(self) -> int:
        """Number of epochs in the history."""


def description(model: Described, data: CellData) -> str:
    """Cells, genes, columns, module and training, in a few lines."""
    fields = model.fields
    columns = _columns(fields)
    batches = [_told(key, known) for what, key, known in columns if what == "batch"]
    others = [_told(key, known) for what, key, known in columns if what not in ("labels", "batch")]
    more = (f"{e.name} in {e.where} ({e.width(len(fields.genes))} columns)" for e in fields.extra)
    lines = [
        f"SCANVI of {len(data)} cells and {len(fields.genes)} genes, counts in {fields.place}",
        f"labels: {_told(fields.labels_key, fields.classes)}, {_known(data)}; the "
        f"others are {fields.unlabeled_category!r}",
        *([f"further labels: {', '.join(_sources(fields))}"] if _sources(fields) else []),
        f"batch: {', '.join(batches) or 'none'}",
        f"covariates: {', '.join(others) or 'none'}",
        *([f"extra: {', '.join(more)}"] if fields.extra else []),
        f"module: {type(model.module).__name__}({_arguments(model.vae_arguments)})",
        f"trained: {'yes' if model.is_trained else 'no'}, {model.n_epochs_trained} epochs here",
    ]
    if model.freeze is not None:
        lines.append(f"query: {_moving(model.module, model.freeze)}")
    return "\n".join(lines)


def _known(data: CellData) -> str:
    """Of how many cells the label is known, exactly or in part."""
    exact = data.label != UNLABELED
    said = [v.any(1) for v in (data.evidence,) if v is not None]
    said += [(v != UNLABELED).any(1) for v in (data.annotations,) if v is not None]
    n_more = (np.logical_or.reduce([exact, *said]) & ~exact).sum()
    return f"known of {exact.sum()} cells" + (f", in part of {n_more}" if n_more else "")


def setup_table(fields: Fields) -> pd.DataFrame:
    """One row for each thing that the model reads: where it stands, its categories if it has any.

    Returns
    -------
    DataFrame
        Index ``field``; ``place`` in the AnnData; ``n_categories``, of counts the number of
        genes and of extra data that of columns, missing for numbers; the first ``categories``.
    """
    rows: list[tuple[str, str, np.ndarray | None]]
    rows = [("counts", str(fields.place), fields.genes)]
    rows += [(what, f"obs[{key!r}]", known) for what, key, known in _columns(fields)]
    rows += _further_labels(fields)
    rows += [(f"extra {e.name}", e.where, e.names(fields.genes)) for e in fields.extra]
    table = {
        "place": [place for _, place, _ in rows],
        "n_categories": pd.array([None if k is None else len(k) for *_, k in rows], dtype="Int64"),
        "categories": ["" if k is None else listed(k) for *_, k in rows],
    }
    return pd.DataFrame(table, index=pd.Index([what for what, *_ in rows], name="field"))


def _sources(fields: Fields) -> list[str]:
    """Where labels stand beside their column."""
    sources = fields.sources
    sets = [f"{len(sources.set_names)} sets ({listed(sources.set_names)})"]
    columns = [key for key in (sources.coarse_key, *sources.annotator_keys) if key]
    soft = [f"obsm[{sources.soft_key!r}]"] if sources.soft_key else []
    return [*(sets if sources.set_names else []), *(f"obs[{key!r}]" for key in columns), *soft]


def _further_labels(fields: Fields) -> list[tuple[str, str, np.ndarray | None]]:
    """A row of the table for each of them, with the names that stand there."""
    sources, own = fields.sources, f"obs[{fields.labels_key!r}]"
    rows: list[tuple[str, str, np.ndarray | None]] = [
        ("sets of labels", own if sources.set_names else "", np.array(sources.set_names)),
        ("coarse labels", _of_obs(sources.coarse_key), np.array(sources.coarse_names)),
        ("soft labels", f"obsm[{sources.soft_key!r}]" if sources.soft_key else "", fields.classes),
        *(("annotator", _of_obs(key), fields.classes) for key in sources.annotator_keys),
    ]
    return [row for row in rows if row[1]]


def _of_obs(key: str) -> str:
    return f"obs[{key!r}]" if key else ""


def _columns(fields: Fields) -> list[tuple[str, str, np.ndarray | None]]:
    """What each column of obs is to the model, its key, its categories; None for numbers."""
    categorical = zip(fields.categorical_covariate_keys, fields.covariate_categories, strict=True)
    columns: list[tuple[str, str, np.ndarray | None]] = [
        ("labels", fields.labels_key, fields.classes),
        ("batch", fields.batch_key, fields.batches),
        ("size factor", fields.size_factor_key, None),
        *(("categorical covariate", key, known) for key, known in categorical),
        *(("continuous covariate", key, None) for key in fields.continuous_covariate_keys),
    ]
    return [(what, key, known) for what, key, known in columns if key]


def _told(key: str, known: np.ndarray | None) -> str:
    return f"obs[{key!r}]" + ("" if known is None else f" ({len(known)} categories)")


def _arguments(arguments: Mapping[str, Any]) -> str:
    """In one line, whatever they hold."""
    return ", ".join(f"{k}={' '.join(reprlib.repr(v).split())}" for k, v in arguments.items())


def _moving(vae: SCANVAE, freeze: freezing.Freeze) -> str:
    """How many weights of a query model can be trained."""
    masks = freezing.trainable(vae, freeze)
    learned = [masks[name] for name, _ in vae.named_parameters()]
    moving, all_of_them = sum(int(m.sum()) for m in learned), sum(m.numel() for m in learned)
    return f"{moving} of {all_of_them} weights can be trained, the others are frozen"
