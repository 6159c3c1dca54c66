"""The command line and the files that users have: formats, folders, where counts and labels are."""

import errno
import resource
import shutil
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.sparse import csc_matrix, csr_matrix
from typer.testing import Result

from pyro_scanvi import SCANVI
from pyro_scanvi.app import plotting
from tests.app.test_cli import assert_refused, contents, no_training, run  # noqa: F401
from tests.app.test_report import first_two
from tests.examples import file_limit, simulated

pytestmark = pytest.mark.slow  # each is a run of the command line

N, G = 40, 12
SMALL = ("--labels-key", "cell_type", "--max-epochs", 1, "--n-hidden", 8, "--n-latent", 3)
FORMATS = ("h5ad", "zarr")


def write(adata: ad.AnnData, path: Path | str, **options) -> None:
    """By anndata itself, in either format."""
    with warnings.catch_warnings(), ad.settings.override(allow_write_nullable_strings=True):
        warnings.simplefilter("ignore")
        method = getattr(adata.copy(), f"write_{Path(path).suffix[1:]}")
        method(path, convert_strings_to_categoricals=False, **options)


def read(path: Path | str) -> ad.AnnData:
    """By anndata itself, in either format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(ad, f"read_{Path(path).suffix[1:]}")(path)


def annotate(source: str, output: str, *options) -> Result:
    return run("annotate", source, output, *SMALL, *options)


def annotated(source: str, output: str, *options) -> ad.AnnData:
    """What was written; nothing may have been said on stderr, nor else be left."""
    before = set(Path().iterdir())
    result = annotate(source, output, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert set(Path().iterdir()) - before == {Path(output)} - before
    return read(output)


def without_ours(adata: ad.AnnData) -> ad.AnnData:
    """What annotate added is taken away."""
    for mapping, names in (
        (adata.obs, ("scanvi_prediction", "scanvi_confidence")),
        (adata.obsm, ("scanvi_probabilities", "X_scanvi")),
        (adata.uns, ("pyro_scanvi",)),
    ):
        for name in names:
            del mapping[name]
    return adata


def assert_same(one: ad.AnnData, other: ad.AnnData) -> None:
    """Every array, its type and its attributes, as anndata writes them; raw too."""
    written = []
    for adata in (one, other):
        write(adata, "compared.h5ad")
        written.append(contents(Path("compared.h5ad")))
        Path("compared.h5ad").unlink()
    assert written[0] == written[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with cells in both formats."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A store has many files; it is copied."""
    path = tmp_path_factory.mktemp("templates")
    for suffix in FORMATS:
        write(simulated(N, G), path / f"in.{suffix}")
    return path


@pytest.fixture
def cells(folder, templates):
    """in.h5ad and in.zarr, the same cells."""
    shutil.copytree(templates, folder, dirs_exist_ok=True)
    return simulated(N, G)


# ---- formats ------------------------------------------------------------------------------------


def odd_cells() -> ad.AnnData:
    """Odd but legal, in every slot."""
    adata = simulated(N, G)
    adata.X = csc_matrix(adata.X.astype(np.uint8))
    adata.raw = adata.copy()
    adata = adata[:, :8].copy()  # raw has more genes
    adata.obs.index.name = "barcode"
    adata.obs["barcode"] = adata.obs_names.astype(str)  # named like the index
    adata.obs["cell_type"] = pd.Categorical(adata.obs["cell_type"], [*"zTB", "NK", "Unknown", "a"])
    adata.obs["number"] = pd.array([1, None] * (N // 2), dtype="Int64")
    adata.obs["flag"] = pd.array([True, None] * (N // 2), dtype="boolean")
    adata.obs["text"] = pd.array(["x", None] * (N // 2), dtype="string")
    adata.obs["some"] = pd.Categorical(["β/γ", None] * (N // 2))
    adata.obs["ordered"] = pd.Categorical(np.arange(N) % 2, [1, 0], ordered=True)
    adata.layers["one"] = csr_matrix(adata.X)
    adata.obsm["none"] = np.empty((N, 0))
    adata.obsm["table"] = pd.DataFrame({"x y": np.arange(N)}, index=adata.obs_names)
    adata.varm["PCs"] = np.ones((8, 3))
    adata.obsp["near"] = csr_matrix(np.eye(N))
    adata.uns = {"nested": {"empty": {}, "list": ["x", "y"], "flag": np.bool_(True)}, "no": None}
    return adata


@pytest.mark.parametrize("output", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_formats(source, output):
    """Each is read and written, and all else is as it was."""
    write(odd_cells(), f"my cells.{source}")
    before, after = read(f"my cells.{source}"), annotated(f"my cells.{source}", f"out 1.{output}")
    assert after.obsm["X_scanvi"].shape == (N, 3)
    assert_same(without_ours(after), before)
    assert after.raw.n_vars == G and after.X.dtype == np.uint8


def test_answers_do_not_depend_on_the_format(cells):
    one, other = annotated("in.h5ad", "out.h5ad"), annotated("in.zarr", "out.zarr")
    pd.testing.assert_frame_equal(one.obs, other.obs)
    np.testing.assert_array_equal(one.obsm["X_scanvi"], other.obsm["X_scanvi"])


def test_a_store_is_replaced_when_asked(cells):
    shutil.copytree("in.zarr", "out.zarr")
    Path("out.zarr/old").touch()
    assert "scanvi_prediction" in annotated("in.h5ad", "out.zarr", "--overwrite").obs
    assert not Path("out.zarr/old").exists()


def test_an_old_layout_of_h5ad():
    """As anndata 0.6 wrote it: obs and var are tables, categories lie in uns."""
    adata = simulated(N, G)
    labels = pd.Categorical(adata.obs["cell_type"])
    obs = np.zeros(N, [("index", "S8"), ("cell_type", "i1")])
    obs["index"], obs["cell_type"] = adata.obs_names, labels.codes
    var = np.zeros(G, [("index", "S8")])
    var["index"] = adata.var_names
    with h5py.File("in.h5ad", "w") as file:
        file["obs"], file["var"], file["X"] = obs, var, adata.X
        file["uns/cell_type_categories"] = labels.categories.to_numpy(dtype="S8")
    found = annotated("in.h5ad", "out.zarr")
    assert list(found.obs["cell_type"]) == list(labels)
    np.testing.assert_array_equal(found.X, adata.X)


def compression(path: str) -> tuple:
    with h5py.File(path) as file:
        return file["X/data"].compression, file["X/data"].compression_opts


def test_compression_is_kept():
    """In bytes too: what is added is less than what the compression saves."""
    adata = simulated(400, 600)
    adata.X = csr_matrix(adata.X)
    write(adata, "in.h5ad", compression="gzip", compression_opts=9)
    annotated("in.h5ad", "out.h5ad")
    annotated("in.h5ad", "plain.h5ad", "--compression", "none")
    assert compression("out.h5ad") == ("gzip", 9)
    assert compression("plain.h5ad") == (None, None)
    annotated("in.h5ad", "lzf.h5ad", "--compression", "lzf")
    assert compression("lzf.h5ad") == ("lzf", None)
    sizes = {name: Path(f"{name}.h5ad").stat().st_size for name in ("in", "out", "plain")}
    assert sizes["in"] < sizes["out"] < 1.5 * sizes["in"] < sizes["plain"] / 2


# ---- folders and paths --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_home(cells, folder, monkeypatch, suffix):
    """A shell fills in no ~ after an equals sign or in quotes."""
    Path("home/sub").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setattr(plotting, "umap_of", first_two)
    shutil.move(f"in.{suffix}", "home")
    result = annotate(f"~/in.{suffix}", f"~/sub/out.{suffix}", "--report=~/report.html")
    assert (result.exit_code, result.stderr) == (0, "")
    assert Path("home/report.html").exists() and Path(f"home/sub/out.{suffix}").exists()
    assert not Path("~").exists()


def test_demo_at_home(folder, monkeypatch, no_training):  # noqa: F811
    """Looked at before training, made after it."""
    monkeypatch.setenv("HOME", str(folder / "file"))
    Path("file").touch()
    assert_refused(folder, run("demo", "--folder", "~/a"), f"{folder}/file/a cannot", ["file"])
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(AssertionError, match="training has begun"):
        raise run("demo", "--folder", "~/a/b").exception
    assert list(folder.iterdir()) == [folder / "file"]


REFUSED = {  # IN, OUT, further options, message
    "a file exists": ("in.zarr", "in.h5ad", [], "replaces it .on the command line: --overwrite"),
    "a store exists": ("in.h5ad", "in.zarr", [], "in.zarr exists; overwrite=True replaces it"),
    "the input": ("in.zarr", "in.zarr", ["--overwrite"], "is the input"),
    "in the input": ("in.zarr", "in.zarr/out.h5ad", [], "lies in the input in.zarr"),
    "around the input": ("in.zarr", ".", ["--overwrite"], "the input in.zarr lies in"),
    "another suffix": ("in.h5ad", "out.h5", [], "ends in '.h5', expected .h5ad or .zarr"),
    "no store": ("in.h5ad", "other.zarr", ["--overwrite"], "a folder without an AnnData"),
    "no folder": ("in.h5ad", "a b/out.zarr", [], "no folder a b; make it first: mkdir -p 'a b'"),
    "report in the input": ("in.zarr", "out.zarr", ["--report=in.zarr/a.html"], "lies in in.zarr"),
    "report in OUT": ("in.h5ad", "out.zarr", ["--report=out.zarr/a.html"], "lies in out.zarr"),
    "report is a folder": ("in.h5ad", "out.zarr", ["--report", "other.html"], "is a folder"),
    "zarr, gzip": (
        "in.h5ad",
        "out.zarr",
        ["--compression", "gzip"],
        "its own way .on the command line: --compression keep",
    ),
    "missing": ("none.zarr", "out.zarr", [], "there is no file none.zarr"),
    "no such store": ("other.zarr", "out.zarr", [], "is no .zarr store: there is neither"),
    "no columns": ("in.zarr/X", "out.zarr", [], "damaged or holds no AnnData"),
    "no raw": ("in.h5ad", "out.h5ad", ["--use-raw"], "there is no raw in the AnnData"),
    "no raw, by layer": ("in.h5ad", "out.h5ad", ["--layer", "raw"], "there is no layer 'raw'"),
    "two places": ("in.h5ad", "out.h5ad", ["--use-raw", "--layer", "a"], "name two places"),
    "no covariate": ("in.h5ad", "out.h5ad", ["--categorical-covariate-key", "a"], "no column 'a'"),
}


@pytest.mark.parametrize(("source", "output", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(cells, folder, no_training, source, output, options, message):  # noqa: F811
    Path("other.zarr").mkdir()
    Path("other.html").mkdir()
    before = sorted(folder.rglob("*"))
    result = annotate(source, output, *options)
    assert_refused(folder, result, message, left=["in.h5ad", "in.zarr", "other.html", "other.zarr"])
    assert sorted(folder.rglob("*")) == before


def test_a_damaged_store(cells, folder, no_training):  # noqa: F811
    shutil.rmtree("in.zarr/obs/cell_type")
    result = annotate("in.zarr", "out.zarr")
    assert_refused(folder, result, "in.zarr is damaged.*cell_type", left=["in.h5ad", "in.zarr"])


def test_what_zarr_cannot_hold_is_found_before_training(folder, no_training):  # noqa: F811
    adata = simulated(N, G)
    adata.obs["CD4/CD8"] = 1.0
    write(adata, "in.h5ad")
    result = annotate("in.h5ad", "out.zarr")
    assert_refused(folder, result, "out.zarr cannot hold all of the input: .*CD4/CD8")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk(cells, folder, monkeypatch, suffix):
    """After training; the old file stays."""
    shutil.move(f"in.{suffix}", f"old.{suffix}")
    source, output = f"in.{'zarr' if suffix == 'h5ad' else 'h5ad'}", f"old.{suffix}"
    annotate_model = SCANVI.annotate

    def fill_the_disk(model):
        annotate_model(model)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    monkeypatch.setattr(SCANVI, "annotate", fill_the_disk)
    before = sorted(folder.rglob("*"))
    with file_limit(None):
        result = annotate(source, output, "--overwrite")
    assert_refused(folder, result, f"{output} cannot be written: File too large", {source, output})
    assert sorted(folder.rglob("*")) == before


def test_no_place_for_the_report(cells, folder, monkeypatch):
    """The cells are written by then."""

    def fail(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr(plotting, "umap_of", first_two)
    result = annotate("in.h5ad", "out.h5ad", "--report", "report.html")
    left = ["in.h5ad", "in.zarr", "out.h5ad"]
    assert_refused(folder, result, "report.html cannot be written: No space left on device", left)


# ---- where counts and labels are ----------------------------------------------------------------


@pytest.fixture
def cellxgene():
    """Counts in raw, X log-normalised and with fewer genes, labels missing where not known."""
    adata = simulated(60, 30)
    adata.X = csr_matrix(adata.X)
    adata.obs["batch"] = pd.Categorical(np.array(["b1", "b2"])[np.arange(60) % 2])
    adata.obs["age"] = np.arange(60.0)
    adata.obs["size"] = 1 + np.arange(60.0) / 60
    adata.obs["cell_type"] = pd.Categorical(adata.obs["cell_type"].replace("Unknown", None))
    adata.raw = adata.copy()
    adata = adata[:, :20].copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    write(adata, "in.h5ad")
    return adata


@pytest.mark.parametrize("option", [["--use-raw"], ["--layer", "raw"]])
def test_counts_in_raw(cellxgene, option):
    found = annotated("in.h5ad", "out.h5ad", *option)
    setup = found.uns["pyro_scanvi"]["setup"]
    assert list(setup["genes"]) == list(cellxgene.raw.var_names)
    assert setup["use_raw"]
    assert_same(without_ours(found), cellxgene)


def test_the_refusal_says_where_counts_are(cellxgene, folder, no_training):  # noqa: F811
    result = annotate("in.h5ad", "out.h5ad")
    assert_refused(folder, result, "log-normalised.* raw holds whole numbers: .* --use-raw")


def test_empty_cells_are_those_of_raw(cellxgene, folder):
    raw = cellxgene.raw.to_adata()
    raw.X = csr_matrix(raw.X.multiply(~np.isin(np.arange(60), [3, 11])[:, None]))
    cellxgene.raw = raw
    write(cellxgene, "in.h5ad")
    assert_refused(folder, annotate("in.h5ad", "out.h5ad", "--use-raw"), "cells without counts: 2")
    found = annotated("in.h5ad", "out.h5ad", "--use-raw", "--drop-empty-cells")
    assert (found.n_obs, found.raw.shape) == (58, (58, 30))
    assert not {"cell3", "cell11"} & set(found.obs_names)


def test_missing_labels_are_unlabelled(cellxgene):
    """And stay missing."""
    found = annotated("in.h5ad", "out.h5ad", "--use-raw")
    assert list(found.uns["pyro_scanvi"]["setup"]["classes"]) == ["B", "NK", "T"]
    assert found.obs["scanvi_prediction"].notna().all()
    assert found.obs["cell_type"].isna().sum() == cellxgene.obs["cell_type"].isna().sum() > 20


def test_variable_genes(cellxgene):
    """Chosen by scanpy within each batch; the file keeps all."""
    options = ("--use-raw", "--n-top-genes", 7, "--batch-key", "batch")
    found = annotated("in.h5ad", "out.h5ad", *options)
    cells = cellxgene.raw.to_adata()
    cells.obs["batch"] = cellxgene.obs["batch"]
    sc.experimental.pp.highly_variable_genes(cells, n_top_genes=7, batch_key="batch")
    chosen = cells.var_names[cells.var["highly_variable"]]
    assert list(found.uns["pyro_scanvi"]["setup"]["genes"]) == list(chosen)
    assert found.raw.n_vars == 30
    assert_same(without_ours(found), cellxgene)


def test_covariates(cellxgene):
    write(cellxgene.raw.to_adata(), "in.zarr")
    keys = ("--categorical-covariate-key", "batch", "--categorical-covariate-key", "truth")
    keys += ("--continuous-covariate-key", "age", "--size-factor-key", "size")
    setup = annotated("in.zarr", "out.zarr", *keys).uns["pyro_scanvi"]["setup"]
    assert list(setup["categorical_covariate_keys"]) == ["batch", "truth"]
    assert list(setup["continuous_covariate_keys"]) == ["age"]
    assert setup["size_factor_key"] == "size"


def test_coarser_labels(cellxgene):
    cells = cellxgene.raw.to_adata()
    cells.obs["broad"] = ["all of them"] * cells.n_obs
    write(cells, "in.zarr")
    found = annotated("in.zarr", "out.zarr", "--coarse-labels-key", "broad")
    sources = found.uns["pyro_scanvi"]["setup"]["sources"]
    assert sources["coarse_key"] == "broad" and list(sources["coarse_names"]) == ["all of them"]
