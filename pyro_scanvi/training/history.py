"""The history of training: a tidy table that also answers to the names of scvi-tools' curves."""

from collections.abc import Hashable
from typing import Any

import pandas as pd

from pyro_scanvi.training.phases import PHASES

SPLITS = sorted((s for p in PHASES for s in (p.name, p.held_out)), key=len, reverse=True)
KL_LOCAL = "kl_local"  # the sum of our kl_*
OTHER_NAMES = {"reconstruction_loss": "reconstruction", "classification_loss": "cross_entropy"}
ELSEWHERE = {  # of scvi-tools, without a curve that is the same
    "loss": "the loss is -elbo + classification_ratio * cross_entropy; see history['elbo_{split}'] "
    "and history['cross_entropy_{split}']",
    "f1_score": "scvi-tools' F1 is micro-averaged and equals history['accuracy_{split}']; the "
    "macro-averaged one is history['macro_f1_{split}']",
    "kl_global": "it is 0 in scvi-tools; all terms are in history['kl_local_{split}']",
}


class History(pd.DataFrame):
    """One row for each epoch and split, and the curves that scvi-tools calls by both.

    ``history["elbo"]`` is a column, ``history["elbo_train"]`` a table of one column, indexed by
    epoch, as of scvi-tools: any column and a split. So are "reconstruction_loss_train", which is
    ours "reconstruction", "kl_local_train", the sum of all kl_*, and "train_accuracy",
    "train_calibration_error" and "train_classification_loss" ("cross_entropy").

    All are nats per cell, and the ELBO is higher where the model is better; scvi-tools logs its
    negative. "reconstruction_loss" and "kl_local" sum to the negative ELBO here too, but the term
    of z counts in "kl_local", and in scvi-tools in "reconstruction_loss".

    Raises
    ------
    KeyError
        For a name without a curve; it names those that there are.

    Examples
    --------
    >>> splits = ["train", "validation"] * 2
    >>> elbo = [-310.0, -305.0, -290.0, -288.0]
    >>> history = History({"epoch": [0, 0, 1, 1], "split": splits, "elbo": elbo})
    >>> history["elbo_validation"]
           elbo_validation
    epoch
    0               -305.0
    1               -288.0
    >>> history["elbo"].tolist()
    [-310.0, -305.0, -290.0, -288.0]
    """

    @property
    def _constructor(self) -> type["History"]:
        return History

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and key not in self.columns:
            return self._curve(key)
        return super().__getitem__(key)

    def __contains__(self, key: Hashable) -> bool:
        if not isinstance(key, str) or key in self.columns:
            return super().__contains__(key)
        try:
            self._curve(key)
        except KeyError:
            return False
        return True

    def _curve(self, key: str) -> pd.DataFrame:
        """A table of one column, `key`, over the epochs of a split."""
        if not {"epoch", "split"} <= set(self.columns):
            raise KeyError(f"{key!r}: no epoch has been trained, so the history is empty")
        name, split = _parsed(key)
        rows = self.loc[self["split"] == split]
        if name in ELSEWHERE:
            raise KeyError(f"{key!r}: {ELSEWHERE[name].format(split=split)}")
        name = OTHER_NAMES.get(name, name)
        if not len(rows) or name not in {KL_LOCAL, *self._scores()}:
            raise KeyError(f"the history has no {key!r}; it has {self._names()}")
        terms = [c for c in self._scores() if c.startswith("kl_")]
        values = rows[terms].sum(axis=1) if name == KL_LOCAL else rows[name]
        index = pd.Index(rows["epoch"], name="epoch")
        return pd.DataFrame({key: values.to_numpy()}, index=index)

    def _scores(self) -> list[str]:
        return [column for column in self.columns if column not in ("epoch", "split")]

    def _names(self) -> str:
        """All curves that there are, by the name of the column and the splits."""
        splits = " or ".join(repr(f"_{split}") for split in self["split"].unique())
        return f"{', '.join(self._scores())}, each followed by {splits}"


def _parsed(key: str) -> tuple[str, str]:
    """Column and split of "elbo_train" and of "train_accuracy"; an empty split where none is."""
    for split in SPLITS:
        if key.endswith(f"_{split}"):
            return key.removesuffix(f"_{split}"), split
        if key.startswith(f"{split}_"):
            return key.removeprefix(f"{split}_"), split
    return key, ""
