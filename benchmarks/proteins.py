"""What a second modality is worth where the genes do not tell two types apart, on simulated cells.

    python benchmarks/proteins.py [--seeds 0 1 2 3 4] [--epochs 60] [--out proteins.csv]

Type A differs from B1 and B2 by its genes, B1 from B2 by its proteins alone, of which a fifth of
the cells have none. Twenty labels of each type are given; hidden B1 and B2 are scored.
"""

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi import SCANVI
from pyro_scanvi.experiments import Settings, against, compare, markdown, summary
from pyro_scanvi.experiments.comparing import GIVEN, HIDDEN, Trial
from pyro_scanvi.extensions import Proteins

N_CELLS, N_GENES, N_PROTEINS = 560, 40, 6
LACKING = 0.2
ROWS = {
    "genes alone": Settings(),
    "Proteins": Settings({"module_class": Proteins}),
    "Proteins(encode=True)": Settings({"module_class": Proteins, "encode": True}),
}


def simulated(seed: int) -> ad.AnnData:
    """Negative binomial counts of both modalities; a protein is eight times background, or not."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=N_CELLS)
    profiles = np.exp(rng.normal(scale=0.8, size=(2, N_GENES)))
    profiles /= profiles.sum(1, keepdims=True)
    sizes = rng.lognormal(np.log(300), 0.3, size=(N_CELLS, 1))
    x = rng.poisson(rng.gamma(2, profiles[np.minimum(kind, 1)] * sizes / 2)).astype(np.float32)
    x[:, 0] += 1  # no empty cell
    on = rng.random((3, N_PROTEINS)) < 0.5
    on[2] = ~on[1]
    background = rng.lognormal(np.log(10), 0.5, size=N_PROTEINS)
    proteins = rng.poisson(rng.gamma(2, np.where(on[kind], 8, 1) * background / 2)).astype(float)
    proteins[rng.random(N_CELLS) < LACKING] = np.nan
    obs = pd.DataFrame({"cell_type": np.array(["A", "B1", "B2"])[kind]})
    obs.index = [f"cell{i}" for i in range(N_CELLS)]
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
    return ad.AnnData(x, obs, var, obsm={"protein": proteins})


def scores(trial: Trial, model: SCANVI) -> Iterator[tuple[str, float]]:
    """Share of hidden B1 and B2, with proteins and without, that is labelled rightly."""
    cells = trial.training
    truth = cells.obs[trial.truth].to_numpy()
    hidden = (cells.obs[GIVEN] == HIDDEN).to_numpy() & (truth != "A")
    measured = ~np.isnan(cells.obsm["protein"]).all(1)
    answers = {
        "classifier": model.predict(),
        "bayes": model.predict(method="bayes", n_mc_samples=50, seed=0),
    }
    for name, labels in answers.items():
        right = labels == truth
        yield f"{name}, proteins", right[hidden & measured].mean()
        yield f"{name}, none", right[hidden & ~measured].mean()


def main() -> None:
    """Train, write every measurement, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("proteins.csv"))
    asked = parser.parse_args()
    common = Settings({"n_hidden": 64}, {"max_epochs": asked.epochs, "batch_size": 64})
    frames = [
        compare(
            ROWS,
            simulated(seed),
            [seed],
            n_per_label=20,
            common=common,
            setup={"extra": {"protein": "obsm/protein"}},
            score=scores,
        )
        for seed in asked.seeds
    ]
    measured = pd.concat(frames)
    measured.to_csv(asked.out, index=False)
    print(markdown(summary(measured)), end="\n\n")
    print(markdown(against(measured, "genes alone")))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
