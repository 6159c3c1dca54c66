"""What a model says of its own cells, asked once; figures and pages are made of it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pyro_scanvi.app.scoring import Judged
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.minibatches import UNLABELED, CellData
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.metrics import within_type_leak
from pyro_scanvi.names import names_of
from pyro_scanvi.posterior.labels import CONSENSUS, UNASSIGNED

REJECT, COVERAGE = 0.05, 0.9  # as the examples in docs have them
BY_RULES = (
    "labelled cells that the label rules were learned from, each read by rules of other cells"
)
NOT_KEPT = "answers to held-out cells in the file of the model, which an earlier version wrote"
BY_SPLIT = "labelled cells that training held out"


@dataclass(frozen=True)
class Unfamiliar:
    """How like the labelled cells the cells are, where the model has label rules.

    Attributes
    ----------
    novelty
        :meth:`~pyro_scanvi.SCANVI.get_novelty`, (N,).
    rejected
        Whether ``predict(reject=0.05)`` gives a cell up, (N,).
    set_size
        Number of labels in ``predict_sets(coverage=0.9)``, (N,).
    """

    novelty: np.ndarray
    rejected: np.ndarray
    set_size: np.ndarray


@dataclass(frozen=True)
class Seen:
    """What a model says of its cells, N of them.

    Attributes
    ----------
    model, data
        The model, and the cells as it reads them.
    given
        Name of the label that each cell was given, or the unlabelled category, (N,).
    soft
        Probability of each label, cells by labels.
    latent
        (N, K).
    unfamiliar
        None where the model has no label rules.
    held_out, of
        Cells whose label was held out, and which they are; None where there are none.
    notes
        What the model warns of.
    """

    model: SCANVI
    data: CellData
    given: np.ndarray
    soft: pd.DataFrame
    latent: np.ndarray
    unfamiliar: Unfamiliar | None
    held_out: Judged | None
    of: str
    notes: list[str]

    @classmethod
    def by(cls, model: SCANVI) -> "Seen":
        """Ask a trained model; InputError if its cells or labels have changed since."""
        data, _ = model.encoded(None, None)
        with _noted() as notes:
            soft = model.predict(soft=True)
            has_rules = model.label_method == CONSENSUS
            held_out, of = _by_rules(model) if has_rules else _by_split(model, data)
            return cls(
                model,
                data,
                given_labels(model.fields, model.adata.obs),
                soft.set_axis(names_of(soft.columns), axis=1),
                model.get_latent_representation(seed=model.seed),
                _unfamiliar(model) if has_rules else None,
                held_out if held_out is not None and len(held_out.label) else None,
                of,
                notes,
            )

    @property
    def labelled(self) -> np.ndarray:
        """Whether each cell was given a label, exact or not, (N,)."""
        return self.given != self.model.fields.unlabeled_category

    @property
    def predicted(self) -> np.ndarray:
        """Name of the most probable label of each cell, (N,)."""
        return np.array(self.soft.columns, dtype=object)[self.soft.to_numpy().argmax(1)]

    @property
    def confidence(self) -> np.ndarray:
        """Its probability, (N,)."""
        return self.soft.to_numpy().max(1)

    @property
    def batch(self) -> np.ndarray | None:
        """Name of the batch of each cell, (N,); None where there is one."""
        names = np.array(names_of(self.model.fields.batches), dtype=object)
        return names[self.data.batch] if len(names) > 1 else None

    def leak(self) -> pd.Series:
        """The leak of labels into the latent space, by type: as given, or else as predicted."""
        types = np.where(self.labelled, self.given, self.predicted)
        return within_type_leak(self.latent, types, self.labelled)

    def figures(self) -> dict[str, Any]:
        """Numbers of it all, as JSON holds them."""
        cells = pd.Series(self.predicted).value_counts()
        leak = self.leak().mean()
        return {
            "cells": len(self.data),
            "genes": len(self.model.fields.genes),
            "labelled": int(self.labelled.sum()),
            "predicted": {name: int(n) for name, n in cells.items()},
            "mean_confidence": float(self.confidence.mean()),
            "rejected": None if self.unfamiliar is None else int(self.unfamiliar.rejected.sum()),
            "leak": None if np.isnan(leak) else float(leak),
            "held_out": self.held_out and {"of": self.of, **self.held_out.record()},
        }


def given_labels(fields: Fields, obs: pd.DataFrame) -> np.ndarray:
    """Names of the labels that cells were given, or of the unlabelled category, (N,)."""
    if fields.labels_key not in obs:  # as of a query
        return np.full(len(obs), fields.unlabeled_category, dtype=object)
    column = fields.with_named_unlabeled(obs[[fields.labels_key]])[fields.labels_key]
    return np.array(names_of(column), dtype=object)


def leak_sentence(leak: pd.Series) -> str:
    """Whether labelled cells lie among their kind; empty where that cannot be told."""
    if not len(leak):
        return ""
    return (
        f"leak of labels into the latent space: {leak.mean():.2f} (about .5 where labelled cells "
        "lie among their kind; 1 where they lie on islands, or are all of one batch that lies "
        "apart)"
    )


def _unfamiliar(model: SCANVI) -> Unfamiliar:
    rejected = model.predict(reject=REJECT) == UNASSIGNED
    sets = model.predict_sets(coverage=COVERAGE)
    return Unfamiliar(model.get_novelty().to_numpy(), rejected, sets.sum(axis=1).to_numpy())


def _by_rules(model: SCANVI) -> tuple[Judged | None, str]:
    """By rules of the other folds; a file of before has kept the truth's probability alone."""
    known, names = model.consensus(), names_of(model.fields.classes)
    if np.isnan(known.held_out).any():
        return None, NOT_KEPT
    return Judged(names, known.label, known.held_out), BY_RULES


def _by_split(model: SCANVI, data: CellData) -> tuple[Judged | None, str]:
    try:
        cells = model.validation_indices
    except AttributeError:  # it was trained elsewhere
        return None, BY_SPLIT
    cells = cells[data.label[cells] != UNLABELED]
    if not len(cells):
        return None, BY_SPLIT
    soft = model.predict(indices=cells, soft=True).to_numpy()
    return Judged(names_of(model.fields.classes), data.label[cells], soft), BY_SPLIT


@contextmanager
def _noted() -> Iterator[list[str]]:
    """What the model warns of, each once, as sentences for the reader."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield notes
    notes += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
