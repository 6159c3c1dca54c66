"""Labels beside the truth: scores, scores by type, confusion and reliability."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pyro_scanvi.metrics import label_scores, reliability


@dataclass(frozen=True)
class Judged:
    """Cells whose true label is known, and what is said of them.

    Attributes
    ----------
    names
        The labels, L.
    label
        True codes, (n,).
    soft
        Probability of each label, (n, L).
    """

    names: Sequence[str]
    label: np.ndarray
    soft: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], truth: np.ndarray, soft: np.ndarray) -> "Judged":
        """From true names (n,); those that are not among the labels have the probability 0."""
        known = pd.Index(names)
        both = known.append(pd.Index(np.unique(truth)).difference(known))
        padded = np.pad(soft, ((0, 0), (0, len(both) - len(known))))
        return cls(list(both), both.get_indexer(truth), padded)

    @property
    def answer(self) -> np.ndarray:
        """Code of the most probable label, (n,)."""
        return self.soft.argmax(1)

    def scores(self) -> dict[str, float]:
        """Number of cells, accuracy, macro-F1 and expected calibration error."""
        return {"cells": len(self.label), **label_scores(self.label, self.soft)}

    def by_type(self) -> pd.DataFrame:
        """Of each label that occurs, as truth or as answer: cells, precision, recall and F1.

        NaN where there is nothing to divide by: the recall of a label that no cell has.
        """
        codes = np.unique(np.concatenate([self.label, self.answer]))
        found = precision_recall_fscore_support(
            self.label, self.answer, labels=codes, zero_division=np.nan
        )
        names = pd.Index(np.array(self.names, dtype=object)[codes], name="type")
        table = pd.DataFrame(
            dict(zip(("precision", "recall", "f1"), found[:3], strict=True)), names
        )
        table.insert(0, "cells", found[3])
        return table

    def confusion(self) -> pd.DataFrame:
        """Number of cells by label (rows) and by answer (columns), of labels that occur."""
        codes = np.unique(np.concatenate([self.label, self.answer]))
        names = np.array(self.names, dtype=object)[codes]
        return pd.DataFrame(confusion_matrix(self.label, self.answer, labels=codes), names, names)

    def reliability(self) -> pd.DataFrame:
        """:func:`~pyro_scanvi.metrics.reliability` of the answers."""
        return reliability(self.answer == self.label, self.soft.max(1))

    def record(self) -> dict[str, Any]:
        """Scores, and those by type, as plain numbers."""
        return {**self.scores(), "by_type": self.by_type().to_dict(orient="index")}
