"""Run the bench of pyro_scanvi.experiments on a data set: CSV, PNG and tables with intervals.

    python benchmarks/experiments.py OUTPUT                              # the demo's 700 cells
    python benchmarks/experiments.py OUTPUT --adata cells.h5ad --truth cell_type
    python benchmarks/experiments.py OUTPUT --only gradients nuts --seeds 5

Each experiment writes OUTPUT/NAME.csv (a row for each measurement), NAME.png and NAME.md (means
with 95 % intervals, and what it took). Seconds are those of the processor.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata as ad
import matplotlib
import pandas as pd

from pyro_scanvi import ELBO, SCANVI, datasets, experiments
from pyro_scanvi.experiments import Settings

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

Finished = tuple[pd.DataFrame, dict[str, pd.DataFrame], Callable]


@dataclass
class Bench:
    """The data, and one trained model for what is asked of fixed weights."""

    given: argparse.Namespace

    @cached_property
    def adata(self) -> ad.AnnData:
        """The cells of the file, or of the demo."""
        path = self.given.adata
        return datasets.pbmc68k_counts() if path is None else ad.read_h5ad(path)

    @cached_property
    def common(self) -> Settings:
        """What all trainings share."""
        given = self.given
        plan = {"classification_ratio": 500.0, "lr": given.lr}
        model = {"n_latent": given.latent, "n_hidden": given.hidden}
        return Settings(model, {"max_epochs": given.epochs, "plan_kwargs": plan})

    @property
    def setup(self) -> dict:
        """What all models read."""
        return {"n_top_genes": self.given.genes} if self.given.genes else {}

    @cached_property
    def model(self) -> SCANVI:
        """Trained for --trained epochs."""
        cells = self.adata.copy()
        cells.obs["given"] = datasets.hide_labels(cells.obs[self.given.truth], 10, seed=0)
        SCANVI.setup_anndata(cells, "given", "Unknown", **self.setup)
        train = {**self.common.train, "max_epochs": self.given.trained}
        return SCANVI(cells, **self.common.model).train(
            train_size=1.0, objective=ELBO(), progress_bar=False, **train
        )


def gradients(bench: Bench) -> Finished:
    """Noise of the gradient by part."""
    seeds = range(bench.given.seeds)
    frame = experiments.gradient_noise(bench.model, n_pairs=bench.given.pairs, seeds=seeds)
    return frame, {"noise": experiments.noise_summary(frame)}, experiments.plot_gradient_noise


def compared(name: str) -> Callable[[Bench], Finished]:
    """A table of settings, and the differences from its baseline."""

    def run(bench: Bench) -> Finished:
        asked = bench.given.settings
        settings = {
            k: s
            for k, s in experiments.TABLES[name].items()
            if k == "default" or not asked or k in asked
        }
        frame = experiments.compare(
            settings,
            bench.adata,
            range(bench.given.seeds),
            truth=bench.given.truth,
            common=bench.common,
            setup=bench.setup,
            n_mc_samples=25,
        )
        tables = {
            "means": experiments.summary(frame),
            "differences from default": experiments.against(frame, "default"),
        }
        return frame, tables, lambda f, ax: experiments.plot_differences(f, "default", ax=ax)

    return run


def amortisation(bench: Bench) -> Finished:
    """Gaps of approximation and amortisation."""
    frame = experiments.amortisation_gaps(
        bench.model,
        n_cells=bench.given.cells,
        seeds=range(bench.given.seeds),
        fit=experiments.Fit(n_steps=bench.given.steps, n_draws=500),
    )
    tables = {
        "over cells": experiments.summary(frame, unit="cell"),
        "over seeds": experiments.summary(frame),
    }
    return frame, tables, experiments.plot_amortisation_gaps


def nuts(bench: Bench) -> Finished:
    """The truth of a few cells."""
    frame = experiments.nuts_against_guide(
        bench.model,
        n_cells=2,
        seeds=range(max(bench.given.seeds, 2)),
        n_draws=bench.given.draws,
        n_warmup=bench.given.draws,
        max_tree_depth=5,
    )
    by, absolute = ("setting", "cell", "metric"), frame.assign(value=frame["value"].abs())
    title = "over dimensions, mean difference without its sign"
    tables = {title: experiments.summary(absolute, by, unit="dim")}
    return frame, tables, experiments.plot_nuts_against_guide


EXPERIMENTS: dict[str, Callable[[Bench], Finished]] = {
    "gradients": gradients,
    "amortisation": amortisation,
    "nuts": nuts,
    **{name: compared(name) for name in experiments.TABLES},
}


def lines(name: str, tables: dict[str, pd.DataFrame], seconds: float) -> Iterator[str]:
    """Of the Markdown."""
    yield f"## {name} ({seconds:.0f} s of the processor)"
    for title, table in tables.items():
        yield f"\n{title}\n\n{experiments.markdown(table)}"


def main() -> None:
    """Read the arguments, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--adata", type=Path, help="an .h5ad with raw counts; the demo's if none")
    parser.add_argument("--truth", default="cell_type", help="column of obs with the labels")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--settings", nargs="+", help="rows of the tables; all if none")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--genes", type=int, default=0, help="most variable genes; 0 is all")
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="where a row says no other")
    parser.add_argument("--epochs", type=int, default=150, help="of each row of a table")
    parser.add_argument("--trained", type=int, default=150, help="epochs of the model asked about")
    parser.add_argument("--pairs", type=int, default=10, help="of gradients, of each seed")
    parser.add_argument("--cells", type=int, default=8, help="of the amortisation gap")
    parser.add_argument("--steps", type=int, default=1000, help="of each posterior of a cell")
    parser.add_argument("--draws", type=int, default=300, help="of NUTS, in each chain")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*one batch.*")
    bench = Bench(given)
    for name in given.only:
        start = time.process_time()
        frame, tables, plot = EXPERIMENTS[name](bench)
        text = "\n".join(lines(name, tables, time.process_time() - start))
        frame.to_csv(given.output / f"{name}.csv", index=False)
        (given.output / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        figure, axis = plt.subplots(figsize=(9, 6))
        plot(frame, ax=axis)
        figure.tight_layout()
        figure.savefig(given.output / f"{name}.png", dpi=150)
        plt.close(figure)
        print(text, flush=True)


if __name__ == "__main__":
    main()
