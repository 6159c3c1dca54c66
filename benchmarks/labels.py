"""What coarse labels, a model of wrong labels, and partial answers are worth.

    python benchmarks/labels.py [DATA.h5ad --parents CHILD=PARENT ...] [--batch-key batch]
        [--seeds 0 1 2 3 4] [--epochs 60] [--out labels.csv]

Three comparisons, scored on cells whose label nobody gave:
- coarse: ten labels of each type, and of half of the other cells the parent, or nothing;
- noise: twenty labels of each type, of which 40 % were drawn anew from all types; label_noise= says
  nothing of it, learns a rate, or knows the matrix;
- answers: ten labels of each type; predict(confidence=0.9) with the parents as sets.
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
from pyro_scanvi.experiments import Settings, against, compare, markdown, summary
from pyro_scanvi.experiments.comparing import GIVEN, HIDDEN, Trial
from pyro_scanvi.metrics import label_scores
from pyro_scanvi.model.label_noise import FixedNoise

REDRAWN = 0.4
CONFIDENCE = 0.9
PARENTS_OF_DEMO = {
    "CD4+/CD25 T Reg": "T cell",
    "CD4+/CD45RA+/CD25- Naive T": "T cell",
    "CD4+/CD45RO+ Memory": "T cell",
    "CD8+ Cytotoxic T": "T cell",
    "CD8+/CD45RA+ Naive Cytotoxic": "T cell",
    "CD14+ Monocyte": "Myeloid",
    "Dendritic": "Myeloid",
}


@dataclass(frozen=True)
class Tree:
    """Parents of types; the columns of truth and of coarser labels."""

    parents: Mapping[str, str]
    truth: str

    def coarse(self, adata: ad.AnnData, seed: int, told: bool = True) -> Mapping[str, Any]:
        """Half of the cells without a label get the parent of theirs, and are not scored."""
        rng = np.random.default_rng(seed)
        hidden = (adata.obs[GIVEN] == HIDDEN).to_numpy()
        chosen = hidden & (rng.random(adata.n_obs) < 0.5)
        adata.obs["scored"] = hidden & ~chosen
        if not told:
            return {}
        fine = adata.obs[self.truth].astype(str)
        broad = fine.map(lambda name: self.parents.get(name, name))
        adata.obs["broad"] = broad.where(chosen | ~hidden, HIDDEN)
        return {"coarse_labels_key": "broad"}

    def noise(self, adata: ad.AnnData, seed: int) -> Mapping[str, Any]:
        """Of the given labels a share is drawn anew."""
        rng = np.random.default_rng(seed)
        given = adata.obs[GIVEN].astype(str).to_numpy(dtype=object)
        adata.obs["scored"] = given == HIDDEN
        redrawn = (given != HIDDEN) & (rng.random(len(given)) < REDRAWN)
        types = np.unique(adata.obs[self.truth].astype(str))
        given[redrawn] = rng.choice(types, redrawn.sum())
        adata.obs[GIVEN] = given
        return {"labels": list(types)}

    def scores(self, trial: Trial, model: SCANVI) -> Iterator[tuple[str, float]]:
        """Of the cells to be scored."""
        scored = trial.training.obs["scored"].to_numpy()
        truth = trial.training.obs[self.truth].astype(str).to_numpy()[scored]
        soft = model.predict(soft=True).loc[scored]
        code = pd.Index(soft.columns.astype(str)).get_indexer(truth)
        yield from label_scores(code, soft.to_numpy()).items()

    def answers(self, trial: Trial, model: SCANVI) -> Iterator[tuple[str, float]]:
        """How many answers are labels, parents, none; and how many of each are right."""
        hidden = (trial.training.obs[GIVEN] == HIDDEN).to_numpy()
        truth = trial.training.obs[self.truth].astype(str).to_numpy()[hidden]
        leaves = model.predict().astype(str)[hidden]
        found = model.predict(confidence=CONFIDENCE).astype(str)[hidden]
        parents = np.array([self.parents.get(name, name) for name in truth])
        is_set = np.isin(found, list(set(self.parents.values())))
        is_leaf = ~is_set & (found != HIDDEN)
        yield "leaves, share", is_leaf.mean()
        yield "parents, share", is_set.mean()
        yield "leaves, right", (found == truth)[is_leaf].mean()
        yield "parents, right", (found == parents)[is_set].mean()
        yield "their leaves, right", (leaves == truth)[is_set].mean()
        yield "unknown, their leaves right", (leaves == truth)[found == HIDDEN].mean()


def true_matrix(n_labels: int) -> np.ndarray:
    """How the labels of :meth:`Tree.noise` err."""
    return np.eye(n_labels) * (1 - REDRAWN) + REDRAWN / n_labels


def main() -> None:
    """Train, write every measurement, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--batch-key")
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--parents", nargs="+", help="CHILD=PARENT ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("labels.csv"))
    asked = parser.parse_args()
    parents = dict(entry.split("=") for entry in asked.parents or []) or PARENTS_OF_DEMO
    adata = ad.read_h5ad(asked.data) if asked.data else datasets.pbmc68k_counts()
    tree, n_labels = Tree(parents, asked.labels_key), adata.obs[asked.labels_key].nunique()
    sets = {name: [c for c, p in parents.items() if p == name] for name in set(parents.values())}
    plan = {"classification_ratio": 500.0}
    run = partial(
        compare,
        adata=adata,
        seeds=asked.seeds,
        truth=asked.labels_key,
        common=Settings(train={"max_epochs": asked.epochs, "plan_kwargs": plan}),
    )
    setup = {"batch_key": asked.batch_key} if asked.batch_key else {}
    known = partial(FixedNoise, matrix=true_matrix(n_labels))
    coarse = run(
        {
            "fine labels alone": Settings(prepare=partial(tree.coarse, told=False)),
            "coarse labels too": Settings(prepare=tree.coarse),
        },
        setup=setup,
        score=tree.scores,
    )
    noise = run(
        {
            "no noise": Settings(prepare=tree.noise),
            "rate": Settings({"label_noise": "rate"}, prepare=tree.noise),
            "known matrix": Settings({"label_noise": known}, prepare=tree.noise),
        },
        n_per_label=20,
        setup=setup,
        score=tree.scores,
    )
    answers = run(
        {"confidence": Settings()}, setup=setup | {"label_sets": sets}, score=tree.answers
    )
    frames = {"coarse": coarse, "noise": noise, "answers": answers}
    pd.concat(f.assign(comparison=name) for name, f in frames.items()).to_csv(asked.out)
    for frame in frames.values():
        print(markdown(summary(frame)), end="\n\n")
    print(markdown(against(coarse, "fine labels alone")), end="\n\n")
    print(markdown(against(noise, "no noise")))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
