"""What the extensions gain or lose: labels, held-out likelihood and time, against the default.

    python benchmarks/extensions.py [DATA.h5ad] [--batch-key batch] [--rows NAME ...]
        [--seeds 0 1 2 3 4] [--epochs 60] [--out extensions.csv]
    python benchmarks/extensions.py --measured A.csv B.csv    # the table of runs of before

Without a file it takes the cells that the package ships, labels in obs["cell_type"]. Ten labels of
each type are given; a seed chooses those, the fifth of the cells that nobody trains on, the first
weights and the draws. Differences are taken in pairs of a seed; the interval is Student's, of 95 %.
"""

import argparse
import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import pandas as pd

from pyro_scanvi import IWAE, SCANVAE, SCANVI, datasets, extensions
from pyro_scanvi.experiments import Settings, against, compare, summary
from pyro_scanvi.experiments.comparing import GIVEN, HIDDEN, Trial
from pyro_scanvi.extensions import flows
from pyro_scanvi.metrics import label_scores

N_DRAWS = 20  # of Bayes' rule
# Of the table. An ELBO of sites that all cells share has their KL, which counts whole over the few
# cells that are held out.
METRICS = ("accuracy", "macro_f1", "calibration_error", "marginal_ll", "bayes_accuracy")
LIKELIHOODS = {
    "poisson_lognormal": extensions.PoissonLogNormal,
    "generalised_poisson": extensions.GeneralisedPoisson,
}


def of(module_class: type[SCANVAE], **arguments: object) -> Settings:
    """A row that is a class, with arguments."""
    return Settings({"module_class": module_class, **arguments})


ROWS: dict[str, Settings] = {
    "default": Settings(),
    "MixturePrior": of(extensions.MixturePrior),
    "VampPrior": of(extensions.VampPrior),
    "FlowPrior": of(flows.FlowPrior),
    "WithoutU": of(extensions.WithoutU),
    "FullCovariancePosterior": of(extensions.FullCovariancePosterior),
    "LowRankPosterior": of(extensions.LowRankPosterior),
    "FlowPosterior": of(flows.FlowPosterior),
    "LearnedFrequencies": of(extensions.LearnedFrequencies),
    "DirichletFrequencies": of(extensions.DirichletFrequencies),
    "FrequenciesOfBatch": of(extensions.FrequenciesOfBatch),
    "GlobalTheta": of(extensions.GlobalTheta),
    "NormalWeights": of(extensions.NormalWeights),
    "HorseshoeWeights": of(extensions.HorseshoeWeights),
    "BatchEffect": of(extensions.BatchEffect),
    "nb": Settings({"gene_likelihood": "nb"}),
    "poisson_lognormal": Settings({"gene_likelihood": extensions.poisson_lognormal}),
    "generalised_poisson": Settings({"gene_likelihood": extensions.generalised_poisson}),
    "CovariateGate": of(extensions.CovariateGate),
    "IWAE": Settings(train={"objective": IWAE(5)}),
}


def scores(trial: Trial, model: SCANVI) -> Iterator[tuple[str, float]]:
    """Those of every comparison, and of Bayes' rule on the same cells, both ways."""
    yield from trial.scores(model)
    hidden = (trial.training.obs[GIVEN] == HIDDEN).to_numpy().nonzero()[0]
    truth = trial.training.obs[trial.truth].astype(str).to_numpy()[hidden]
    for method in ("bayes", "states"):
        arguments = {"method": method, "n_mc_samples": N_DRAWS, "seed": 0}
        soft = model.predict(indices=hidden, soft=True, **arguments)
        code = pd.Index(soft.columns.astype(str)).get_indexer(truth)
        for name, value in label_scores(code, soft.to_numpy()).items():
            yield f"{method}_{name}", value


def n_lines(part: object) -> int:
    """Lines of code, without docstrings, comments and empty ones."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return len(ast.unparse(tree).splitlines())


def lines_of(name: str) -> int:
    """Lines of a row's class, or of its likelihood; 0 where an argument is enough."""
    part = ROWS[name].model.get("module_class", LIKELIHOODS.get(name))
    return n_lines(part) if part else 0


def table(frame: pd.DataFrame) -> str:
    """Markdown: the default's means, and each extension's differences from them."""
    means = summary(frame).set_index(["setting", "metric"])
    changes = against(frame, "default").set_index(["setting", "metric"])

    def entry(name: str, metric: str) -> str:
        if name == "default":
            return f"{means.loc[(name, metric), 'mean']:.3f}"
        change = changes.loc[(name, metric)]
        return f"{change['difference']:+.3f} ± {change['high'] - change['difference']:.3f}"

    def row(name: str) -> list[str]:
        seconds = means.loc[(name, "seconds"), "mean"]
        return [name, str(lines_of(name)), *(entry(name, m) for m in METRICS), f"{seconds:.0f}"]

    head = ["", "lines", *METRICS, "seconds"]
    rows = [head, ["---"] * len(head), *map(row, frame["setting"].unique())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def measure(asked: argparse.Namespace) -> pd.DataFrame:
    """Train and score; every measurement is written."""
    plan = {"classification_ratio": 500.0}  # for few labels
    frame = compare(
        {name: ROWS[name] for name in dict.fromkeys(["default", *asked.rows])},
        ad.read_h5ad(asked.data) if asked.data else datasets.pbmc68k_counts(),
        asked.seeds,
        truth=asked.labels_key,
        common=Settings(train={"max_epochs": asked.epochs, "plan_kwargs": plan}),
        setup={"batch_key": asked.batch_key} if asked.batch_key else {},
        score=scores,
    )
    frame.to_csv(asked.out, index=False)
    return frame


def main() -> None:
    """Measure, or read what was measured, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--batch-key")
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("extensions.csv"))
    parser.add_argument("--measured", type=Path, nargs="+")
    asked = parser.parse_args()
    frame = pd.concat(map(pd.read_csv, asked.measured)) if asked.measured else measure(asked)
    print(table(frame))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
