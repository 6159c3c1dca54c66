"""Files that are there whole or not at all."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import h5py
from scipy.sparse import issparse

from pyro_scanvi.checks import InputError

LARGEST_EXPANSION = 1000


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it if the block succeeds, removed if not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp lets nobody else read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output that cannot be written, is the input, or would overwrite a file."""
    there = exists(path)
    if there and source is not None and exists(source) and path.samefile(source):
        raise InputError(f"the output {path} is the input; choose another name")
    if path.is_dir():
        raise InputError(f"the output {path} is a folder; name a file")
    if there and not overwrite:
        raise InputError(f"the output {path} exists; add --overwrite to replace it")
    check_folder(path.parent)


def exists(path: Path) -> bool:
    """Whether there is something at `path`; InputError where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a name too long, a folder that may not be entered
        raise InputError(f"{path} cannot be used: {error.strerror}") from None
    return True


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there, and check that it takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {error.strerror}") from None
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Refuse a folder that does not exist or takes no files."""
    if not folder.is_dir():
        mend = "it is a file" if folder.exists() else "make it first"
        raise InputError(f"there is no folder {folder}; {mend}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"nothing can be written into {folder}: {error.strerror}") from None


def read_anndata(path: Path) -> ad.AnnData:
    """An AnnData from a file; InputError if it is none."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if not h5py.is_hdf5(path):
        raise InputError(f"{path} is no .h5ad file, or it is truncated")
    try:
        with warnings.catch_warnings():  # what they warn of is checked later, or harmless
            warnings.simplefilter("ignore")
            with h5py.File(path) as file:
                file.visititems(_check_size)
            adata = ad.read_h5ad(path)
        _check_sparse(adata)
    except Exception as error:  # h5py, anndata and scipy raise whatever the bytes lead them to
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or holds no AnnData: {first_line}") from error
    return adata


def _check_size(name: str, item: h5py.Group | h5py.Dataset) -> None:
    """Refuse plain arrays that claim far more than is stored of them; they fill the memory."""
    if isinstance(item, h5py.Dataset) and not item.id.get_create_plist().get_nfilters():
        stored = item.id.get_storage_size()
        if 0 < stored < item.nbytes / LARGEST_EXPANSION:
            raise ValueError(f"{name} claims {item.nbytes} bytes, {stored} are there")


def _check_sparse(adata: ad.AnnData) -> None:
    """Refuse sparse matrices with indices out of range, on which scipy would crash."""
    mappings = (adata.layers, adata.obsm, adata.varm, adata.obsp, adata.varp)
    matrices = [adata.X, *(matrix for mapping in mappings for matrix in mapping.values())]
    matrices += [] if adata.raw is None else [adata.raw.X]
    for matrix in filter(issparse, matrices):
        matrix.check_format(full_check=True)


def write_anndata(adata: ad.AnnData, path: Path) -> None:
    """Write an AnnData, whole or not at all; strings stay strings, of their type."""
    with replacing(path) as temporary, warnings.catch_warnings():
        # Names of cell types hold slashes; the columns of obsm are groups of the file.
        warnings.filterwarnings("ignore", message="Forward slashes", category=FutureWarning)
        with ad.settings.override(allow_write_nullable_strings=True):
            adata.write_h5ad(temporary, convert_strings_to_categoricals=False)
