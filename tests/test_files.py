"""Files are there whole or not at all; what is damaged is an error and never a crash."""

import errno
import os
import stat
import tempfile
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix, csr_matrix

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.files import (
    check_folder,
    check_writable,
    exists,
    make_folder,
    read_anndata,
    replacing,
    write_anndata,
)
from tests.examples import simulated


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- whole or not at all ------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "old"])
def test_replacing_puts_the_file_in_place(tmp_path, old):
    path = tmp_path / "out.h5ad"
    if old is not None:
        path.write_text(old)
    with replacing(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".h5ad")
        temporary.write_text("new")
        assert old is None or path.read_text() == old
    assert path.read_text() == "new"
    assert names(tmp_path) == ["out.h5ad"]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replacing_leaves_all_as_it_was_if_the_block_raises(tmp_path, old, error):
    path = tmp_path / "out.h5ad"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ([] if old is None else ["out.h5ad"])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "out.h5ad") as temporary:
            temporary.write_text("new")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.h5ad").stat().st_mode) == mode


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert (target.read_text(), link.read_text()) == ("old", "new")


# ---- where nothing can be written ---------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """in.h5ad, links to it by name and by content, old.h5ad, a folder."""
    for name in ("in.h5ad", "old.h5ad"):
        (tmp_path / name).write_text(name)
    (tmp_path / "symbolic").symlink_to("in.h5ad")
    (tmp_path / "hard").hardlink_to(tmp_path / "in.h5ad")
    (tmp_path / "sub").mkdir()
    return tmp_path


UNWRITABLE = {
    "the input": ("in.h5ad", True, "is the input; choose another name"),
    "the input by another way": ("sub/../in.h5ad", True, "is the input"),
    "a symbolic link to the input": ("symbolic", True, "is the input"),
    "a hard link to the input": ("hard", True, "is the input"),
    "a folder": ("sub", True, "is a folder; name a file"),
    "exists": ("old.h5ad", False, "exists; add --overwrite"),
    "no folder": ("none/out.h5ad", False, "there is no folder .*none; make it first"),
    "below a file": ("old.h5ad/out.h5ad", False, "there is no folder .*old.h5ad; it is a file"),
    "a name too long": ("x" * 300, False, "File name too long"),
}


@pytest.mark.parametrize(("name", "overwrite", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_unwritable(folder, name, overwrite, message):
    before = names(folder)
    with pytest.raises(InputError, match=message):
        check_writable(folder / name, overwrite, folder / "in.h5ad")
    assert names(folder) == before


@pytest.mark.parametrize(
    ("name", "overwrite"), [("out.h5ad", False), ("old.h5ad", True), ("sub/out.h5ad", False)]
)
def test_writable(folder, name, overwrite):
    before = names(folder)
    check_writable(folder / name, overwrite, folder / "in.h5ad")
    check_writable(folder / name, overwrite)
    assert names(folder) == before


def test_no_permission(tmp_path, monkeypatch):
    """Tests may run as root, to whom all is permitted."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="nothing can be written into .*: Permission denied"):
        check_writable(tmp_path / "out.h5ad", overwrite=False)
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(InputError, match="cannot be used: Permission denied"):
        exists(tmp_path)


def test_make_folder(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    check_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(InputError, match="cannot be made"):
            make_folder(path)
    assert names(tmp_path) == ["a", "file"]


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


@pytest.fixture
def path(tmp_path):
    write_anndata(cells(), tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_round_trip(path):
    found, expected = read_anndata(path), cells()
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    pd.testing.assert_frame_equal(found.obsm["soft"], expected.obsm["soft"])
    assert (found.X != expected.X).nnz == 0
    assert (found.raw.X != expected.raw.X).nnz == 0
    assert found.uns == expected.uns
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_strings_keep_their_type(tmp_path, dtype):
    adata = simulated(n=24, n_genes=6)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(dtype)
    write_anndata(adata, tmp_path / "cells.h5ad")
    found = read_anndata(tmp_path / "cells.h5ad").obs["cell_type"]
    pd.testing.assert_series_equal(found, adata.obs["cell_type"])


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    adata = cells()
    adata.uns["odd"] = object()
    with pytest.raises(Exception, match="odd"):
        write_anndata(adata, tmp_path / "cells.h5ad")
    assert names(tmp_path) == []


def test_duplicated_names_are_read_without_a_warning(tmp_path):
    """They are an error later, with a better message."""
    adata = cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs_names = ["twice"] * 24
        write_anndata(adata, tmp_path / "cells.h5ad")
    assert read_anndata(tmp_path / "cells.h5ad").n_obs == 24


# ---- damage -------------------------------------------------------------------------------------


def hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["numbers"] = [1, 2, 3]


NO_ANNDATA = {
    "nothing there": (lambda path: None, "there is no file"),
    "a folder": (Path.mkdir, "there is no file"),
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
    SCANVI(adata, n_hidden=2).predict()
    write_anndata(adata[::2].copy(), path)
