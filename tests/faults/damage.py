"""Damaged files: refused, or as the whole ones; never a crash, never silently another content."""

import hashlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix, issparse
from torch import Tensor

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.storage.stores import read_anndata, write_anndata
from pyro_scanvi.training import checkpoints
from tests.examples import simulated, small_model

REFUSED, SAME, OTHER = "refused", "as the whole one", "opens, and is another"
Bytes = np.ndarray
MADE_BY_US = ("saved models", "checkpoints")  # whose checksums are known

# ---- damage -------------------------------------------------------------------------------------


def span(content: Bytes, rng: np.random.Generator, longest: int = 4096) -> slice:
    """Some bytes that stand together, one or more, each length as likely as its double."""
    length = int(np.exp(rng.uniform(0, np.log(min(longest, len(content)) + 1))))
    start = int(rng.integers(len(content) - length + 1))
    return slice(start, start + length)


def bits_flipped(content: Bytes, rng: np.random.Generator) -> Bytes:
    """One bit, or up to eight."""
    for place in rng.integers(len(content), size=rng.integers(1, 9)):
        content[place] ^= np.uint8(1 << rng.integers(8))
    return content


def overwritten(content: Bytes, rng: np.random.Generator) -> Bytes:
    """By random bytes."""
    part = span(content, rng)
    content[part] = rng.integers(256, size=part.stop - part.start)
    return content


def zeroed(content: Bytes, rng: np.random.Generator) -> Bytes:
    """As a block of a disk that was never written."""
    content[span(content, rng)] = 0
    return content


def truncated(content: Bytes, rng: np.random.Generator) -> Bytes:
    """As by a copy that was cut short."""
    return content[: rng.integers(len(content))]


def spliced(content: Bytes, rng: np.random.Generator) -> Bytes:
    """A part of it over another part."""
    part = span(content, rng)
    start = int(rng.integers(len(content) - (part.stop - part.start) + 1))
    content[part] = content[start : start + part.stop - part.start].copy()
    return content


def shortened(content: Bytes, rng: np.random.Generator) -> Bytes:
    """A part is left out, so that all behind it is elsewhere."""
    return np.delete(content, span(content, rng))


def lengthened(content: Bytes, rng: np.random.Generator) -> Bytes:
    """A part comes twice."""
    part = span(content, rng)
    return np.insert(content, part.start, content[part])


DAMAGES = (bits_flipped, overwritten, zeroed, truncated, spliced, shortened, lengthened)


def damage(path: Path, rng: np.random.Generator) -> None:
    """Change a file for the worse, in one of these ways."""
    before = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    after = before
    while np.array_equal(after, before):
        kind = DAMAGES[rng.integers(len(DAMAGES))]
        after = kind(before.copy(), rng) if len(before) else np.ones(1, dtype=np.uint8)
    path.write_bytes(after.tobytes())


# ---- what is damaged, and read ------------------------------------------------------------------


def cells() -> ad.AnnData:
    """Counts in X, raw and a layer; a column of each type."""
    adata = simulated(90, 30)
    adata.X = csr_matrix(adata.X)
    adata.layers["dense"] = adata.X.toarray()
    adata.raw = adata
    adata.obs["batch"] = pd.Categorical(np.array(["one", "two"])[np.arange(90) % 2])
    adata.obs["age"] = np.arange(90.0)
    return adata


def trained() -> SCANVI:
    """A model of them."""
    return small_model(cells()).train(1, progress_bar=False)


def make_model(folder: Path) -> Path:
    """A saved model, with its cells."""
    trained().save(folder / "model", save_anndata=True)
    return folder / "model"


def make_checkpoint(folder: Path) -> Path:
    """The last one of a run."""
    small_model(cells()).train(1, progress_bar=False, checkpoint_dir=folder)
    return folder / checkpoints.LAST


def make_h5ad(folder: Path) -> Path:
    """Packed, so that HDF5's filters are met too."""
    write_anndata(cells(), folder / "cells.h5ad", {"compression": "gzip"})
    return folder / "cells.h5ad"


def make_zarr(folder: Path) -> Path:
    """Of the latest version."""
    write_anndata(cells(), folder / "cells.zarr", {"zarr_write_format": 3})
    return folder / "cells.zarr"


def read_model(path: Path) -> list:
    """All that comes back of a model."""
    model = SCANVI.load(path)
    answers = [model.vae_arguments, model.training_settings, model.history.to_dict(), model.seed]
    consensus = model.consensus()
    return [model.module.state_dict(), *answers, vars(consensus), content(model.adata)]


def read_checkpoint(path: Path) -> list:
    """What is told of it, and what Lightning then reads."""
    told = vars(checkpoints.read(path)) | {"path": None}
    return [told, torch.load(path, weights_only=True)]


def read_cells(path: Path) -> list:
    """An AnnData of a user."""
    return content(read_anndata(path))


def content(adata: ad.AnnData) -> list:
    """Counts, names and columns of an AnnData."""
    matrices = [adata.X, adata.raw.X, adata.layers["dense"]]
    frames = [adata.obs, adata.var, adata.raw.var]
    return [*matrices, *(frame.to_csv() for frame in frames), sorted(adata.uns)]


READERS: Mapping[str, tuple[Callable[[Path], Path], Callable[[Path], list]]] = {
    "saved models": (make_model, read_model),
    "checkpoints": (make_checkpoint, read_checkpoint),
    ".h5ad files of others": (make_h5ad, read_cells),
    ".zarr stores of others": (make_zarr, read_cells),
}


def fingerprint(value: Any) -> str:
    """Of nested dicts and lists of arrays and plain values."""
    hashed = hashlib.sha256()
    _add(hashed, value)
    return hashed.hexdigest()


def _add(hashed, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            hashed.update(repr(key).encode())
            _add(hashed, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _add(hashed, item)
    elif issparse(value):
        _add(hashed, value.toarray())
    elif isinstance(value, Tensor | np.ndarray):
        hashed.update(f"{value.dtype} {value.shape}".encode() + np.asarray(value).tobytes())
    else:
        hashed.update(repr(value).encode())


class Trials:
    """Damage to one kind of file; call it with a number, the seed of the damage.

    Parameters
    ----------
    kind
        A key of ``READERS``.
    folder
        An empty one to work in.
    """

    def __init__(self, kind: str, folder: Path):
        make, self.read = READERS[kind]
        self.original = make(folder)
        self.whole = fingerprint(self.read(self.original))
        self.path = folder / "damaged" / self.original.name
        self.path.parent.mkdir()

    def __call__(self, number: int) -> str:
        """What came of it."""
        rng = np.random.default_rng(number)
        self._copy()
        files = sorted(f for f in (self.path, *self.path.rglob("*")) if f.is_file())
        file = files[rng.integers(len(files))]
        if len(files) > 1 and rng.random() < 1 / 8:
            file.unlink()
        else:
            damage(file, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._outcome()

    def _outcome(self) -> str:
        try:
            found = self.read(self.path)
        except InputError as error:
            return REFUSED if str(self.path) in str(error) else f"unnamed: {error}"
        except Exception as error:
            return f"unexpected: {type(error).__name__}: {error}".splitlines()[0]
        return SAME if fingerprint(found) == self.whole else OTHER

    def _copy(self) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        copy = shutil.copytree if self.original.is_dir() else shutil.copyfile
        copy(self.original, self.path)
