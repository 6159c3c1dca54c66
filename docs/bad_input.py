"""Write docs/bad_input.md: ``python docs/bad_input.py`` gives each bad input and notes the error.

Every row is a call that is made here, so what the page says is what the package says; a test
(``tests/docs/test_bad_input.py``) makes the calls again and compares.
"""

import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi import SCANVI
from pyro_scanvi.extensions import marker_labels

PAGE = Path(__file__).parent / "bad_input.md"
HEAD = """# What an error means, and what to do

You gave something that the package refuses. It says so before anything is trained or changed, and
here is for each what it says, word for word, and what helps. The page is written by
`docs/bad_input.py`, which makes each of these mistakes. What is no error, but may surprise, is in
[annotating.md](annotating.md#what-comes-and-what-happens).

The data of the examples are 60 cells, `cell0` to `cell59`, of 12 genes, `gene0` to `gene11`, with
the types B, NK and T in `obs["cell_type"]`, "Unknown" for some, and two donors.
"""
SMALL = {"n_hidden": 8, "n_latent": 3}


def cells(n: int = 60, n_genes: int = 12) -> ad.AnnData:
    """Small data without a mistake."""
    rng = np.random.default_rng(0)
    x = rng.poisson(3, size=(n, n_genes)).astype(np.float32)
    x[:, 0] += 1  # no cell is empty
    kind = np.array(["B", "NK", "T"])[np.arange(n) % 3]
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n)])
    obs["cell_type"] = np.where(np.arange(n) % 5 < 2, "Unknown", kind)
    obs["donor"] = np.array(["one", "two"])[np.arange(n) % 2]
    obs["age"] = np.arange(n) / 10
    return ad.AnnData(x, obs, pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]))


def setup(change: Callable[[ad.AnnData], Any] = lambda adata: None, **arguments: Any) -> ad.AnnData:
    """Set up cells that were changed before."""
    adata = cells()
    adata = adata if (changed := change(adata)) is None else changed
    given = {"labels_key": "cell_type", "unlabeled_category": "Unknown"} | arguments
    SCANVI.setup_anndata(adata, **given)
    return adata


def model(trained: bool = True, **arguments: Any) -> SCANVI:
    """A small model, whose weights are meant as they are."""
    found = SCANVI(setup(), **SMALL, **arguments)
    found.is_trained = trained
    return found


@functools.cache
def asked() -> SCANVI:
    """The model that questions are put to; none of them changes it."""
    return model()


def setting(place: str, key: str, value: Any) -> Callable[[ad.AnnData], None]:
    """A change of one column."""

    def change(adata: ad.AnnData) -> None:
        getattr(adata, place)[key] = value

    return change


def counts(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[ad.AnnData], None]:
    """A change of the counts."""
    return lambda adata: setattr(adata, "X", function(adata.X))


def at(x: np.ndarray, value: float, where: Any = (3, 4)) -> np.ndarray:
    """The counts with another value at one place."""
    changed = x.copy()
    changed[where] = value
    return changed


def renamed(adata: ad.AnnData, axis: str, names: dict[str, str]) -> None:
    """Other names of cells ("obs_names") or genes ("var_names")."""
    setattr(adata, axis, [names.get(name, name) for name in getattr(adata, axis)])


def labels(change: dict[str, str]) -> Callable[[ad.AnnData], None]:
    """Other names of labels."""
    return lambda adata: setting("obs", "cell_type", adata.obs["cell_type"].replace(change))(adata)


def coarse() -> list[str]:
    """Names above the labels, one of them for unlabelled cells alone."""
    above = {"B": "lymphocyte", "NK": "lymphocyte", "T": "lymphocyte", "Unknown": "stroma"}
    return [above[label] for label in cells().obs["cell_type"]]


def query(adata: ad.AnnData, **arguments: Any) -> SCANVI:
    """A model of new cells on the trained one."""
    return SCANVI.load_query_data(adata, asked(), **arguments)


def changed_since(change: Callable[[ad.AnnData], Any], ask: Callable[[SCANVI], Any]) -> Any:
    """Ask a model whose AnnData was changed since it was made."""
    found = model()
    change(found.adata)
    return ask(found)


def unseen(key: str, value: str, **arguments: Any) -> Any:
    """Ask of new cells in which a column has a value that the model has not seen."""
    adata = setup(**arguments)
    found = SCANVI(adata, **SMALL)
    found.is_trained = True
    new = adata[:10].copy()
    new.obs[key] = value
    return found.get_normalized_expression(new)


def damaged() -> SCANVI:
    """Open a saved model of which a byte is missing."""
    adata = cells()
    asked().save("saved")
    file = Path("saved", "weights.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    return SCANVI.load("saved", adata)


@dataclass(frozen=True)
class Case:
    """A row: what was given, the call that gives it, what to do."""

    given: str
    call: Callable[[], Any]
    mend: str


CASES: dict[str, list[Case]] = {
    "Counts": [
        Case(
            "log-normalised values in `X`",
            lambda: setup(counts(lambda x: np.log1p(x / x.sum(1, keepdims=True) * 1e4))),
            "give raw counts: `layer=`, `use_raw=True`, or the file before `sc.pp.log1p`",
        ),
        Case(
            "normalised values, without the logarithm",
            lambda: setup(counts(lambda x: x / x.sum(1, keepdims=True) * 1e4)),
            "give the counts from before `sc.pp.normalize_total`",
        ),
        Case(
            "negative numbers (scaled or corrected for batches)",
            lambda: setup(counts(lambda x: at(x, -1.0))),
            "give raw counts; the model takes care of batches itself (`batch_key=`)",
        ),
        Case(
            "NaN among the counts",
            lambda: setup(counts(lambda x: at(x, np.nan))),
            "find out why; `np.nan_to_num` if it means zero",
        ),
        Case(
            "a cell without a count",
            lambda: setup(counts(lambda x: at(x, 0, 3))),
            "`adata = pyro_scanvi.drop_empty_cells(adata)`",
        ),
        Case(
            "`layer=` of a name that is not there",
            lambda: setup(setting("layers", "counts", cells().X), layer="count"),
            "one of the names in `adata.layers`",
        ),
        Case(
            "`use_raw=True` where there is no raw",
            lambda: setup(use_raw=True),
            "leave it out, if the counts stand in `X`",
        ),
    ],
    "Names of cells and genes": [
        Case(
            "two cells of one name",
            lambda: setup(lambda a: renamed(a, "obs_names", {"cell1": "cell0"})),
            "`adata.obs_names_make_unique()`",
        ),
        Case(
            "two genes of one name",
            lambda: setup(lambda a: renamed(a, "var_names", {"gene1": "gene0"})),
            "`adata.var_names_make_unique()`",
        ),
    ],
    "Labels": [
        Case(
            "a column that is not there",
            lambda: setup(labels_key="celltype"),
            "the name of a column of `adata.obs`",
        ),
        Case(
            "an `unlabeled_category` that no cell has, where another name means it",
            lambda: setup(labels({"Unknown": "unassigned"})),
            "the line of the message, or `unlabeled_category` as it is in the column",
        ),
        Case(
            "no label at all",
            lambda: setup(setting("obs", "cell_type", "Unknown")),
            "label some cells of two types or more: `marker_labels` does by marker genes",
        ),
        Case(
            "one label only",
            lambda: setup(labels({"NK": "B", "T": "B"})),
            "name types that exist: `labels=[...]`; label a cell of each",
        ),
        Case(
            "a column of coarser labels, one of which no cell shows the meaning of",
            lambda: setup(setting("obs", "coarse", coarse()), coarse_labels_key="coarse"),
            "say what it stands for: `label_sets=`",
        ),
        Case(
            "soft labels that are no probabilities",
            lambda: setup(setting("obsm", "soft", np.full((60, 3), -0.1)), soft_labels_key="soft"),
            "numbers from 0 on, a column for each label",
        ),
    ],
    "Other columns": [
        Case(
            "a `batch_key` with missing values",
            lambda: setup(
                setting("obs", "donor", [None, *["one", "two"] * 29, "one"]), batch_key="donor"
            ),
            "fill them: a name of their own for cells of no known batch",
        ),
        Case(
            "a continuous covariate of words",
            lambda: setup(continuous_covariate_keys=["donor"]),
            "`categorical_covariate_keys=`",
        ),
        Case(
            "a covariate that is not finite",
            lambda: setup(setting("obs", "age", np.inf), continuous_covariate_keys=["age"]),
            "numbers; drop the cells or fill them",
        ),
        Case(
            "`extra=` with a place that is none",
            lambda: setup(extra={"protein": "protein"}),
            '"obsm/...", "layers/..." or "obs/..."',
        ),
    ],
    "The model": [
        Case(
            "an AnnData that was not set up",
            lambda: SCANVI(cells()),
            "`SCANVI.setup_anndata(adata, ...)` first",
        ),
        Case(
            "a misspelt argument",
            lambda: model(n_latnet=10),
            "the name that the message gives",
        ),
        Case(
            "an argument that the data give",
            lambda: model(n_labels=4),
            "leave it out; further types are `setup_anndata(labels=[...])`",
        ),
        Case(
            "a likelihood that is none",
            lambda: model(gene_likelihood="normal"),
            "one of the names, or a part of your own ([extending.md](extending.md))",
        ),
        Case(
            "a size that is none",
            lambda: model(dropout_rate=1.5),
            "a rate from 0 on, below 1",
        ),
    ],
    "Training": [
        Case(
            "a setting of the plan that is none",
            lambda: model().train(1, plan_kwargs={"learning_rate": 1e-3}),
            'its name here, `"lr"`',
        ),
        Case(
            "early stopping without held-out cells",
            lambda: model().train(1, early_stopping=True, train_size=1.0),
            "leave `train_size` out, or say `validation_size`",
        ),
        Case(
            "a number of epochs that is none",
            lambda: model().train(-1),
            "a whole number",
        ),
        Case(
            "`ckpt_path=` of a file that is not there",
            lambda: model().train(1, ckpt_path="run.ckpt"),
            '`"last"` takes the newest of `checkpoint_dir`, if there is one',
        ),
    ],
    "Questions": [
        Case(
            "a model that was never trained",
            lambda: model(trained=False).predict(),
            "`model.train()`; `model.is_trained = True` if the weights are meant as they are",
        ),
        Case(
            "cells that were filtered in place since",
            lambda: changed_since(
                lambda a: a._inplace_subset_obs(range(50)), lambda m: m.predict()
            ),
            "hand the AnnData in as it is now: `model.predict(adata)`",
        ),
        Case(
            "labels that were edited since",
            lambda: changed_since(labels({"B": "B cell"}), lambda m: m.train(1)),
            "make a new model",
        ),
        Case(
            "new cells that lack a gene",
            lambda: asked().predict(setup()[:, 1:].copy()),
            "`SCANVI.prepare_query_anndata(adata, model)` fills it with zeros",
        ),
        Case(
            "new cells of a batch that was not seen",
            lambda: unseen("donor", "three", batch_key="donor"),
            "`SCANVI.load_query_data` makes a model that has it",
        ),
        Case(
            "a gene that is none",
            lambda: asked().get_normalized_expression(gene_list=["gen1"]),
            "names of `model.fields.genes`",
        ),
        Case(
            "a group that is none, in differential expression",
            lambda: asked().differential_expression(groupby="cell_type", group1="b"),
            "a value of the column",
        ),
    ],
    "New data, files": [
        Case(
            "query cells with a label that the reference lacks",
            lambda: query(setup(labels({"B": "plasma"}))),
            '`extend_labels=["plasma"]`, and cells of a known type labelled too',
        ),
        Case(
            "a folder that is there already",
            lambda: (asked().save("twice"), asked().save("twice")),
            "`overwrite=True`, or another folder",
        ),
        Case(
            "a folder that holds no model",
            lambda: SCANVI.load(".", cells()),
            "the folder that `save` was given",
        ),
        Case(
            "a saved model that was damaged",
            damaged,
            "copy it again from where it is whole",
        ),
        Case(
            "markers that are no genes",
            lambda: marker_labels(cells(), "cell_type", "Unknown", {"B": ["MS4A1"]}),
            "names of `adata.var_names`",
        ),
    ],
}


@contextlib.contextmanager
def a_folder() -> Iterator[None]:
    """Work in an empty folder, so that messages show no path of a machine."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def message(case: Case) -> str:
    """What the error of a case says; AssertionError if there is none."""
    with a_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError(f"no error: {case.given}")


def row(case: Case, said: str) -> str:
    """A row of the table; a message is code, in which Markdown reads no sign but a stroke."""
    lines = [f"`` {line.strip()} ``" for line in said.replace("|", "\\|").splitlines()]
    return f"| {case.given} | {'<br>'.join(lines)} | {case.mend} |"


def page() -> str:
    """The whole page, each mistake made anew."""
    parts = [HEAD]
    for title, cases in CASES.items():
        head = ["| what you gave | what it says | what to do |", "|---|---|---|"]
        table = "\n".join([*head, *(row(case, message(case)) for case in cases)])
        parts.append(f"\n## {title}\n\n{table}\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
