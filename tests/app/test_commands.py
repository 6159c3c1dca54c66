"""From labels to a report, a command for each step: what they write, refuse, and tell in JSON."""

import json
import re
import shlex
import shutil
import sys
import warnings
from functools import partialmethod
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score
from typer.testing import Result

from pyro_scanvi import SCANVI
from pyro_scanvi.app import cli, plotting
from pyro_scanvi.app.running import as_json
from pyro_scanvi.metrics import expected_calibration_error
from tests.app.test_cli import COMMANDS, assert_refused, no_training, plain, run  # noqa: F401
from tests.app.test_report import first_two
from tests.examples import simulated
from tests.scripts import ROOT

SMALL = ("--labels-key", "cell_type", "--max-epochs", 2, "--n-hidden", 8, "--n-latent", 3)
COLUMNS = ("--batch-key", "batch", "--continuous-covariate-key", "age")


def some_cells() -> ad.AnnData:
    """Two batches, a covariate, half of the labels."""
    adata = simulated()
    adata.obs["batch"] = np.array(["b1", "b2"])[np.arange(120) % 2]
    adata.obs["age"] = np.arange(120.0)
    return adata


def new_cells() -> ad.AnnData:
    """Others of the same types, in a new batch, without the column of labels, a gene more."""
    adata = some_cells()[::2].copy()
    adata.obs_names = [f"new{i}" for i in range(adata.n_obs)]
    adata.obs["batch"] = "b3"
    del adata.obs["cell_type"]
    return adata


def write(adata: ad.AnnData, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(adata, f"write_{path.split('.')[-1]}")(path)


def done(*arguments) -> Result:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result


def left() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """in.h5ad, new.zarr, and the model of the first with its cells."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(some_cells(), "in.h5ad")
        write(new_cells(), "new.zarr")
        done("train", "in.h5ad", "model", *SMALL, *COLUMNS, "--save-cells")
    return folder


@pytest.fixture
def folder(tmp_path, template, monkeypatch) -> Path:
    """The working directory, with a copy of those."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plotting, "umap_of", first_two)
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


TEMPLATE = ["in.h5ad", "model", "new.zarr"]

# ---- train, query, report -----------------------------------------------------------------------


@pytest.mark.slow
def test_train_saves_the_model_that_annotate_asks(folder):
    """The same options and seed give the same answers; all columns are noted."""
    done("annotate", "in.h5ad", "out.h5ad", *SMALL, *COLUMNS)
    model, out = SCANVI.load("model"), ad.read_h5ad("out.h5ad")
    np.testing.assert_array_equal(model.predict(soft=True), out.obsm["scanvi_probabilities"])
    assert list(model.fields.continuous_covariate_keys) == ["age"]
    assert list(model.fields.batches) == ["b1", "b2"] and model.n_epochs_trained == 2


@pytest.mark.slow
def test_query(folder):
    """As load_query_data does, with and without training."""
    result = done("query", "model", "new.zarr", "out.zarr", "--save-model", "query")
    assert result.stdout == "annotated cells: out.zarr\nmodel: query\n"
    out = ad.read_zarr("out.zarr")
    expected = SCANVI.load_query_data(new_cells(), "model").predict(soft=True)
    np.testing.assert_array_equal(out.obsm["scanvi_probabilities"], expected)
    assert list(out.uns["pyro_scanvi"]["setup"]["batches"]) == ["b1", "b2", "b3"]
    done("query", "query", "new.zarr", "again.h5ad", "--max-epochs", 1, "--seed", 4)
    again = ad.read_h5ad("again.h5ad")
    np.testing.assert_allclose(again.obsm["scanvi_probabilities"], expected, rtol=1e-5)
    assert (again.uns["pyro_scanvi"]["seed"], again.uns["pyro_scanvi"]["n_epochs"]) == (4, 1)


@pytest.mark.slow
def test_query_with_missing_genes(folder):
    """The file keeps its own genes; those that it lacks are zero to the model."""
    fewer = new_cells()[:, 2:].copy()
    fewer.obs["mine"] = 1.0
    write(fewer, "fewer.h5ad")
    names = sorted([*TEMPLATE, "fewer.h5ad"])
    refused = run("query", "model", "fewer.h5ad", "out.h5ad")
    assert_refused(folder, refused, "genes", names)
    done("query", "model", "fewer.h5ad", "out.h5ad", "--fill-missing-genes")
    out = ad.read_h5ad("out.h5ad")
    zeros = new_cells()
    zeros.X[:, :2] = 0
    expected = SCANVI.load_query_data(zeros, "model").predict(soft=True)
    np.testing.assert_allclose(out.obsm["scanvi_probabilities"], expected, rtol=1e-5)
    assert list(out.var_names) == list(fewer.var_names) and "mine" in out.obs
    np.testing.assert_array_equal(out.X, fewer.X)


@pytest.mark.slow
def test_report(folder):
    """Of the cells that were saved, or of those that are given: the same page."""
    result = done("report", "model", "one.html")
    assert result.stdout.startswith("report: one.html\nleak of labels into the latent space: 0.")
    done("report", "model", "two.html", "--cells", "in.h5ad")
    assert Path("one.html").read_bytes() == Path("two.html").read_bytes()


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(folder, monkeypatch):
    """To the bit, as if it had not been."""
    options = (*SMALL, *COLUMNS, "--checkpoint-dir", "checkpoints")
    done("train", "in.h5ad", "short", *options)
    longer = [5 if option == 2 else option for option in options]
    done("train", "in.h5ad", "resumed", *longer)
    done("train", "in.h5ad", "whole", *longer[:-2])
    resumed, whole = (Path(f"{name}/weights.safetensors") for name in ("resumed", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert SCANVI.load("resumed", some_cells()).n_epochs_trained == 5


# ---- evaluate -----------------------------------------------------------------------------------


def scores(result: Result) -> dict:
    assert (result.exit_code, result.stderr.count("error: ")) == (0, 0)
    return json.loads(result.stdout)["figures"]


def expected_scores(truth: pd.Series, soft: pd.DataFrame) -> dict:
    """By scikit-learn, of names."""
    answer = soft.columns.to_numpy()[soft.to_numpy().argmax(1)]
    right = (answer == truth.to_numpy()).astype(float)
    return {
        "cells": len(truth),
        "accuracy": accuracy_score(truth, answer),
        "macro_f1": f1_score(
            truth, answer, labels=np.unique(truth), average="macro", zero_division=0
        ),
        "calibration_error": expected_calibration_error(right, soft.to_numpy().max(1)),
    }


@pytest.mark.slow
def test_evaluate(folder):
    """Of a file, cells without a given label; of a model, new cells, a type it never saw too."""
    done("annotate", "in.h5ad", "out.h5ad", *SMALL)
    out = ad.read_h5ad("out.h5ad")
    hidden = out.obs["cell_type"] == "Unknown"
    found = scores(run("evaluate", "out.h5ad", "--truth-key", "truth", "--json", "-"))
    expected = expected_scores(out.obs["truth"][hidden], out.obsm["scanvi_probabilities"][hidden])
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert sum(of["cells"] for of in found["by_type"].values()) == hidden.sum()
    text = plain(done("evaluate", "out.h5ad", "--truth-key", "truth").stdout)
    assert all(name in text for name in ("accuracy", "macro_f1", "calibration_error", "NK"))

    new = new_cells()
    new.obs["cell_type"] = new.obs["truth"].astype(str).replace("NK", "never seen")
    write(new, "new.h5ad")
    given = ("evaluate", "new.h5ad", "--truth-key", "cell_type", "--model", "model")
    assert_refused(
        folder,
        run(*given),
        "command line: --new-cells",
        sorted([*TEMPLATE, "new.h5ad", "out.h5ad"]),
    )
    found = scores(run(*given, "--new-cells", "--json", "-"))
    del new.obs["cell_type"]
    soft = SCANVI.load_query_data(new, "model").predict(soft=True)
    expected = expected_scores(new.obs["truth"].astype(str).replace("NK", "never seen"), soft)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["by_type"]["never seen"]["recall"] == 0


# ---- experiment ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_experiment(folder):
    rows = ("--table", "minibatches", "--row", "default", "--row", "32")
    small = ("--max-epochs", 1, "--n-seeds", 2, "--labels-per-type", 5, "--n-hidden", 8)
    options = ("--labels-key", "truth", "--batch-key", "batch", *rows, *small)
    result = done("experiment", "in.h5ad", "out.csv", *options, "--json", "out.json")
    table = pd.read_csv("out.csv", dtype={"setting": str})
    assert set(table["setting"]) == {"default", "32"} and set(table["seed"]) == {0, 1}
    means = pd.DataFrame(json.loads(Path("out.json").read_text())["figures"])
    chosen = table.query("setting == '32' and metric == 'elbo'")["value"]
    found = means.query("setting == '32' and metric == 'elbo'")["mean"]
    assert found.item() == pytest.approx(chosen.mean())
    assert "measurements: out.csv\n" in result.stdout and "summary: out.json\n" in result.stdout


@pytest.mark.slow
def test_the_commands_of_the_page_run(folder, monkeypatch):
    """In order, on small cells, with an epoch."""
    monkeypatch.setattr(SCANVI, "train", partialmethod(train_for_an_epoch, SCANVI.train))
    adata = some_cells()
    adata.obs["donor"] = adata.obs["batch"]
    write(adata, "cells.h5ad")
    shutil.rmtree("model")
    new = new_cells()
    new.obs["donor"] = "d3"
    write(new, "new.zarr")
    page = (ROOT / "docs" / "command_line.md").read_text("utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert {command[1] for command in commands} == set(COMMANDS) - {"demo"}
    for command in commands:
        done(*command[1:])


def train_for_an_epoch(model, train, max_epochs=None, *arguments, **options):
    return train(model, 1, *arguments, **options)


# ---- summaries and settings ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_summary(folder):
    result = run("annotate", "in.h5ad", "out.h5ad", *SMALL, *COLUMNS, "--json", "-")
    assert (result.exit_code, result.stderr) == (0, "annotated cells: out.h5ad\n")
    found = json.loads(result.stdout)
    assert found["command"] == "annotate" and found["options"]["max_epochs"] == 2
    assert found["options"]["output"] == "out.h5ad"
    assert found["versions"]["pyro-scanvi"] == version("pyro-scanvi")
    assert found["seconds"] > 0
    assert found["settings"]["model"]["n_hidden"] == 8
    assert found["settings"]["training"]["max_epochs"] == 2
    figures, out = found["figures"], ad.read_h5ad("out.h5ad")
    assert (figures["cells"], figures["genes"]) == (120, 20)
    assert figures["labelled"] == (out.obs["cell_type"] != "Unknown").sum()
    predicted = out.obs["scanvi_prediction"].value_counts()
    assert figures["predicted"] == predicted[predicted > 0].to_dict()
    assert figures["mean_confidence"] == pytest.approx(out.obs["scanvi_confidence"].mean())
    assert 0 < figures["held_out"]["accuracy"] <= 1
    assert figures["held_out"]["cells"] == figures["labelled"]


def test_json_has_no_nan():
    text = as_json({"a": np.float32(0.5), "b": [np.nan, float("inf")], "p": Path("é")})
    assert json.loads(text) == {"a": 0.5, "b": [None, None], "p": "é"}
    assert "é" in text


@pytest.mark.slow
def test_settings_of_a_file(folder):
    """The command line goes first; several values are a list."""
    Path("s.toml").write_text(
        'labels-key = "cell_type"\nmax-epochs = 2\nn_hidden = 8\nseed = 7\n'
        'continuous-covariate-key = ["age"]\nbatch-key = "batch"\n'
    )
    paths = ("in.h5ad", "out.h5ad")
    done("annotate", *paths, "--config", "s.toml", "--seed", 3, "--n-latent", 3)
    record = ad.read_h5ad("out.h5ad").uns["pyro_scanvi"]
    assert (record["seed"], record["n_epochs"]) == (3, 2)
    assert record["settings"]["model"]["n_hidden"] == "8"
    assert list(record["setup"]["continuous_covariate_keys"]) == ["age"]


BAD_SETTINGS = {  # what stands in the file, and what is said of it
    "no such option": (
        "batch_kay = 'a'",
        "sets 'batch_kay', which is no option here; did you mean",
    ),
    "no TOML": ("a = = 1", "cannot be read as TOML"),
    "not UTF-8": ("a = '\udce9'", "cannot be read as TOML"),
    "another type": ("max-epochs = 'many'", "--max-epochs"),
    "out of range": ("dropout-rate = 2", "--dropout-rate"),
}


@pytest.mark.parametrize(("text", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(tmp_path, no_training, monkeypatch, text, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("s.toml").write_bytes(text.encode(errors="surrogateescape"))
    result = run("annotate", "in", "out", "--labels-key", "a", "--config", "s.toml")
    assert result.exit_code == 2 and message in plain(result.stderr)


# ---- bad input ----------------------------------------------------------------------------------

REFUSED = {  # arguments, and what is said; nothing is computed or written
    "train, model exists": (["train", "in.h5ad", "model", *SMALL], "model exists; .*overwrite"),
    "train, no such column": (
        ["train", "in.h5ad", "new", *SMALL, "--batch-key", "donor"],
        r"no column 'donor'.* \(given by --batch-key\)",
    ),
    "train, report in the model": (
        ["train", "in.h5ad", "new", *SMALL, "--report", "new/a.html"],
        "the report new/a.html lies in new",
    ),
    "train, summary is the input": (
        ["train", "in.h5ad", "new", *SMALL, "--json", "in.h5ad", "--overwrite"],
        "the summary in.h5ad is another file of this command",
    ),
    "train, summary exists": (
        ["train", "in.h5ad", "new", *SMALL, "--json", "old.json"],
        "exists.*command line: --overwrite",
    ),
    "train, model in the input": (["train", "new.zarr", "new.zarr/m", *SMALL], "lies in new.zarr"),
    "query, model in OUT": (
        ["query", "model", "in.h5ad", "out.zarr", "--save-model", "out.zarr/m"],
        "the model out.zarr/m lies in out.zarr",
    ),
    "query, no model": (["query", "in.h5ad", "new.zarr", "out.zarr"], "holds no saved model"),
    "query, no column": (["query", "model", "bare.h5ad", "out.h5ad"], "no column 'batch'"),
    "query, no such folder": (["query", "model", "new.zarr", "a/out.zarr"], "no folder a; make it"),
    "evaluate, not annotated": (
        ["evaluate", "in.h5ad", "--truth-key", "truth"],
        "are not annotated.* --model",
    ),
    "evaluate, set up again": (
        ["evaluate", "again.h5ad", "--truth-key", "truth"],
        "has the columns x, y, expected the labels that were set up, B, NK, T",
    ),
    "evaluate, no truth": (
        ["evaluate", "in.h5ad", "--truth-key", "truht", "--model", "model"],
        r"no column 'truht'; did you mean 'truth'.* \(given by --truth-key\)",
    ),
    "report, no page": (["report", "model", "a.pdf"], "a.pdf does not end in .html"),
    "report, other cells": (
        ["report", "model", "a.html", "--cells", "new.zarr"],
        r"not seen \(b3\)",
    ),
    "experiment, no table": (
        ["experiment", "in.h5ad", "a.csv", "--labels-key", "truth", "--table", "optimizers"],
        r"did you mean 'optimisers'\? \(given by --table\)",
    ),
    "experiment, no row": (
        ["experiment", "in.h5ad", "a.csv", "--labels-key", "truth", "--row", "layerd"],
        r"did you mean 'layered'\? \(given by --row\)",
    ),
    "experiment, the input": (
        ["experiment", "in.h5ad", "in.h5ad", "--labels-key", "truth", "--overwrite"],
        "the output in.h5ad lies in in.h5ad",
    ),
    "experiment, some labels": (
        ["experiment", "in.h5ad", "a.csv", "--labels-key", "part", "--n-seeds", "1"],
        "lacks 60 labels",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(folder, no_training, arguments, message):  # noqa: F811
    bare = new_cells()
    del bare.obs["batch"]
    write(bare, "bare.h5ad")
    partly = some_cells()
    partly.obs["part"] = partly.obs["truth"].where(np.arange(120) < 60)
    write(partly, "in.h5ad")
    SCANVI.setup_anndata(partly, "cell_type", "Unknown")
    partly.obsm["scanvi_probabilities"] = pd.DataFrame({"x": 0.5, "y": 0.5}, partly.obs_names)
    write(partly, "again.h5ad")
    Path("old.json").write_text("old")
    names = sorted([*TEMPLATE, "again.h5ad", "bare.h5ad", "old.json"])
    assert_refused(folder, run(*arguments), message, names)


def command_line(*arguments: str) -> None:
    """As the installed command; reading is our fault."""

    def fail(path):
        raise ZeroDivisionError

    cli.read_anndata = fail
    sys.argv = ["pyro-scanvi", *arguments]
    cli.app()


@pytest.mark.slow
def test_exit_codes(folder, new_process):
    bad = ("report", "nothing", "a.html")
    assert new_process(command_line, *bad) == 2
    assert new_process(command_line, "report", "model", "a.html", "--cells", "in.h5ad") == 1
    assert left() == TEMPLATE
