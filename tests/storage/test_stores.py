"""AnnData on the disk: as it was, whole or not at all; damage is an error and never a crash."""

import errno
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy.sparse import csc_matrix, csr_matrix

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.storage import stores
from pyro_scanvi.storage.stores import (
    Compression,
    check_output,
    check_storable,
    layout_of,
    read_anndata,
    write_anndata,
)
from tests.examples import as_they_are, file_limit, simulated


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def check_harmless(monkeypatch):
    """The look of another process at an .h5ad file, which takes its time: here it is left out."""
    check = stores.H5ad.check_harmless
    monkeypatch.setattr(stores.H5ad, "check_harmless", lambda self, path: None)
    return check


# ---- AnnData ------------------------------------------------------------------------------------


def cells() -> ad.AnnData:
    """Cells with something in every slot."""
    adata = simulated(n=24, n_genes=6)
    adata.X = csr_matrix(adata.X)
    adata.layers["more"] = csc_matrix(adata.X)
    adata.raw = adata
    adata.obsm["soft"] = pd.DataFrame({"a/b": np.arange(24.0)}, index=adata.obs_names)
    adata.obsm["sparse"] = csr_matrix(adata.X)
    adata.obsp["near"] = csr_matrix(np.eye(24))
    adata.varm["loadings"] = np.ones((6, 2))
    adata.varp["near"] = csc_matrix(np.eye(6))
    adata.uns["note"] = {"a": "text", "b": 1}
    return adata


FORMATS = ("h5ad", "zarr")


@pytest.fixture
def path(tmp_path):
    write_anndata(cells(), tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.mark.parametrize("suffix", FORMATS)
def test_round_trip(tmp_path, suffix):
    expected = cells()
    if suffix == "zarr":
        expected.obsm["soft"].columns = ["a|b"]
    path = tmp_path / f"cells.{suffix}"
    write_anndata(expected, path)
    found = read_anndata(path)
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    pd.testing.assert_frame_equal(found.obsm["soft"], expected.obsm["soft"])
    assert (found.X != expected.X).nnz == 0
    assert (found.raw.X != expected.raw.X).nnz == 0
    assert found.uns == expected.uns
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_strings_keep_their_type(tmp_path, dtype, suffix):
    adata = simulated(n=24, n_genes=6)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(dtype)
    write_anndata(adata, tmp_path / f"cells.{suffix}")
    found = read_anndata(tmp_path / f"cells.{suffix}").obs["cell_type"]
    pd.testing.assert_series_equal(found, adata.obs["cell_type"])


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_cannot_be_written_leaves_no_file(tmp_path, suffix):
    adata = simulated(n=24, n_genes=6)
    adata.uns["odd"] = object()
    with pytest.raises(Exception, match="odd"):
        write_anndata(adata, tmp_path / f"cells.{suffix}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 3000, 30000, 200000])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_told_of_and_leaves_the_old_one(tmp_path, suffix, limit):
    """HDF5 itself would end the process."""
    path, large = tmp_path / f"cells.{suffix}", simulated(n=1000, n_genes=200)
    large.layers["counts"] = np.random.default_rng(0).random(large.shape)
    write_anndata(simulated(n=6), path)
    with file_limit(limit), pytest.raises(InputError, match=f"{path} cannot be written: File too"):
        write_anndata(large, path)
    with file_limit(0), pytest.raises(InputError, match=f"{path} cannot be written: File too"):
        check_storable(large, path, {})
    assert (names(tmp_path), read_anndata(path).n_obs) == ([path.name], 6)


def test_our_own_faults_are_no_full_disk(tmp_path, monkeypatch):
    def fail(adata, *args, **kwargs):
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(ad.io, "write_elem", fail)
    with pytest.raises(RuntimeError, match="dictionary"):
        write_anndata(simulated(n=12), tmp_path / "cells.h5ad")


def test_what_another_format_cannot_hold_is_found_before(tmp_path):
    """The slash in the name of a column: a group of an .h5ad file, refused by zarr."""
    adata, path = cells(), tmp_path / "cells.zarr"
    for suffix in FORMATS:
        check_storable(simulated(), tmp_path / f"cells.{suffix}", {})
    check_storable(adata, tmp_path / "cells.h5ad", {})
    with pytest.raises(
        InputError, match=r"cells\.zarr cannot hold all of the input: .*slash.*'a/b'"
    ):
        check_storable(adata, path, {})
    assert names(tmp_path) == []
    assert adata.shape == cells().shape


def test_duplicated_names_are_read_without_a_warning(tmp_path):
    """They are an error later, with a better message."""
    adata = cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs_names = ["twice"] * 24
        write_anndata(adata, tmp_path / "cells.h5ad")
    assert read_anndata(tmp_path / "cells.h5ad").n_obs == 24


# ---- how arrays are laid out --------------------------------------------------------------------


def filters(path: Path) -> set[tuple]:
    """Compression and its level of all arrays that hold more than one number."""
    found = []

    def note(_, item):
        if isinstance(item, h5py.Dataset) and item.size > 1:
            found.append((item.compression, item.compression_opts))

    with h5py.File(path) as file:
        file.visititems(note)
    return set(found)


GZIP = {"compression": "gzip"}
COMPRESSED = {  # how the input is written, what is asked for, how the output is written
    "gzip is kept": (GZIP, "keep", ("gzip", 4)),
    "its level is kept": (GZIP | {"compression_opts": 9}, "keep", ("gzip", 9)),
    "lzf is kept": ({"compression": "lzf"}, "keep", ("lzf", None)),
    "nothing is kept": ({}, "keep", (None, None)),
    "none": (GZIP, "none", (None, None)),
    "gzip": ({}, "gzip", ("gzip", 4)),
    "lzf": (GZIP, "lzf", ("lzf", None)),
}


@pytest.mark.parametrize(("given", "choice", "expected"), COMPRESSED.values(), ids=COMPRESSED)
def test_compression(tmp_path, given, choice, expected):
    source, path = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    simulated().write_h5ad(source, **given)
    layout = layout_of(path, source, Compression(choice))
    write_anndata(read_anndata(source), path, layout)
    assert filters(path) == {expected}


def test_compression_is_that_of_the_largest_array(tmp_path):
    """As where counts alone were compressed, by another tool."""
    source, path = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    simulated().write_h5ad(source)
    with h5py.File(source, "r+") as file:
        counts = file["X"][:]
        del file["X"]
        file.create_dataset("X", data=counts, compression="gzip", compression_opts=2)
    assert layout_of(path, source, Compression.KEEP) == GZIP | {"compression_opts": 2}


def test_a_compression_without_a_name_becomes_gzip(tmp_path):
    """Such as those of plugins; a checksum stands for them."""
    source = tmp_path / "in.h5ad"
    with h5py.File(source, "w") as file:
        file.create_dataset("X", data=np.ones(9), fletcher32=True)
    assert layout_of(tmp_path / "out.h5ad", source, Compression.KEEP) == GZIP


def test_from_zarr_to_h5ad_is_compressed(tmp_path):
    source, path = tmp_path / "in.zarr", tmp_path / "out.h5ad"
    write_anndata(simulated(), source)
    write_anndata(simulated(), path, layout_of(path, source, Compression.KEEP))
    assert filters(path) == {("gzip", 4)}


@pytest.mark.parametrize("version", [2, 3])
def test_the_version_of_a_store_is_kept(tmp_path, version):
    source, path = tmp_path / "in.zarr", tmp_path / "out.zarr"
    write_anndata(simulated(), source, {"zarr_write_format": version})
    assert zarr.open_group(source, mode="r").metadata.zarr_format == version
    write_anndata(read_anndata(source), path, layout_of(path, source, Compression.KEEP))
    assert zarr.open_group(path, mode="r").metadata.zarr_format == version


def test_zarr_compresses_in_its_own_way(tmp_path):
    path, source = tmp_path / "out.zarr", tmp_path / "in.h5ad"
    assert layout_of(path, source, Compression.KEEP) == {}
    with pytest.raises(InputError, match="compression=.lzf. is for .h5ad"):
        layout_of(path, source, Compression.LZF)


# ---- where nothing can be written ---------------------------------------------------------------


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    """To be copied: many files take long to write."""
    path = tmp_path_factory.mktemp("small") / "in.zarr"
    write_anndata(simulated(n=6), path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, small_store):
    """in.h5ad and in.zarr, links to them, old.h5ad and old.zarr, other things."""
    monkeypatch.chdir(tmp_path)
    for name in ("in.h5ad", "old.h5ad", "file.zarr"):
        Path(name).write_text(name)
    for name in ("in.zarr", "old.zarr", "old.zarr/sub.zarr"):
        shutil.copytree(small_store, name)
    for name in ("sub", "empty.zarr", "images.zarr"):
        Path(name).mkdir()
    zarr.create_group("images.zarr/images")
    Path("symbolic.h5ad").symlink_to("in.h5ad")
    Path("hard.h5ad").hardlink_to("in.h5ad")
    Path("symbolic.zarr").symlink_to("in.zarr")
    Path("to_nothing.h5ad").symlink_to("none")
    return tmp_path


UNWRITABLE = {  # OUT, whether to overwrite, message; IN is in.h5ad
    "the input": ("in.h5ad", True, "is the input; choose another name"),
    "the input by another way": ("sub/../in.h5ad", True, "is the input"),
    "a symbolic link to the input": ("symbolic.h5ad", True, "is the input"),
    "a hard link to the input": ("hard.h5ad", True, "is the input"),
    "another suffix": ("out.h5", False, r"out.h5 ends in '.h5', expected .h5ad or .zarr"),
    "another suffix, exists": ("sub/../out.csv.gz", True, r"ends in '.gz', expected .h5ad or"),
    "no suffix": ("out", False, "out has no suffix, expected .h5ad or .zarr"),
    "a folder": ("old.zarr/../sub/.h5ad", True, "has no suffix"),
    "a file as a store": ("file.zarr", True, "is a file, and a .zarr store is a folder"),
    "an empty folder": ("empty.zarr", True, "a folder without an AnnData, which is not replaced"),
    "a store of something else": ("images.zarr", True, "a folder without an AnnData"),
    "a file exists": ("old.h5ad", False, "exists; overwrite=True replaces it"),
    "a store exists": ("old.zarr", False, "exists; overwrite=True replaces it"),
    "no folder": ("none/out.h5ad", False, "there is no folder none; make it first: mkdir -p none"),
    "no folder for a store": ("none/out.zarr", False, "there is no folder none"),
    "below a file": ("old.h5ad/out.h5ad", False, "there is no folder old.h5ad; it is a file"),
    "a name too long": ("x" * 300, False, "File name too long"),
}


def everything(folder: Path) -> list[tuple]:
    """Names and times of all that lies below a folder."""
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize(("name", "overwrite", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_unwritable(folder, name, overwrite, message):
    before = everything(folder)
    with pytest.raises(InputError, match=message):
        check_output(Path(name), overwrite, Path("in.h5ad"))
    assert everything(folder) == before


TANGLED = {  # IN, OUT, message
    "the input": ("in.zarr", "in.zarr", "is the input"),
    "a link to the input": ("in.zarr", "symbolic.zarr", "is the input"),
    "the input by a link": ("symbolic.zarr", "in.zarr", "is the input"),
    "a file in the input": ("in.zarr", "in.zarr/out.h5ad", "lies in the input in.zarr"),
    "a store in the input": ("in.zarr", "in.zarr/obs/out.zarr", "lies in the input"),
    "in the input by a link": ("in.zarr", "symbolic.zarr/out.zarr", "lies in the input"),
    "around the input": ("old.zarr/sub.zarr", "old.zarr", "the input .* lies in the output"),
    "links in a ring": ("ring1", "out.h5ad", "ring1 cannot be used: Too many levels"),
}


@pytest.mark.parametrize(("source", "output", "message"), TANGLED.values(), ids=TANGLED)
def test_tangled(folder, source, output, message):
    Path("ring1").symlink_to("ring2")
    Path("ring2").symlink_to("ring1")
    before = everything(folder)
    with pytest.raises(InputError, match=message):
        check_output(Path(output), True, Path(source))
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("name", "overwrite"),
    [
        ("out.h5ad", False),
        ("old.h5ad", True),
        ("sub/out.h5ad", False),
        ("out.zarr", False),
        ("old.zarr", True),
        ("to_nothing.h5ad", False),
        ("in.h5ad.zarr", False),
    ],
)
def test_writable(folder, name, overwrite):
    before = everything(folder)
    for source in ("in.h5ad", "in.zarr", "none.h5ad", None):
        check_output(Path(name), overwrite, None if source is None else Path(source))
    assert everything(folder) == before


def test_a_store_that_may_not_be_changed_is_not_replaced(folder, monkeypatch):
    """Tests may run as root, to whom all is permitted."""

    def refuse(folder):
        raise InputError(f"nothing can be written into {folder}")

    monkeypatch.setattr("pyro_scanvi.storage.stores.check_folder", refuse)
    with pytest.raises(InputError, match="nothing can be written into old.zarr"):
        check_output(Path("old.zarr"), overwrite=True)


# ---- damage -------------------------------------------------------------------------------------


def hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["numbers"] = [1, 2, 3]


NO_ANNDATA = {
    "nothing there": (lambda path: None, "there is no file"),
    "a folder": (Path.mkdir, "the folder .* is no .zarr store: there is neither zarr.json nor"),
    "packed": (lambda path: path.write_bytes(b"\x1f\x8b\x08" * 9), "is packed by gzip as a whole"),
    "a store of something else": (
        lambda path: zarr.create_group(path).create_group("images"),
        "is damaged or holds no AnnData: expected obs and var, there is images",
    ),
    "an empty store": (lambda path: zarr.create_group(path) and None, "there is nothing"),
    "empty": (Path.touch, "is no .h5ad file, or it is truncated"),
    "text": (lambda path: path.write_text("cell,gene\n" * 100), "is no .h5ad file"),
    "another HDF5 file": (hdf5, "is damaged or holds no AnnData"),
}


@pytest.mark.parametrize(("make", "message"), NO_ANNDATA.values(), ids=NO_ANNDATA)
def test_no_anndata(tmp_path, make, message):
    make(tmp_path / "in.h5ad")
    with pytest.raises(InputError, match=message):
        read_anndata(tmp_path / "in.h5ad")


@pytest.mark.parametrize("share", np.arange(20) / 20)
def test_truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"truncated|damaged"):
        read_anndata(path)


SPARSE = ("X", "layers/more", "raw/X", "obsm/sparse", "obsp/near", "varp/near")


@pytest.mark.parametrize("part", ["indices", "indptr"])
@pytest.mark.parametrize("matrix", SPARSE)
@pytest.mark.parametrize("value", [2**30, -1])
def test_sparse_indices_out_of_range(path, matrix, part, value):
    """Taken at their word they make scipy read and write where nothing is its own."""
    with h5py.File(path, "r+") as file:
        file[matrix][part][1] = value
    with pytest.raises(InputError, match="is damaged or holds no AnnData"):
        read_anndata(path)


def test_an_array_that_would_fill_the_memory(path):
    """Its shape is changed as a flipped bit would."""
    with h5py.File(path, "r+") as file:
        file["varp/near/data"].resize((2**40,))
    with pytest.raises(InputError, match="varp/near/data claims 8796093022208 bytes, 48 are there"):
        read_anndata(path)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bits(path, seed):
    """An error, or cells that can be worked with."""
    rng = np.random.default_rng(seed)
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
    content[rng.integers(len(content), size=8)] ^= np.uint8(1 << rng.integers(8))
    path.write_bytes(content)
    try:
        adata = read_anndata(path)
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    except InputError:
        return
    as_they_are(SCANVI(adata, n_hidden=2)).predict()
    write_anndata(adata[::2].copy(), path)


LOOKS = {  # what the other process does, and whether the file is then read
    "it crashes": ("print('begun', flush=True); os.abort()", False),
    "it comes to no end": ("print('begun', flush=True); time.sleep(60)", False),
    "it does not start": ("raise ImportError", True),
    "it ends": ("print('begun'); print('ended')", True),
}


@pytest.mark.parametrize(("does", "reads"), LOOKS.values(), ids=LOOKS)
def test_another_process_looks_first(path, tmp_path, monkeypatch, check_harmless, does, reads):
    script = tmp_path / "probe.py"
    script.write_text(f"import os, time\n{does}")
    monkeypatch.setattr(stores.H5ad, "check_harmless", check_harmless)
    monkeypatch.setattr(stores.probe, "__file__", str(script))
    monkeypatch.setattr(stores, "PATIENCE", 1)
    message = f"{path} is damaged or holds no AnnData: HDF5 crashes on it, or comes to no end"
    with nullcontext() if reads else pytest.raises(InputError, match=message):
        assert read_anndata(path).n_obs == 24
    if reads:
        read_anndata(path, is_known=True)


def test_nobody_knows_where_python_is(path, monkeypatch, check_harmless):
    monkeypatch.setattr(sys, "executable", "/none")
    check_harmless(stores.H5ad(), path)


def test_the_look_finds_nothing_wrong_with_a_whole_file(path, check_harmless):
    check_harmless(stores.H5ad(), path)
    assert probe_says(path) == ["begun", "ended"]
    path.write_bytes(path.read_bytes()[:3000])
    assert probe_says(path) == ["begun", "ended"], "what Python can catch is left to the reader"


def test_the_look_in_this_process(path, capsys):
    """Where its lines are counted."""
    with h5py.File(path, "r+") as file:
        file.create_dataset("texts", data=["a", "b"])
        file.create_dataset("chunks", data=np.arange(6), chunks=(2,))
    stores.probe.main(str(path))
    assert capsys.readouterr().out.split() == ["begun", "ended"]


def probe_says(path: Path) -> list[str]:
    command = [sys.executable, "-P", stores.probe.__file__, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


# ---- damage to a store --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def whole_store(request, tmp_path_factory):
    """A store of 300 cells by 60 genes, X in three chunks."""
    path = tmp_path_factory.mktemp("whole") / "in.zarr"
    adata = simulated(n=300, n_genes=60)
    adata.layers["sparse"] = csr_matrix(adata.X)
    adata.obs["first"] = pd.Categorical(["one"] * 300)
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=request.param):
        warnings.simplefilter("ignore")
        adata.write_zarr(path, chunks=(100, 60))
    return path


@pytest.fixture
def store(whole_store, tmp_path):
    """One to damage."""
    return Path(shutil.copytree(whole_store, tmp_path / "in.zarr"))


def chunks(store: Path, array: str) -> list[Path]:
    """Files with the values of an array."""
    files = (path for path in (store / array).rglob("*") if path.is_file())
    return sorted(path for path in files if path.name not in (".zarray", ".zattrs", "zarr.json"))


def test_what_is_zero_may_be_missing(store):
    """A category that all cells have: its codes are zeros, which zarr does not write."""
    assert chunks(store, "obs/first/codes") == []
    assert (read_anndata(store).obs["first"] == "one").all()


@pytest.mark.parametrize("array", ["data", "indices", "indptr"])
def test_a_missing_part_of_a_sparse_matrix(store, array):
    chunks(store, f"layers/sparse/{array}")[0].unlink()
    with pytest.raises(InputError, match="is damaged or holds no AnnData"):
        read_anndata(store)


def test_one_gene_has_indices_of_zeros(tmp_path):
    adata = simulated(n=30)[:, :1].copy()
    adata.X = csr_matrix(adata.X)
    write_anndata(adata, tmp_path / "in.zarr")
    assert chunks(tmp_path / "in.zarr", "X/indices") == []
    assert (read_anndata(tmp_path / "in.zarr").X != adata.X).nnz == 0


def test_a_missing_part_of_a_dense_matrix_is_told_of(store):
    """It may be zeros, though counts seldom are."""
    chunks(store, "X")[1].unlink()
    with pytest.warns(UserWarning, match="misses files of X; they count as zeros"):
        adata = read_anndata(store)
    assert not adata.X[100:200].any() and adata.X[:100].any() and adata.X[200:].any()


@pytest.mark.parametrize("name", ["obs", "obs/cell_type", "X", "layers/sparse/indptr"])
def test_a_missing_part_of_a_store(store, name):
    """Though a list at the root, or above, still names it."""
    shutil.rmtree(store / name)
    with pytest.raises(InputError, match="is damaged or holds no AnnData|is no .zarr store"):
        SCANVI.setup_anndata(read_anndata(store), "cell_type", "Unknown")


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
@pytest.mark.parametrize("array", ["X", "layers/sparse/data", "obs/_index", "obs/cell_type/codes"])
def test_truncated_chunks(store, array, share):
    chunk = chunks(store, array)[-1]
    content = chunk.read_bytes()
    chunk.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="is damaged or holds no AnnData"):
        read_anndata(store)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bits_in_a_store(store, seed):
    """An error, or cells that can be worked with."""
    rng = np.random.default_rng(seed)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    file = files[rng.integers(len(files))]
    content = np.frombuffer(file.read_bytes(), dtype=np.uint8).copy()
    content[rng.integers(len(content), size=4)] ^= np.uint8(1 << rng.integers(8))
    file.write_bytes(content)
    try:
        adata = read_anndata(store)
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    except InputError:
        return
    as_they_are(SCANVI(adata, n_hidden=2)).predict()


def test_what_may_not_be_read(tmp_path, monkeypatch):
    """Tests may run as root, to whom all is permitted."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "in.h5ad").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="in.h5ad is damaged.*: Permission denied"):
        read_anndata(tmp_path / "in.h5ad")
