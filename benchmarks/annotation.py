"""How well hidden cells are labelled, beside peers: accuracy, probabilities, islands, time.

    python benchmarks/annotation.py [demo|DATA.h5ad ...] [--regimes seed transfer]
        [--methods NAME ...] [--labels-key cell_type] [--batch-key batch]
        [--labels-per-type 10] [--seeds 0 1 2 3 4] [--peer scvi=PYTHON ...] [--scib PYTHON]
        [--out annotation.csv|annotation.json]
    python benchmarks/annotation.py --measured A.csv B.csv     # the table of runs of before

"demo" names the cells that the package ships. In the regime "seed" so many labels of each type are
given, at most half of a type, chosen by the seed; in "transfer" those of the largest batch. Methods
see the same cells and genes (2,000 that vary most, where there are more than 3,000), and are scored
on the hidden labels. A peer runs in an environment of its own, by a script of the folder peers/,
which says what it needs; a peer whose interpreter is not named is left out. So are, without
``--scib``, the scores of scib-metrics for the latent space.

A cell of a type of which no label is given counts as wrong.
"""

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors

from pyro_scanvi import ELBO, SCANVI, Layered, datasets
from pyro_scanvi.annotation.conformal import label_sets, thresholds_by_label, thresholds_overall
from pyro_scanvi.annotation.consensus import Consensus, fit_consensus, log_normalised
from pyro_scanvi.experiments.intervals import markdown, summary
from pyro_scanvi.metrics import label_scores, within_type_leak
from pyro_scanvi.model.objectives import Objective

GIVEN, HIDDEN = "given", "Unknown"
PEERS = Path(__file__).parent / "peers"
LAYERED = Layered()


@dataclass(frozen=True, eq=False)
class Task:
    """Cells of which some labels are given, in obs["given"]; the truth is kept apart."""

    name: str
    adata: ad.AnnData
    batch_key: str | None
    truth: np.ndarray
    seed: int

    @property
    def labelled(self) -> np.ndarray:
        """Whether the label of a cell is given, (N,)."""
        return (self.adata.obs[GIVEN] != HIDDEN).to_numpy()

    @property
    def classes(self) -> np.ndarray:
        """The labels that are given, sorted."""
        return np.unique(self.adata.obs[GIVEN].astype(str)[self.labelled])

    @property
    def labelled_in_twos(self) -> np.ndarray:
        """Whether another cell has the label too, (N,): others cannot be held out."""
        given = self.adata.obs[GIVEN].astype(str)
        return self.labelled & given.duplicated(keep=False).to_numpy()


@dataclass(frozen=True)
class Answer:
    """Probabilities of the classes of a task for each of its cells, and a latent space."""

    probabilities: np.ndarray
    latent: np.ndarray | None = None
    consensus: Consensus | None = None


Method = Callable[[Task], Answer]
Timed = tuple[Answer, float]


@lru_cache(maxsize=2)
def trained(task: Task, objective: Objective, ratio: float) -> SCANVI:
    """A model of this package, with the epochs of its defaults."""
    SCANVI.setup_anndata(task.adata, GIVEN, HIDDEN, batch_key=task.batch_key)
    plan = {"classification_ratio": ratio}
    model = SCANVI(task.adata, seed=task.seed)
    return model.train(objective=objective, plan_kwargs=plan, progress_bar=False)


def ours(method: str = "consensus", objective: Objective = LAYERED, ratio: float = 50.0) -> Method:
    """SCANVI of this package, labels by a method of predict."""

    def answer(task: Task) -> Answer:
        model = trained(task, objective, ratio)
        soft = model.predict(soft=True, method=method).to_numpy()
        consensus = model.consensus() if method == "consensus" else None
        return Answer(soft, model.get_latent_representation(), consensus)

    return answer


def one_rule(of_counts: bool) -> Method:
    """Half of the consensus: the rule of counts, or that of z."""

    def answer(task: Task) -> Answer:
        model = trained(task, LAYERED, 50.0)
        rules = model.consensus()
        if of_counts:
            return Answer(np.exp(rules.of_counts(log_normalised(task.adata.X.toarray()))))
        return Answer(np.exp(rules.of_latent(model.get_latent_representation())))

    return answer


def tuned_regression(task: Task) -> Answer:
    """Logistic regression on log-normalised counts: C by cross-validation, and a temperature."""
    counts, labels = normalised(task).X, task.adata.obs[GIVEN].astype(str).to_numpy()
    known = task.labelled
    code = pd.Index(task.classes).get_indexer(labels[known])
    tried = task.labelled_in_twos[known]
    folds = StratifiedKFold(5, shuffle=True, random_state=task.seed)

    def logits(C: float) -> np.ndarray:
        regression = LogisticRegression(C=C, max_iter=1000)
        soft = cross_val_predict(regression, counts[known], code, cv=folds, method="predict_proba")
        return np.log(soft[tried] + 1e-12)

    def loss(logits: np.ndarray, inverse_temperature: float = 1.0) -> float:
        scaled = log_softmax(inverse_temperature * logits, axis=1)
        return -scaled[np.arange(len(scaled)), code[tried]].mean()

    found = {C: logits(C) for C in np.logspace(-3, 2, 9)}
    best = min(found, key=lambda C: loss(found[C]))
    cold = minimize_scalar(partial(loss, found[best]), bounds=(0.05, 5), method="bounded").x
    regression = LogisticRegression(C=best, max_iter=1000).fit(counts[known], code)
    return Answer(softmax(cold * regression.predict_log_proba(counts), axis=1))


def normalised(task: Task) -> ad.AnnData:
    """Of 10,000 counts in each cell."""
    cells = ad.AnnData(task.adata.X.copy())
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells


def principal_components(task: Task) -> Answer:
    """A latent space without labels, for the leak; as labels the shares of those given."""
    cells = normalised(task)
    sc.pp.pca(cells, 20, random_state=task.seed)
    given = task.adata.obs[GIVEN].astype(str)[task.labelled]
    shares = given.value_counts(normalize=True)[task.classes].to_numpy()
    return Answer(np.tile(shares, (cells.n_obs, 1)), cells.obsm["X_pca"])


OURS: dict[str, Method] = {
    "defaults": ours(),
    "rule of counts alone": one_rule(of_counts=True),
    "rule of z alone": one_rule(of_counts=False),
    "classifier": ours("classifier"),
    "paper's ELBO, classifier, ratio 500": ours("classifier", ELBO(), 500.0),
}
HERE: dict[str, Method] = {
    **OURS,
    "logistic regression": tuned_regression,
    "majority, PCA": principal_components,
}
THERE = {  # name: peer, its method
    "SCANVI from SCVI": ("scvi", "from_scvi"),
    "SCANVI from SCVI, 100 epochs": ("scvi", "longer"),
    "SCANVI from scratch": ("scvi", "scratch"),
    "SCANVI, popV's settings": ("scvi", "popv"),
    "kNN on SCVI": ("scvi", "knn"),
    "CellTypist": ("celltypist", "lr"),
    "CellTypist, SGD, balanced": ("celltypist", "sgd"),
}


def of_peer(task: Task, peer: str, methods: Sequence[str], python: str) -> Iterator[Timed]:
    """What a peer answers, in its own environment, and its seconds without the start of Python."""
    with tempfile.TemporaryDirectory() as folder:
        source, batch = Path(folder) / "cells.h5ad", task.batch_key
        ad.AnnData(task.adata.X, task.adata.obs, task.adata.var).write_h5ad(source)
        script = PEERS / f"{peer}_peer.py"
        call = [python, script, source, folder, str(task.seed), batch or "-", *methods]
        subprocess.run(list(map(str, call)), check=True, capture_output=True, text=True)
        for method in methods:
            with np.load(Path(folder) / f"{method}.npz") as found:
                order = [list(found["classes"]).index(name) for name in task.classes]
                answer = Answer(found["probabilities"][:, order], found.get("latent"))
                yield answer, float(found["seconds"])


def scores(task: Task, answer: Answer) -> Iterator[tuple[str, float]]:
    """Of the hidden cells; a cell whose type has no given label is wrong, at a loss of 20 nats."""
    hidden = ~task.labelled
    code = pd.Index(task.classes).get_indexer(task.truth[hidden])
    soft = answer.probabilities[hidden]
    yield from label_scores(code, soft).items()
    right = np.where(code < 0, 0.0, soft[np.arange(len(code)), code])
    yield "nll", float(-np.log(right.clip(np.exp(-20))).mean())
    if answer.latent is not None:
        yield "leak", float(within_type_leak(answer.latent, task.truth, task.labelled).mean())
    if answer.consensus is not None:
        yield from covered(answer.consensus, code[code >= 0], soft[code >= 0])
        alarms = answer.consensus.novelty.rank(answer.latent[hidden][code >= 0]) > 0.95
        yield "false_alarms", float(alarms.mean())
        yield from found_new(task, answer)


def of_latent(task: Task, latent: np.ndarray, python: str) -> dict[str, float]:
    """Scores of scib-metrics, which has an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        space, found = Path(folder) / "space.npz", Path(folder) / "scores.json"
        one = np.zeros(len(latent), str)
        batch = one if task.batch_key is None else task.adata.obs[task.batch_key].astype(str)
        np.savez(space, latent=latent, truth=task.truth.astype(str), batch=np.array(batch, str))
        call = [python, str(PEERS / "scib_scores.py"), str(space), str(found)]
        subprocess.run(call, check=True, capture_output=True)
        return json.loads(found.read_text())


def covered(
    rules: Consensus, code: np.ndarray, soft: np.ndarray, asked: float = 0.9
) -> Iterator[tuple[str, float]]:
    """How often sets hold the label, and how large they are; of all cells, and by type."""
    limits = {
        "": thresholds_overall(rules.score, rules.label, soft.mean(0), asked),
        "_by_type": thresholds_by_label(rules.score, rules.label, soft.shape[1], asked),
    }
    for name, limit in limits.items():
        within = label_sets(soft, limit)
        holds = pd.Series(within[np.arange(len(code)), code])
        yield f"coverage{name}", float(holds.mean())
        yield f"mean_of_types{name}", float(holds.groupby(code).mean().mean())
        yield f"set_size{name}", float(within.sum(1).mean())


def found_new(task: Task, answer: Answer) -> Iterator[tuple[str, float]]:
    """AUROC of hidden cells of a type none of whose labels is given, each type in turn.

    The default objective learns z without labels, so that z stays what it is.
    """
    given, hidden = task.adata.obs[GIVEN].astype(str).to_numpy(), ~task.labelled
    found = []
    for name in task.classes:
        known, new = task.labelled & (given != name), task.truth[hidden] == name
        if len(set(given[known])) < 2 or not 5 <= new.sum() < len(new):
            continue
        code = pd.Index(sorted(set(given[known]))).get_indexer(given[known])
        kept = fit_consensus(task.adata.X[known], answer.latent[known], code)
        z = answer.latent[hidden]
        logits = kept.of_counts(log_normalised(task.adata.X[hidden].toarray())) + kept.of_latent(z)
        nearest = NearestNeighbors(n_neighbors=5).fit(answer.latent[known])
        ways = {
            "new_by_distance": kept.novelty.score(z),
            "new_by_confidence": -log_softmax(logits / 2, axis=1).max(1),
            "new_by_neighbours": nearest.kneighbors(z)[0].mean(1),
        }
        found.append({way: roc_auc_score(new, score) for way, score in ways.items()})
    yield from pd.DataFrame(found).mean().items()


def make_task(
    name: str, adata: ad.AnnData, regime: str, keys: tuple[str, str | None], n: int, seed: int
) -> Task:
    """Hide labels; the given AnnData stays as it is."""
    labels_key, batch_key = keys
    truth = adata.obs[labels_key].astype(str)
    if regime == "seed":
        given = datasets.hide_labels(truth, n, seed)
    else:
        batch = adata.obs[batch_key].astype(str)
        given = truth.where(batch == batch.value_counts().index[0], HIDDEN)
    obs = pd.DataFrame({GIVEN: given.astype("category")}, index=adata.obs_names)
    if batch_key is not None:
        obs[batch_key] = adata.obs[batch_key]
    cells = ad.AnnData(adata.X.copy(), obs, adata.var[[]].copy())
    return Task(f"{name}, {regime}", cells, batch_key, truth.to_numpy(), seed)


def of_file(path: Path, keys: tuple[str, str]) -> tuple[str, ad.AnnData, str | None]:
    """Name, counts of the 2,000 genes that vary most if there are over 3,000, and batch key."""
    adata = datasets.pbmc68k_counts() if path.name == "demo" else ad.read_h5ad(path)
    if adata.n_vars > 3000:
        normal = adata.copy()
        sc.pp.normalize_total(normal, target_sum=1e4)
        sc.pp.log1p(normal)
        sc.pp.highly_variable_genes(normal, n_top_genes=2000)
        adata = adata[:, normal.var["highly_variable"].to_numpy()].copy()
    return path.stem, adata, keys[1] if _crossed(adata.obs, *keys) else None


def _crossed(obs: pd.DataFrame, labels_key: str, batch_key: str) -> bool:
    """Whether there are batches, and none of a single type: those would be the types."""
    if batch_key not in obs or obs[batch_key].nunique() < 2:
        return False
    return obs.groupby(batch_key, observed=True)[labels_key].nunique().min() > 1


def answers(
    task: Task, methods: Sequence[str], peers: dict[str, str]
) -> Iterator[tuple[str, Timed]]:
    """Of each method in turn; those of one peer come from one process."""
    for method in methods:
        if method in HERE:
            start = time.perf_counter()
            answer = HERE[method](task)
            yield method, (answer, time.perf_counter() - start)
    for peer, python in peers.items():
        names = {m: THERE[m][1] for m in methods if m in THERE and THERE[m][0] == peer}
        yield from zip(names, of_peer(task, peer, [*names.values()], python), strict=True)


def tasks(asked: argparse.Namespace) -> Iterator[Task]:
    """Each seed of each file and regime: if it is stopped, whole seeds are there."""
    keys = asked.labels_key, asked.batch_key
    files = [of_file(path, keys) for path in asked.data]
    for seed in asked.seeds:
        for (name, adata, batch_key), regime in product(files, asked.regimes):
            if regime == "seed" or batch_key is not None:
                hidden = asked.labels_key, batch_key
                yield make_task(name, adata, regime, hidden, asked.labels_per_type, seed)


def measure(asked: argparse.Namespace) -> pd.DataFrame:
    """Every measurement; it is written after each, so that a run can be stopped."""
    peers = dict(entry.split("=", 1) for entry in asked.peer)
    rows: list[dict] = []
    for task in tasks(asked):
        for method, (answer, seconds) in answers(task, asked.methods, peers):
            key = {"data": task.name, "seed": task.seed, "setting": method}
            found = dict(scores(task, answer)) | {"seconds": seconds}
            if asked.scib and answer.latent is not None:
                found |= of_latent(task, answer.latent, asked.scib)
            rows += [key | {"metric": metric, "value": value} for metric, value in found.items()]
            write(pd.DataFrame(rows), asked.out)
            print(task.name, task.seed, method, flush=True)
    return pd.DataFrame(rows)


def write(frame: pd.DataFrame, path: Path) -> None:
    """As the name of the file says."""
    if path.suffix == ".json":
        frame.to_json(path, orient="records", indent=1)
    else:
        frame.to_csv(path, index=False)


def read(path: Path) -> pd.DataFrame:
    """What was written."""
    return pd.read_json(path) if path.suffix == ".json" else pd.read_csv(path)


def table(frame: pd.DataFrame) -> str:
    """Markdown: means and 95 % intervals over seeds, by data and method."""
    return markdown(summary(frame, by=("data", "setting", "metric")))


def main() -> None:
    """Measure, or read what was measured, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", type=Path, default=[Path("demo")])
    parser.add_argument("--regimes", nargs="+", default=["seed"], choices=["seed", "transfer"])
    parser.add_argument("--methods", nargs="+", default=[*HERE, *THERE], choices=[*HERE, *THERE])
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--labels-per-type", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--peer", nargs="*", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--scib", metavar="PYTHON", help="that has scib-metrics")
    parser.add_argument("--out", type=Path, default=Path("annotation.csv"))
    parser.add_argument("--measured", type=Path, nargs="+")
    asked = parser.parse_args()
    frame = pd.concat(map(read, asked.measured)) if asked.measured else measure(asked)
    print(table(frame))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
