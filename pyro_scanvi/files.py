"""Files that are there whole or not at all."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import h5py

from pyro_scanvi.checks import InputError


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
    if source is not None and path.resolve() == source.resolve():
        raise InputError(f"the output {path} is the input; choose another name")
    if path.is_dir():
        raise InputError(f"the output {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise InputError(f"the output {path} exists; add --overwrite to replace it")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that does not exist or takes no files."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; make it first")
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
        return ad.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise whatever the bytes lead them to
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or holds no AnnData: {first_line}") from error


def write_anndata(adata: ad.AnnData, path: Path) -> None:
    """Write an AnnData, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings():
        # Names of cell types hold slashes; the columns of obsm are groups of the file.
        warnings.filterwarnings("ignore", message="Forward slashes", category=FutureWarning)
        adata.write_h5ad(temporary)
