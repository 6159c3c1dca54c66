"""A saved model, into its folder and out of it: with cells of its own, or for a query."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import torch
from torch import Tensor

from pyro_scanvi.annotation.arrays import from_arrays, to_arrays
from pyro_scanvi.annotation.consensus import Consensus
from pyro_scanvi.data import notes
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.storage import models, parts
from pyro_scanvi.storage.files import user_path
from pyro_scanvi.surgery.freezing import Freeze
from pyro_scanvi.surgery.query import LIBRARY_PRIOR, Reference
from pyro_scanvi.training.history import History
from pyro_scanvi.validation import InputError


@dataclass(frozen=True)
class Saved:
    """What ``SCANVI.save`` writes and wrote, by this version or one before.

    Attributes
    ----------
    state
        The state dict of the module.
    fields
        Columns and categories.
    arguments
        Of the module, without those that `fields` give; None where a part was.
    parts
        Name and module of each part of one's own among them, by its place.
    seed, is_trained, freeze, history, training_settings
        Attributes of :class:`~pyro_scanvi.SCANVI`.
    module_class
        Name of the class of the module.
    cells
        The AnnData, where it was asked for.
    consensus
        The rules by which cells are labelled; None where there are none.
    """

    state: Mapping[str, Tensor]
    fields: Fields
    arguments: dict[str, Any]
    parts: Mapping[str, Mapping[str, str]]
    seed: int
    is_trained: bool
    freeze: Freeze | None
    history: History
    training_settings: dict[str, Any]
    module_class: str
    cells: ad.AnnData | None
    consensus: Consensus | None = None

    @classmethod
    def read(cls, directory: str | Path, with_cells: bool = False) -> "Saved":
        """Of a folder; raises InputError if it is damaged, or lacks cells that are asked for."""
        state, record, cells, rules = models.read_model(user_path(directory), with_cells)
        freeze = record.get("freeze")  # not in records of plain models
        return cls(
            state=state,
            fields=Fields(**notes.from_json(record["fields"])),
            arguments=record["arguments"],
            parts=record.get("parts", {}),  # not in records of models without any
            seed=record["seed"],
            is_trained=record.get("is_trained", True),  # this one and the next: not in old records
            module_class=record.get("module_class", "SCANVAE"),
            freeze=Freeze(**freeze) if freeze else None,
            history=History(record["history"]),
            training_settings=record["training_settings"],
            cells=cells,
            consensus=from_arrays(rules) if rules else None,
        )

    def write(self, directory: Path, overwrite: bool, card: str = "") -> None:
        """Into a folder, whole or not at all; InputError for what JSON cannot hold.

        `card` is a text for people, the folder's ``README.md``.
        """
        record = {
            "version": version("pyro-scanvi"),
            "seed": self.seed,
            "module_class": self.module_class,
            "arguments": models.plain(self.arguments, "the model's argument"),
            "fields": models.plain(asdict(self.fields), "a field"),
            "history": self.history.to_dict(orient="list"),
            "training_settings": self.training_settings,
            **({"parts": dict(self.parts)} if self.parts else {}),
            "is_trained": self.is_trained,
            "freeze": None if self.freeze is None else asdict(self.freeze),
        }
        rules = None if self.consensus is None else to_arrays(self.consensus)
        given = self.state, record, self.cells, rules
        models.write_model(directory, *given, overwrite=overwrite, card=card)

    def check_class(self, module_class: type[SCANVAE]) -> None:
        """Refuse to put weights into another class than they were saved from."""
        if self.module_class != module_class.__qualname__:
            name = self.module_class.rpartition(".")[-1]
            raise InputError(
                f"the model was saved from a {self.module_class}, not a "
                f"{module_class.__qualname__}; give its class, module_class={name}"
            )

    def with_parts(self, given: Mapping[str, Any] | None) -> "Saved":
        """The same with its parts in their places; InputError where they are not those saved."""
        parts.check_parts(self.parts, given)
        return replace(self, arguments=parts.with_parts(self.arguments, given or {}))

    def reference(self, module_class: type[SCANVAE]) -> Reference:
        """What a query needs of it; its cells are not."""
        self.check_class(module_class)
        library = {name: self.state[name] for name in LIBRARY_PRIOR if name in self.state}
        with torch.random.fork_rng():
            module = module_class(**(self.fields.sizes() | self.arguments | library)).eval()
        module.load_state_dict(self.state)
        return Reference(
            module, self.fields, self.arguments, self.seed, self.is_trained, self.consensus
        )
