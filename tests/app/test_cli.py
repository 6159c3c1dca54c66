"""The command line: what it adds, what it leaves alone, what it refuses before any work is done."""

import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import typer
from scipy.sparse import csc_matrix, csr_matrix
from typer.testing import CliRunner, Result

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.app.cli import app
from pyro_scanvi.data import fields
from pyro_scanvi.metrics import label_scores
from pyro_scanvi.validation import Advice
from tests.examples import mostly_slow, simulated

N, G = 40, 12
ADDED = ["obs/scanvi_", "obsm/scanvi_probabilities", "obsm/X_scanvi", "uns/pyro_scanvi"]


def some_cells(*labels: str) -> ad.AnnData:
    """40 cells of 12 genes with clear types; given labels are repeated in turn."""
    adata = simulated(n=N, n_genes=G)
    if labels:
        adata.obs["cell_type"] = pd.Categorical([labels[i % len(labels)] for i in range(N)])
    return adata


def run(*arguments) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    """Without colours, which typer uses where it thinks that it is on a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def annotate(folder: Path, adata: ad.AnnData, *options, labels_key="cell_type", epochs=1) -> Result:
    """Write in.h5ad and annotate it as out.h5ad, with a small model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(folder / "in.h5ad", convert_strings_to_categoricals=False)
    small = ("--max-epochs", epochs, "--n-hidden", 8, "--n-latent", 3)
    paths = (folder / "in.h5ad", folder / "out.h5ad")
    return run("annotate", *paths, "--labels-key", labels_key, *small, *options)


def result_of(folder: Path, result: Result, notes: str = "") -> ad.AnnData:
    """What was written; nothing but the expected notes may have been said on stderr."""
    assert (result.exit_code, result.stderr) == (0, notes)
    assert {path.name for path in folder.iterdir()} - {"report.html"} == {"in.h5ad", "out.h5ad"}
    return ad.read_h5ad(folder / "out.h5ad")


def assert_refused(folder: Path, result: Result, message: str, left=("in.h5ad",)) -> None:
    """One sentence, exit code 2, no file more than before."""
    assert result.exit_code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", result.stderr)
    assert sorted(path.name for path in folder.iterdir()) == sorted(left)


@pytest.fixture
def no_training(monkeypatch):
    """Bad input has to be found before."""

    def train(*args, **kwargs):
        raise AssertionError("training has begun")

    monkeypatch.setattr(SCANVI, "train", train)


# ---- what is added ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> tuple[Path, ad.AnnData]:
    folder = tmp_path_factory.mktemp("annotated")
    options = ("--seed", 3, "--batch-size", 16, "--dropout-rate", 0.1, "--n-hidden", 32)
    result = annotate(folder, some_cells(), *options, epochs=60)
    return folder, result_of(folder, result)


def test_predictions(annotated):
    _, adata = annotated
    soft = adata.obsm["scanvi_probabilities"]
    assert list(soft.columns) == list(adata.obs["scanvi_prediction"].cat.categories)
    assert list(soft.columns) == ["B", "NK", "T"]
    assert list(soft.index) == list(adata.obs_names)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    assert (soft.idxmax(axis=1) == adata.obs["scanvi_prediction"]).all()
    assert (soft.max(axis=1) == adata.obs["scanvi_confidence"]).all()
    assert adata.obsm["X_scanvi"].shape == (N, 3)


def test_predictions_are_right(annotated):
    """On the cells without a label; chance is 1/3."""
    _, adata = annotated
    hidden = adata.obs["cell_type"] == "Unknown"
    assert hidden.sum() > 10
    correct = adata.obs["scanvi_prediction"].astype(str) == adata.obs["truth"].astype(str)
    assert correct[hidden].mean() > 0.8


def test_the_record_of_what_was_done(annotated):
    record = annotated[1].uns["pyro_scanvi"]
    assert record["version"] == version("pyro-scanvi")
    assert (record["seed"], record["n_epochs"]) == (3, 60)
    model, training = record["settings"]["model"], record["settings"]["training"]
    assert (model["n_hidden"], model["n_latent"], model["dropout_rate"]) == ("32", "3", "0.1")
    assert (training["max_epochs"], training["batch_size"]) == (60, 16)
    assert np.isfinite(list(record["final_losses"]["train"].values())).all()
    assert {"elbo", "reconstruction", "cross_entropy"} <= set(record["final_losses"]["train"])
    assert record["setup"]["labels_key"] == "cell_type"
    assert list(record["setup"]["classes"]) == ["B", "NK", "T"]


def test_the_output_can_be_set_up_as_it_is(annotated):
    again = SCANVI(annotated[1], n_hidden=8)
    assert list(again.fields.classes) == ["B", "NK", "T"]


def contents(path: Path) -> dict[str, tuple]:
    """Type, values and attributes of all that an HDF5 file holds."""
    found = {}

    def note(name, item):
        attributes = {key: np.array(value).tolist() for key, value in item.attrs.items()}
        array = np.array(item[()]) if isinstance(item, h5py.Dataset) else np.array(None)
        values = array.tolist() if array.dtype.hasobject else array.tobytes()
        found[name] = (str(array.dtype), array.shape, values, attributes)

    with h5py.File(path) as file:
        file.visititems(note)
    return found


def full_cells() -> ad.AnnData:
    """Something of every kind in every slot."""
    adata = some_cells()
    rng = np.random.default_rng(0)
    adata.obs_names = [f"Zelle {i} β" for i in range(N)]
    adata.obs.index.name = "barcode"
    adata.obs["strings"] = [f"s{i % 3}" for i in range(N)]
    adata.obs["ordered"] = pd.Categorical(np.arange(N) % 2, [2, 1, 0], ordered=True)
    adata.obs["small"] = np.arange(N, dtype=np.int8)
    adata.obs["half"] = np.arange(N, dtype=np.float32) / 2
    adata.obs["flag"] = np.arange(N) % 2 == 0
    adata.obs["missing"] = pd.array([1, None] * (N // 2), dtype="Int64")
    adata.obs["nan"] = [1.0, np.nan] * (N // 2)
    adata.var["name"] = [f"n{i % 2}" for i in range(G)]
    adata.layers["sparse"] = csc_matrix(adata.X.astype(np.int64))
    adata.layers["scaled"] = rng.normal(size=(N, G))
    adata.X = csr_matrix(adata.X)
    adata.raw = adata.copy()
    adata.obsm["X_pca"] = rng.normal(size=(N, 2))
    adata.obsm["table"] = pd.DataFrame({"a": ["x"] * N, "b": 1.5}, index=adata.obs_names)
    adata.varm["loadings"] = rng.normal(size=(G, 2))
    adata.obsp["near"] = csr_matrix(np.eye(N))
    adata.varp["near"] = np.eye(G)
    adata.uns["nested"] = {"text": "t", "array": np.arange(3), "deeper": {"flag": True}}
    return adata


def test_everything_else_is_as_it_was(tmp_path):
    """Compared in the files: every array, its type and its attributes."""
    result_of(tmp_path, annotate(tmp_path, full_cells()))
    before, after = (contents(tmp_path / name) for name in ("in.h5ad", "out.h5ad"))
    columns = before["obs"][-1]["column-order"]
    after["obs"][-1]["column-order"] = after["obs"][-1]["column-order"][: len(columns)]
    assert {name: after.get(name) for name in before} == before
    new = [name for name in after if name not in before]
    assert all(name.startswith(tuple(ADDED)) for name in new)


def test_same_seed_same_file_same_bits(tmp_path):
    found = []
    for i, seed in enumerate([5, 5, 6]):
        folder = tmp_path / str(i)
        folder.mkdir()
        result_of(folder, annotate(folder, some_cells(), "--seed", seed, epochs=3))
        found.append(contents(folder / "out.h5ad"))
    assert found[0] == found[1]
    assert found[0]["obsm/X_scanvi"] != found[2]["obsm/X_scanvi"]


def test_batch_layer_and_overwrite(tmp_path):
    adata = some_cells()
    adata.obs["batch"] = ["b1", "b2"] * (N // 2)
    adata.layers["counts"], adata.X = adata.X, np.log1p(adata.X)
    (tmp_path / "out.h5ad").write_text("old")
    options = ("--layer", "counts", "--batch-key", "batch", "--overwrite")
    setup = result_of(tmp_path, annotate(tmp_path, adata, *options)).uns["pyro_scanvi"]["setup"]
    assert (setup["layer"], setup["batch_key"]) == ("counts", "batch")
    assert list(setup["batches"]) == ["b1", "b2"]


@pytest.mark.slow
def test_report(tmp_path):
    threads = torch.get_num_threads()
    path = tmp_path / "report.html"
    result = annotate(tmp_path, some_cells("CD4/T", "Unknown", "B"), "--report", path)
    result_of(tmp_path, result, f"note: {OTHER_NAMES} ('CD4/T' is 'CD4|T')\n")
    assert f"annotated cells: {tmp_path / 'out.h5ad'}\nreport: {path}\nleak of" in result.stdout
    assert "CD4/T" in path.read_text("utf-8")
    assert torch.get_num_threads() == threads  # numba, below UMAP, changes it when it starts


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.slow
def test_report_of_a_few_cells(tmp_path, n):
    adata = some_cells("B", "T")[:n].copy()
    result = annotate(tmp_path, adata, "--report", tmp_path / "report.html")
    notes = f"note: 'Unknown' does not occur in obs['cell_type']: all {n} cells count as labelled"
    result_of(tmp_path, result, f"{notes}, as B, T\n")
    assert "so that it cannot be told" in (tmp_path / "report.html").read_text("utf-8")


# ---- odd, but allowed ---------------------------------------------------------------------------


def with_counts(matrix) -> ad.AnnData:
    adata = some_cells()
    adata.X = matrix(adata.X)
    return adata


def without_gene_3(x: np.ndarray) -> np.ndarray:
    return x * (np.arange(G) != 3)


def with_labels(values, key="cell_type") -> ad.AnnData:
    adata = some_cells()
    adata.obs[key] = pd.Series(values).take(np.arange(N) % 3).set_axis(adata.obs_names)
    return adata


ODD_COUNTS = {
    "int64": lambda x: x.astype(np.int64),
    "uint8": lambda x: np.minimum(x, 250).astype(np.uint8),
    "float64, CSC": lambda x: csc_matrix(x.astype(float)),
    "int32, CSR": lambda x: csr_matrix(x.astype(np.int32)),
    "a gene without counts": without_gene_3,
    "a gene without counts, CSC": lambda x: csc_matrix(without_gene_3(x)),
}


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ODD_COUNTS.values(), ids=ODD_COUNTS)
def test_odd_counts(tmp_path, matrix):
    result_of(tmp_path, annotate(tmp_path, with_counts(matrix)))


ODD_LABELS = {  # the first three values, options, columns of probabilities
    "plain strings": (["B", "Unknown", "T"], [], ["B", "T"]),
    "integers": ([2, 0, 1], ["--unlabeled-category", "0"], ["1", "2"]),
    "negative integer": ([2, -1, 1], ["--unlabeled-category", "-1"], ["1", "2"]),
    "booleans": ([True, False, True], [], ["False", "True"]),
    "unused": (pd.Categorical(["B", "Unknown", "T"], list("ABT") + ["Unknown"]), [], ["B", "T"]),
    "in the middle": (pd.Categorical(["B", "N", "T"]), ["--unlabeled-category", "N"], ["B", "T"]),
    "slashes": (["CD4+/CD25", "Unknown", "CD8"], [], ["CD4+|CD25", "CD8"]),
    "brackets": (["[/b]", "Unknown", "[red]T"], [], ["[|b]", "[red]T"]),
    "one inside another": (["T", "Unknown", "T/NK"], [], ["T", "T|NK"]),
    "at the root": (["/x", "Unknown", "B"], [], ["|x", "B"]),
}
OTHER_NAMES = "a file takes other names of columns in obsm['scanvi_probabilities']"
EXPECTED_NOTES = {
    "booleans": "'Unknown' does not occur in obs['cell_type']: all 40 cells count as labelled, as "
    "False, True",
    "slashes": f"{OTHER_NAMES} ('CD4+/CD25' is 'CD4+|CD25')",
    "brackets": f"{OTHER_NAMES} ('[/b]' is '[|b]')",
    "one inside another": f"{OTHER_NAMES} ('T/NK' is 'T|NK')",
    "at the root": f"{OTHER_NAMES} ('/x' is '|x')",
}


@pytest.mark.parametrize("name", mostly_slow(ODD_LABELS))
def test_odd_labels(tmp_path, name):
    values, options, columns = ODD_LABELS[name]
    note = EXPECTED_NOTES.get(name)
    result = annotate(tmp_path, with_labels(values), *options)
    adata = result_of(tmp_path, result, f"note: {note}\n" if note else "")
    assert list(adata.obsm["scanvi_probabilities"].columns) == columns
    classes = {v for v in values if str(v) not in [*options, "Unknown"]}
    assert set(adata.obs["scanvi_prediction"].cat.categories) == classes


@pytest.mark.slow
@pytest.mark.parametrize("key", ["cell type", "a/b", "[bold]", "[/x]", "Ω", "-x", "$a$"])
def test_odd_keys(tmp_path, key):
    adata = with_labels(["B", "Unknown", "T"], key)
    adata.obs[key + "2"] = "one"
    result = annotate(tmp_path, adata, "--batch-key", key + "2", labels_key=key)
    note = f"note: obs[{key + '2'!r}] has one value, 'one': the batch explains nothing\n"
    assert result_of(tmp_path, result, note).uns["pyro_scanvi"]["setup"]["labels_key"] == key


def test_all_cells_labelled(tmp_path):
    result = annotate(tmp_path, some_cells("B", "T"), "--unlabeled-category", "?")
    note = "'?' does not occur in obs['cell_type']: all 40 cells count as labelled, as B, T"
    result_of(tmp_path, result, f"note: {note}\n")


def test_cells_without_counts_are_left_out_when_asked(tmp_path):
    adata = without_counts(3, 11)
    adata.X = csr_matrix(adata.X)
    result = annotate(tmp_path, adata, "--drop-empty-cells")
    found = result_of(tmp_path, result)
    assert list(found.obs_names) == [n for n in adata.obs_names if n not in ("cell3", "cell11")]
    assert "cells without counts, left out: 2\n" in result.stdout


@pytest.mark.parametrize("batch_size", mostly_slow([1, 3, 13, 39]))
def test_minibatches_of_any_size(tmp_path, batch_size):
    result_of(tmp_path, annotate(tmp_path, some_cells(), "--batch-size", batch_size))


# ---- bad input ----------------------------------------------------------------------------------


def bad_counts(value, matrix=np.asarray) -> ad.AnnData:
    def change(x):
        x[7, 5] = value
        return matrix(x)

    return with_counts(change)


def log_normalised(x: np.ndarray) -> np.ndarray:
    return np.log1p(x / x.sum(axis=1, keepdims=True) * 1e4)


def twice(names: str) -> ad.AnnData:
    adata = some_cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(adata, names, ["twice", "twice", *getattr(adata, names)[2:]])
    return adata


def without_counts(*cells: int) -> ad.AnnData:
    adata = some_cells()
    adata.X[list(cells)] = 0
    return adata


BAD_INPUT = {  # AnnData, options, message
    "no such labels": (some_cells(), ["--labels-key", "cell_typ"], "did you mean 'cell_type'"),
    "no such batch": (some_cells(), ["--batch-key", "batch"], "obs has no column 'batch'"),
    "no such layer": (some_cells(), ["--layer", "counts"], "there is no layer 'counts'"),
    "negative": (bad_counts(-1), [], "negative: -1 in cell 'cell7', gene 'gene5'"),
    "fractional": (bad_counts(40.5), [], "fractional: 40.5 in cell 'cell7', gene 'gene5'"),
    "NaN": (bad_counts(np.nan), [], "not finite: nan in cell 'cell7', gene 'gene5'"),
    "infinite": (bad_counts(np.inf), [], "not finite: inf in cell 'cell7', gene 'gene5'"),
    "negative, CSR": (bad_counts(-1, csr_matrix), [], "negative: -1 in cell 'cell7', gene 'gene5'"),
    "negative, CSC": (bad_counts(-1, csc_matrix), [], "negative: -1 in cell 'cell7', gene 'gene5'"),
    "log-normalised": (with_counts(log_normalised), [], "these look log-normalised"),
    "nan written out": (
        with_labels(pd.Categorical(["B", "nan", "T"])),
        [],
        "13 cells labelled 'nan', which reads as if the label were not known",
    ),
    "nothing labelled": (some_cells("Unknown"), [], "no cell is labelled"),
    "a single class": (some_cells("B", "Unknown"), [], "a single class, 'B'"),
    "duplicated cells": (twice("obs_names"), [], r"names of cells that occur twice: 1 \(twice\)"),
    "duplicated genes": (twice("var_names"), [], r"names of genes that occur twice: 1 \(twice\)"),
    "empty cells": (
        without_counts(3, 4),
        [],
        r"cells without counts: 2 \(cell3, cell4\); drop them",
    ),
    "only empty cells": (without_counts(*range(N)), ["--drop-empty-cells"], "0 cells and 12 genes"),
    "NaN, empty cells": (bad_counts(np.nan), ["--drop-empty-cells"], "not finite: nan"),
    "no layer, empty cells": (some_cells(), ["--drop-empty-cells", "--layer", "x"], "no layer 'x'"),
    "no genes": (some_cells()[:, :0].copy(), [], "40 cells and 0 genes"),
    "no cells": (some_cells()[:0].copy(), [], "0 cells and 12 genes"),
}


@pytest.mark.parametrize(("adata", "options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(tmp_path, no_training, adata, options, message):
    assert_refused(tmp_path, annotate(tmp_path, adata, *options), message)


def with_layer(name: str) -> ad.AnnData:
    adata = some_cells()
    adata.layers[name] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    return adata


OPTIONS = {  # AnnData, what the library says, and the option for it
    "the layer": (bad_counts(-1), "name their layer with layer=...", "--layer"),
    "that layer": (with_layer("counts"), "layer='counts'", "--layer counts"),
    "a layer with a blank": (with_layer("my counts"), "layer='my counts'", "--layer 'my counts'"),
    "empty cells": (without_counts(3), "drop_empty_cells", "--drop-empty-cells"),
    "unlabelled": (
        with_labels(pd.Categorical(["B", "nan", "T"])),
        "unlabeled_category='nan'",
        "--unlabeled-category nan",
    ),
}


@pytest.mark.parametrize(("adata", "argument", "option"), OPTIONS.values(), ids=OPTIONS)
def test_the_option_is_told_for_the_argument(tmp_path, no_training, adata, argument, option):
    """By the command line alone: who calls the library is told of arguments."""
    told = rf"{re.escape(argument)}.* \(on the command line: {re.escape(option)}\)"
    assert_refused(tmp_path, annotate(tmp_path, adata), told)
    with pytest.raises(InputError, match=re.escape(argument)) as error:
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    assert "--" not in str(error.value)


def test_the_option_is_told_for_advice(tmp_path, monkeypatch):
    def advise(model, *args, **kwargs):
        warnings.warn(Advice("it takes long", {"n_top_genes": 2000}), stacklevel=1)

    monkeypatch.setattr(SCANVI, "train", advise)
    result = annotate(tmp_path, some_cells())
    assert "note: it takes long (on the command line: --n-top-genes 2000)\n" in result.stderr


def test_early_stopping_without_held_out_cells(tmp_path):
    result = annotate(tmp_path, some_cells("B", "T", "Unknown")[:12].copy(), "--early-stopping")
    assert_refused(tmp_path, result, "early_stopping needs held-out cells")


BAD_FILES = {
    "none": (lambda path: path.unlink(), "there is no file"),
    "text": (lambda path: path.write_text("cells"), "is no .h5ad file, or it is truncated"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:9000]), "is damaged or holds no"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, no_training, damage, message):
    path = tmp_path / "in.h5ad"
    some_cells().write_h5ad(path)
    damage(path)
    result = run("annotate", path, tmp_path / "out.h5ad", "--labels-key", "cell_type")
    assert_refused(tmp_path, result, message, left=["in.h5ad"] if path.exists() else [])


BAD_OUTPUTS = {  # OUT, further options, message
    "the input": ("in.h5ad", ["--overwrite"], "is the input"),
    "a link to the input": ("link", ["--overwrite"], "is the input"),
    "a missing folder": ("none/out.h5ad", [], "there is no folder .*none; make it first"),
    "below a file": ("old/out.h5ad", [], "there is no folder .*old; it is a file"),
    "a name too long": ("x" * 300, [], "cannot be used: File name too long"),
    "report is no page": ("out.h5ad", ["--report", "a b"], "command line: --report 'a b.html'"),
    "report exists": ("out.h5ad", ["--report", "old.html"], "exists.*command line: --overwrite"),
    "report in no folder": ("out.h5ad", ["--report", "a/b.html"], "there is no folder a; make it"),
}


@pytest.mark.parametrize(("output", "options", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_bad_outputs(tmp_path, no_training, monkeypatch, output, options, message):
    monkeypatch.chdir(tmp_path)
    some_cells().write_h5ad("in.h5ad")
    Path("link").symlink_to("in.h5ad")
    Path("old").write_text("old")
    Path("old.html").write_text("old")
    before = contents(Path("in.h5ad"))
    result = run("annotate", "in.h5ad", output, "--labels-key", "cell_type", *options)
    assert_refused(tmp_path, result, message, left=["in.h5ad", "link", "old", "old.html"])
    assert contents(Path("in.h5ad")) == before
    assert Path("old").read_text() == "old"


@pytest.mark.parametrize(
    "options",
    [["--seed", "-1"], ["--seed", str(2**32)], ["--max-epochs", "0"], ["--dropout-rate", "1"], []],
    ids=" ".join,
)
def test_bad_options(tmp_path, no_training, options):
    """Typer's own errors; without an option the required one is missing."""
    some_cells().write_h5ad(tmp_path / "in.h5ad")
    required = ["--labels-key", "cell_type"] if options else []
    result = run("annotate", tmp_path / "in.h5ad", tmp_path / "out.h5ad", *required, *options)
    assert result.exit_code == 2
    assert (options[0] if options else "--labels-key") in plain(result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


def test_our_own_faults_keep_their_traceback(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(fields.Fields, "encode", fail)
    result = annotate(tmp_path, some_cells())
    assert isinstance(result.exception, ZeroDivisionError)
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


# ---- demo ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo(tmp_path):
    folder = tmp_path / "a" / "b"
    result = run("demo", "--folder", folder, "--max-epochs", 2, "--labels-per-type", 5)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"note: {OTHER_NAMES} ('CD4+/CD25 T Reg' is 'CD4+|CD25 T Reg',")
    assert result.stderr.count("\n") == 1
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["annotated.h5ad", "report.html"]
    adata = ad.read_h5ad(folder / "annotated.h5ad")
    labelled = adata.obs["given"] != "Unknown"
    assert adata.obs["given"][labelled].value_counts().drop("Unknown").tolist() == [5] * 9 + [4]
    rows = {line[1:21].strip(): line for line in result.stdout.splitlines() if "0." in line}
    assert {"pyro_scanvi", "logistic regression", "majority class"} <= set(rows)
    soft = adata.obsm["scanvi_probabilities"]
    classes = pd.Index(adata.uns["pyro_scanvi"]["setup"]["classes"])
    truth = classes.get_indexer(adata.obs["cell_type"].astype(str))
    expected = label_scores(truth[~labelled], soft.to_numpy()[~labelled])
    printed = [float(number) for number in re.findall(r"\d\.\d+", rows["pyro_scanvi"])]
    assert printed == pytest.approx(list(expected.values()), abs=6e-4)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_demo_without_a_folder(tmp_path, no_training, folder):
    (tmp_path / "file").touch()
    result = run("demo", "--folder", tmp_path / folder)
    assert_refused(tmp_path, result, "the folder .* cannot be made", left=["file"])


# ---- help and the installed command -------------------------------------------------------------

COMMANDS = typer.main.get_command(app).commands
OPTIONS = [(c, p) for c, command in COMMANDS.items() for p in command.params]


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    """Of each command, on a wide terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        return {command: plain(run(command, "--help").stdout) for command in COMMANDS}


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda x: getattr(x, "name", x))
def test_every_option_is_explained_with_its_default(help_texts, command, option):
    text = help_texts[command]
    shown = option.opts[0] if option.param_type_name == "option" else option.metavar
    (line,) = (line for line in text.splitlines() if option.help in line)
    assert f" {shown} " in line
    assert re.search(r"\[default: .+\]|\[required\]|if not given|off by default", line)


def test_help_says_what_is_written():
    text = " ".join(plain(run("annotate", "--help").stdout).split())
    for name in ("scanvi_prediction", "scanvi_confidence", "scanvi_probabilities", "X_scanvi"):
        assert name in text


def test_no_arguments_show_the_help():
    names = {"annotate", "train", "query", "evaluate", "report", "experiment", "demo"}
    assert set(COMMANDS) == names
    assert all(name in run().output for name in COMMANDS)


@pytest.mark.slow
def test_the_installed_command(tmp_path):
    """As a user runs it, with Python's own filter of warnings."""
    some_cells().write_h5ad(tmp_path / "in.h5ad")
    command = Path(sys.executable).with_name("pyro-scanvi")
    paths, options = ["in.h5ad", "out.h5ad"], ["--labels-key", "cell_type", "--max-epochs", "1"]
    arguments = [command, "annotate", *paths, *options]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "annotated cells: out.h5ad" in done.stdout
    assert ad.read_h5ad(tmp_path / "out.h5ad").obsm["X_scanvi"].shape == (N, 20)
