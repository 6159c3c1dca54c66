"""A type of which no cell is labelled, found by its marker genes.

    python benchmarks/markers.py [DATA.h5ad] [--batch-key batch] --markers B=MS4A1,CD79A,CD79B ...
        [--seeds 0 1 2 3 4] [--epochs 60] [--out markers.csv]

Ten labels of each type are given. Of each type of --markers in turn they are hidden again, and its
hidden cells are looked for: with nothing but the type's name ("declared"), with ten or thirty cells
chosen by the markers ("markers, 10"), and with the ten labels themselves ("labelled").
"""

import argparse
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi import SCANVI, datasets
from pyro_scanvi.experiments import Settings, compare, markdown, summary
from pyro_scanvi.experiments.comparing import GIVEN, HIDDEN, Trial
from pyro_scanvi.extensions import marker_labels

N_CELLS = (10, 30)


@dataclass(frozen=True)
class Withheld:
    """A type whose labels are hidden, and what stands in for them."""

    name: str
    markers: list[str]
    types: list[str]

    def declared(self, adata: ad.AnnData, seed: int) -> Mapping[str, Any]:
        """Its name alone."""
        labels = adata.obs[GIVEN].astype(str)
        adata.obs[GIVEN] = labels.where(labels != self.name, HIDDEN)
        return {"labels": self.types}

    def by_markers(self, adata: ad.AnnData, seed: int, n_cells: int) -> Mapping[str, Any]:
        """Some cells that express its markers most."""
        told, markers = self.declared(adata, seed), {self.name: self.markers}
        adata.obs[GIVEN] = marker_labels(adata, GIVEN, HIDDEN, markers, n_cells=n_cells)
        return told

    def scores(self, trial: Trial, model: SCANVI) -> Iterator[tuple[str, float]]:
        """Recall and precision of the type among cells that have no label, and accuracy."""
        given = trial.training.obs[GIVEN].to_numpy() == HIDDEN
        truth = trial.training.obs[trial.truth].astype(str).to_numpy()[given]
        predicted = model.predict().astype(str)[given]
        called, member = predicted == self.name, truth == self.name
        yield "recall", called[member].mean()
        yield "precision", member[called].mean() if called.any() else np.nan
        yield "accuracy", (predicted == truth).mean()


def main() -> None:
    """Train, write every measurement, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--batch-key")
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--markers", nargs="+", default=["CD19+ B=MS4A1,CD79A,CD79B"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("markers.csv"))
    asked = parser.parse_args()
    adata = ad.read_h5ad(asked.data) if asked.data else datasets.pbmc68k_counts()
    frames = []
    for name, genes in (entry.split("=") for entry in asked.markers):
        types = sorted(adata.obs[asked.labels_key].astype(str).unique())
        withheld = Withheld(name, genes.split(","), types)
        ways = {
            "labelled": Settings(),
            "declared": Settings(prepare=withheld.declared),
        }
        for n in N_CELLS:
            chosen = partial(withheld.by_markers, n_cells=n)
            ways[f"markers, {n}"] = Settings(prepare=chosen)
        plan = {"classification_ratio": 500.0}
        frame = compare(
            ways,
            adata,
            asked.seeds,
            truth=asked.labels_key,
            common=Settings(train={"max_epochs": asked.epochs, "plan_kwargs": plan}),
            setup={"batch_key": asked.batch_key} if asked.batch_key else {},
            score=withheld.scores,
        )
        frames.append(frame.assign(type=name))
    measured = pd.concat(frames)
    measured.to_csv(asked.out, index=False)
    print(markdown(summary(measured, by=("type", "setting", "metric"))))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
