"""An AnnData on the disk, as an ``.h5ad`` file or a ``.zarr`` store: read with care, written whole.

A format is a class: what it reads, what it may replace, and how an array is laid out in it.
"""

import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anndata as ad
import h5py
import numpy as np
import zarr
from scipy.sparse import issparse
from zarr.abc.buffer import Buffer

from pyro_scanvi.storage import probe
from pyro_scanvi.storage.files import (
    Unfailing,
    beside,
    check_folder,
    disk_errors,
    exists,
    is_within,
    replacing,
    replacing_folder,
)
from pyro_scanvi.validation import InputError

LARGEST_EXPANSION = 1000
PATIENCE, BYTES_A_SECOND = 60, 10**7  # of the process that looks at an .h5ad file first: seconds
PACKED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}  # first bytes
NODES = ("zarr.json", ".zgroup", ".zarray")  # each group and array of a store has one of them
SPARSE = ("csr_matrix", "csc_matrix")
MATRICES = re.compile(r"X|raw/X|layers/[^/]+")
DEFAULT_LAYOUT: Mapping[str, Any] = MappingProxyType({})


class Compression(StrEnum):
    """Of the arrays of an .h5ad file."""

    KEEP = "keep"
    GZIP = "gzip"
    LZF = "lzf"
    NONE = "none"


class H5ad:
    """One HDF5 file."""

    replacing = staticmethod(replacing)

    def check_readable(self, path: Path) -> None:
        """Refuse what is no HDF5 file."""
        if h5py.is_hdf5(path):
            return
        with path.open("rb") as file:
            start = file.read(6)
        packed = next((name for mark, name in PACKED.items() if start.startswith(mark)), None)
        if packed:
            raise InputError(f"{path} is packed by {packed} as a whole; unpack it first")
        raise InputError(f"{path} is no .h5ad file, or it is truncated")

    def check_harmless(self, path: Path) -> None:
        """Refuse a file on which HDF5 crashes or comes to no end, as another process finds out."""
        command = [sys.executable, "-P", probe.__file__, str(path)]
        limit = PATIENCE + path.stat().st_size / BYTES_A_SECOND
        try:
            told = subprocess.run(command, capture_output=True, timeout=limit, check=False).stdout
        except subprocess.TimeoutExpired as error:
            told = error.stdout or b""
        except OSError:  # a program that holds Python inside may not tell where Python is
            return
        words = told.decode(errors="replace").split()
        if probe.BEGUN in words and probe.ENDED not in words:
            raise ValueError("HDF5 crashes on it, or comes to no end")

    def check_replaceable(self, path: Path) -> None:
        """Refuse to replace a folder."""
        if path.is_dir():
            raise InputError(f"the output {path} is a folder; name a file")

    def read(self, path: Path) -> tuple[ad.AnnData, list[str]]:
        """The AnnData; and names of arrays that are there in part, which no HDF5 file has."""
        with h5py.File(path) as file:
            _check_parts(file)
            file.visititems(_check_array)
        return ad.read_h5ad(path), []

    def write(self, adata: ad.AnnData, path: Path, layout: Mapping[str, Any]) -> None:
        """Write a file; `layout` holds arguments of h5py's ``create_dataset``."""
        with Unfailing(path) as device, h5py.File(device, "w") as file:
            ad.io.write_elem(file, "/", adata, dataset_kwargs=layout)
            for name in ("X", "raw"):  # earlier versions of anndata read no null
                if getattr(adata, name) is None:
                    file.pop(name, None)

    def layout(self, source: Path, compression: Compression) -> Mapping[str, Any]:
        """How arrays are compressed: as asked, or as most of the source is."""
        if compression is Compression.NONE:
            return DEFAULT_LAYOUT
        if compression is not Compression.KEEP:
            return {"compression": compression.value}
        return {"compression": "gzip"} if source.is_dir() else _filter_of(source)


class Zarr:
    """A folder with a file for each chunk of an array."""

    replacing = staticmethod(replacing_folder)

    def check_readable(self, path: Path) -> None:
        """Refuse a folder that is no zarr store."""
        if not _is_node(path):
            raise InputError(
                f"the folder {path} is no .zarr store: there is neither zarr.json nor .zgroup in it"
            )

    def check_harmless(self, path: Path) -> None:
        """zarr is Python, which raises."""

    def check_replaceable(self, path: Path) -> None:
        """Refuse to replace anything but a zarr store of an AnnData."""
        if not path.is_dir():
            raise InputError(f"the output {path} is a file, and a .zarr store is a folder")
        if not (_is_node(path) and _is_node(path / "obs") and _is_node(path / "var")):
            raise InputError(
                f"the output {path} is a folder without an AnnData, which is not replaced"
            )
        check_folder(path)

    def read(self, path: Path) -> tuple[ad.AnnData, list[str]]:
        """The AnnData; and names of matrices that are there in part."""
        # What is there, not the list of it at the root: that outlives what is lost.
        store = zarr.open_group(path, mode="r", use_consolidated=False)
        _check_parts(store)
        _check_list(path, store)
        gaps = _gaps(store)
        return ad.read_zarr(store), gaps

    def write(self, adata: ad.AnnData, path: Path, layout: Mapping[str, Any]) -> None:
        """Write a store; `layout` holds settings of anndata."""
        store = _Store(path)
        try:
            with ad.settings.override(**layout):
                adata.write_zarr(store, convert_strings_to_categoricals=False)
        except BaseException:
            store.stop()
            raise

    def layout(self, source: Path, compression: Compression) -> Mapping[str, Any]:
        """The version of the format, that of the source; zarr compresses as it does by default."""
        if compression is not Compression.KEEP:
            raise InputError(
                f"compression={compression.value!r} is for .h5ad; zarr compresses in its own way",
                {"compression": Compression.KEEP.value},
            )
        if not source.is_dir():
            return DEFAULT_LAYOUT
        return {"zarr_write_format": 3 if (source / "zarr.json").is_file() else 2}


class _Store(zarr.storage.LocalStore):
    """A store that can be stopped: after an error zarr goes on to write other chunks."""

    stopped = False
    writing = 0

    async def set(self, key: str, value: Buffer) -> None:
        """Write a chunk, unless the store is stopped."""
        self.writing += 1  # first, so that stop() misses none
        try:
            if not self.stopped:
                await super().set(key, value)
        finally:
            self.writing -= 1

    def stop(self) -> None:
        """Wait for what is being written; nothing is written after that."""
        self.stopped = True
        while self.writing:
            time.sleep(0.01)


Format = H5ad | Zarr
FORMATS: Mapping[str, Format] = {".h5ad": H5ad(), ".zarr": Zarr()}


def format_of(path: Path) -> Format:
    """The format that a name asks for by its suffix."""
    if path.suffix not in FORMATS:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no suffix"
        raise InputError(f"the output {path} {ending}, expected {' or '.join(FORMATS)}")
    return FORMATS[path.suffix]


def layout_of(path: Path, source: Path, compression: Compression) -> Mapping[str, Any]:
    """How arrays are laid out in `path`, which is made from `source`."""
    return format_of(path).layout(source, compression)


def check_output(path: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output that cannot be written, touches the input, or would replace what is there.

    Parameters
    ----------
    path
        Where an AnnData is to be written; its suffix names the format.
    overwrite
        Whether an AnnData that is there may be replaced.
    source
        The input.

    Raises
    ------
    InputError
        If any of it does not hold; nothing is made or changed.
    """
    if source is not None:
        _check_apart(path, source)
    written = format_of(path)
    there = exists(path)
    if there:
        written.check_replaceable(path)
    if there and not overwrite:
        message = f"the output {path} exists; overwrite=True replaces it"
        raise InputError(message, {"overwrite": True})
    check_folder(path.parent)


def _check_apart(path: Path, source: Path) -> None:
    """Refuse an output that is the input, or in it, or around it."""
    if exists(source) and exists(path) and path.samefile(source):
        raise InputError(f"the output {path} is the input; choose another name")
    if is_within(path, source):
        raise InputError(f"the output {path} lies in the input {source}; write it elsewhere")
    if is_within(source, path):
        raise InputError(f"the input {source} lies in the output {path}; write it elsewhere")


def read_anndata(path: Path, is_known: bool = False) -> ad.AnnData:
    """An AnnData from an .h5ad file or a .zarr store, whatever its name; InputError if it is none.

    Parameters
    ----------
    path
        The file or the folder.
    is_known
        Whether its checksum is known to be that of a whole one.

    Warns
    -----
    UserWarning
        If a store misses a part of a matrix, which then counts as zeros.
    """
    if not exists(path):
        raise InputError(f"there is no file {path}")
    found = FORMATS[".zarr" if path.is_dir() else ".h5ad"]
    try:
        found.check_readable(path)
        if not is_known:
            found.check_harmless(path)
        with warnings.catch_warnings():  # what they warn of is checked later, or harmless
            warnings.simplefilter("ignore")
            adata, gaps = found.read(path)
        _check_sparse(adata)
    except InputError:
        raise
    except Exception as error:  # h5py, zarr, anndata and scipy raise what the bytes lead them to
        raise InputError(f"{path} is damaged or holds no AnnData: {_reason(error)}") from error
    if gaps:
        warnings.warn(
            f"{path} misses files of {', '.join(gaps)}; they count as zeros, which is right only "
            "if all of them are zero: if the store was copied, compare it with the original",
            stacklevel=2,
        )
    return adata


def write_anndata(
    adata: ad.AnnData,
    path: Path,
    layout: Mapping[str, Any] = DEFAULT_LAYOUT,
    overwrite: bool = True,
) -> None:
    """Write an AnnData, whole or not at all; strings stay strings, of their type.

    Parameters
    ----------
    adata
        What to write.
    path
        Its suffix names the format; what stands there is replaced at the end.
    layout
        As :func:`layout_of` gives it; by default an .h5ad file is not compressed.
    overwrite
        Whether what stands there may be replaced.

    Raises
    ------
    InputError
        If the disk is full, or refuses to be written; if something stands there that may not be
        replaced.
    """
    with disk_errors(path):
        put_anndata(adata, path, layout, overwrite)


def check_storable(adata: ad.AnnData, path: Path, layout: Mapping[str, Any]) -> None:
    """Refuse what the format of `path` cannot hold, by writing one cell and one gene of it."""
    with disk_errors(path), beside(path) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            corner = adata[:1, :1].copy()
        try:
            with disk_errors(path):
                put_anndata(corner, (folder / "trial").with_suffix(path.suffix), layout)
        except InputError:
            raise
        except Exception as error:  # anndata, h5py and zarr refuse in many ways
            message = f"{path} cannot hold all of the input: {_reason(error)}"
            raise InputError(message) from error


def put_anndata(
    adata: ad.AnnData,
    path: Path,
    layout: Mapping[str, Any] = DEFAULT_LAYOUT,
    overwrite: bool = True,
) -> None:
    """As :func:`write_anndata`, for a part of something larger: OSError is left as it is.

    So what is said names the place that the user gave, and not a part of it that is on its way.
    """
    written = format_of(path)
    with written.replacing(path, overwrite) as temporary, warnings.catch_warnings():
        # Of slashes in names, and of what later versions of the formats will do.
        warnings.simplefilter("ignore")
        with ad.settings.override(allow_write_nullable_strings=True):
            written.write(adata, temporary, layout)


def _reason(error: Exception) -> str:
    """What the system says of it, or its first line, with the place that anndata notes."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    said = [str(error) or type(error).__name__, *getattr(error, "__notes__", [])]
    return "; ".join(text.splitlines()[0] for text in said)


def _filter_of(path: Path) -> Mapping[str, Any]:
    """The compression of the largest array of a file; gzip where h5py has no name for it."""
    arrays = []
    with h5py.File(path) as file:
        file.visititems(lambda _, x: arrays.append(x) if isinstance(x, h5py.Dataset) else None)
        largest = max(arrays, key=lambda array: array.nbytes)
        if not largest.id.get_create_plist().get_nfilters():
            return DEFAULT_LAYOUT
        if largest.compression not in ("gzip", "lzf"):
            return {"compression": "gzip"}
        return {"compression": largest.compression, "compression_opts": largest.compression_opts}


# ---- damage -------------------------------------------------------------------------------------


def _check_parts(root: h5py.Group | zarr.Group) -> None:
    """Refuse the files of other tools."""
    if not {"obs", "var"} <= set(root):
        there = ", ".join(sorted(root)) or "nothing"
        raise ValueError(f"expected obs and var, there is {there}; write an AnnData from it")


def _check_array(name: str, item: h5py.Group | h5py.Dataset) -> None:
    """Refuse arrays that claim far more than is stored of them, or need a plugin to be read."""
    if not isinstance(item, h5py.Dataset):
        return
    properties = item.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    stored = item.id.get_storage_size()
    if not filters and 0 < stored < item.nbytes / LARGEST_EXPANSION:  # it would fill the memory
        raise ValueError(f"{name} claims {item.nbytes} bytes, {stored} are there")
    for number in filters:
        if not h5py.h5z.filter_avail(number):
            raise InputError(
                f"{name} in {item.file.filename} is compressed by a plugin of HDF5 that is not "
                f"here (filter {number}); write the file again with compression='gzip'"
            )


def _check_sparse(adata: ad.AnnData) -> None:
    """Refuse sparse matrices with indices out of range, on which scipy would crash."""
    mappings = (adata.layers, adata.obsm, adata.varm, adata.obsp, adata.varp)
    matrices = [adata.X, *(matrix for mapping in mappings for matrix in mapping.values())]
    matrices += [] if adata.raw is None else [adata.raw.X]
    for matrix in filter(issparse, matrices):
        matrix.check_format(full_check=True)


def _is_node(path: Path) -> bool:
    return any((path / name).is_file() for name in NODES)


def _check_list(path: Path, store: zarr.Group) -> None:
    """Refuse a store without something that the list at its root names."""
    listed = zarr.open_group(path, mode="r")  # with the list, if there is one
    missing = sorted({n for n, _ in listed.members(None)} - {n for n, _ in store.members(None)})
    if missing:
        raise ValueError(f"the store lists {missing[0]}, which is not there")


def _gaps(store: zarr.Group) -> list[str]:
    """Matrices that miss a chunk, which zarr reads as zeros; ValueError where that cannot be right.

    A store may leave out chunks of zeros, and does; but not all arrays of a sparse matrix can have
    them.
    """
    members = dict(store.members(None))
    arrays = {name: item for name, item in members.items() if isinstance(item, zarr.Array)}
    gaps = [name for name, array in arrays.items() if array.nchunks_initialized < array.nchunks]
    for name in gaps:
        parent, _, part = name.rpartition("/")
        matrix = members.get(parent)
        if not isinstance(matrix, zarr.Group) or matrix.attrs.get("encoding-type") not in SPARSE:
            continue
        if part == "data" or not _is_sound(matrix):
            raise ValueError(f"a part of {name} is missing")
    return [name for name in gaps if MATRICES.fullmatch(name)]


def _is_sound(matrix: zarr.Group) -> bool:
    """Whether a sparse matrix has one place for each value."""
    arrays = dict(matrix.arrays())
    indices, indptr = np.asarray(arrays["indices"][:]), np.asarray(arrays["indptr"][:])
    if indptr[-1] != len(indices):
        return False
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return np.unique([rows, indices], axis=1).shape[1] == len(indices)
