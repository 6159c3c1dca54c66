"""Checkpoints of a training run: written whole, read without executing a pickle, resumed exactly.

A checkpoint is Lightning's own (weights, optimiser, schedules, loops, callbacks) and, under
``KEY``, what else an epoch depends on: random state, history, phase, and who may resume it.
"""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from scipy.sparse import csr_matrix
from torch import Tensor

from pyro_scanvi.data.minibatches import CELLS_AT_ONCE, CellData, total_counts
from pyro_scanvi.storage.files import (
    Unfailing,
    check_makeable,
    disk_errors,
    exists,
    reading_errors,
    replacing,
    user_path,
)
from pyro_scanvi.validation import InputError

KEY = "pyro_scanvi"
LAST = "last.ckpt"
PREFIX = "vae."  # of the model's tensors in a checkpoint
MARK = b"pyro_scanvi sha256 "  # of the whole archive, in its comment
LATEST = "2"  # rule by which a fingerprint of the data is taken
MENDS = {  # what is no argument of train
    "threads": " (torch.set_num_threads sets it)",
    "processes": " (as many as the launcher starts; one is None)",
}


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, so that a kill leaves the last."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        """Write one; its folder is made if it is not there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path), replacing(path) as temporary:
            with Unfailing(temporary) as file:
                torch.save(checkpoint, file)  # type: ignore[arg-type]  # it writes to any raw file
            _add_digest(temporary)


class LastCheckpoint(Checkpoint):
    """Keeps the checkpoint of the last epoch that ended.

    Each one replaces that which this run wrote, found or went on from, and none that another
    process has written meanwhile.
    """

    def __init__(self, folder: Path):
        self.path = folder / LAST
        self.standing = _state_of(self.path)

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        """Lightning calls this after all other callbacks and the module."""
        if trainer.is_last_batch:  # not where Ctrl-C or a limit of steps cut the epoch short
            if trainer.is_global_zero:  # which writes; others may see the disk later
                self._check_ours()
            trainer.save_checkpoint(self.path)
            self.standing = _state_of(self.path)

    def _check_ours(self) -> None:
        now = _state_of(self.path)
        if now is not None and now != self.standing:
            raise InputError(
                f"another process has written {self.path} while this one trained, which stops "
                "here; let one run alone write into a checkpoint_dir, and go on from it with "
                "ckpt_path='last'"
            )


def _state_of(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from another one at its place; None where there is none."""
    if not exists(path):
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def find(ckpt_path: str | Path | None, folder: str | Path | None) -> Path | None:
    """The checkpoint to go on from, None for a fresh start; the folder for new ones can be made.

    Parameters
    ----------
    ckpt_path
        A file; "last" for the one in `folder`, if there is one; None for a fresh start.
    folder
        Where this run keeps its own; None if nowhere.

    Raises
    ------
    InputError
        If a fresh start would replace a checkpoint, "last" has no folder to look in, or the folder
        cannot be made. It is made with the first checkpoint.
    """
    if folder is not None:
        check_makeable(user_path(folder))
    last = None if folder is None else user_path(folder) / LAST
    if ckpt_path == "last":
        if last is None:
            raise InputError(
                "ckpt_path='last' needs checkpoint_dir, where the last one is looked for"
            )
        return last if last.is_file() else None
    if ckpt_path is None and last is not None and last.is_file():
        raise InputError(
            f"{last} is there, and a fresh start would replace it; go on from it with "
            "ckpt_path='last', or choose another checkpoint_dir"
        )
    return None if ckpt_path is None else user_path(ckpt_path)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of the run that wrote it.

    Attributes
    ----------
    path
        Where it lies.
    phase
        Name of the phase that it was written in.
    first_epoch
        Epochs before that phase.
    n_epochs
        Epochs of that phase that were done.
    identity
        What a run that resumes it must share.
    shapes
        Of the model's tensors.
    """

    path: Path
    phase: str
    first_epoch: int
    n_epochs: int
    identity: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


def read(path: Path) -> Saved:
    """A checkpoint of :class:`LastCheckpoint`; InputError if it is damaged or something else."""
    if not exists(path):
        raise InputError(f"there is no checkpoint {path}; expected the {LAST} of a checkpoint_dir")
    with reading_errors(path):
        return _read(path)


def _read(path: Path) -> Saved:
    try:
        _check_whole(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return _told_of(path, checkpoint)
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    except (pickle.UnpicklingError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no checkpoint of pyro_scanvi: {error}") from error


def _told_of(path: Path, checkpoint: Mapping[str, Any]) -> Saved:
    ours, tensors = checkpoint[KEY], checkpoint["state_dict"]
    return Saved(
        path=path,
        phase=ours["phase"],
        first_epoch=ours["first_epoch"],
        n_epochs=checkpoint["epoch"] + 1,
        identity=ours["identity"] | {"data": _versioned(ours["identity"]["data"])},
        shapes={
            name.removeprefix(PREFIX): tuple(tensor.shape)
            for name, tensor in tensors.items()
            if name.startswith(PREFIX)
        },
    )


def check_resumable(
    saved: Saved, identity: Mapping[str, Any], data: CellData, state: Mapping[str, Tensor]
) -> None:
    """Refuse a checkpoint of other settings, other data or another model; says which differ."""
    before, now = saved.identity, identity
    version = before["data"].partition(":")[0]
    if version not in DIGESTS:
        raise InputError(
            f"{saved.path} was written by a later version of pyro_scanvi; go on from it with that"
        )
    if version != LATEST:
        now = {**identity, "data": digest(data, version)}
    differ = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}{MENDS.get(name, '')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    differ += [
        f"weight {name} was {saved.shapes.get(name)}, is {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if saved.shapes.get(name) != tuple(tensor.shape)
    ]
    if differ:
        raise InputError(
            f"the checkpoint is of another training run: {'; '.join(differ[:5])}; make the model "
            "and call train with the arguments that it was started with"
        )


def check_epochs(saved: Saved, max_epochs: int) -> None:
    """Refuse to go on from a checkpoint that lies behind the end of its phase."""
    if saved.n_epochs > max_epochs:
        raise InputError(
            f"max_epochs={max_epochs}, but the checkpoint was written after {saved.n_epochs} "
            "epochs; ask for as many or more"
        )


def digest(data: CellData, version: str | None = None) -> str:
    """Fingerprint of the data, after the version of the rule that it was taken by: the latest."""
    version = version or LATEST
    return f"{version}:{DIGESTS[version](data)}"


def _totals_and_columns(data: CellData) -> "hashlib._Hash":
    """Of the counts the totals of cells and genes, and all columns whole."""
    parts = dict(zip(("cells", "genes"), total_counts(data.counts), strict=True))
    elsewhere = ("counts", "extra", "position")  # a whole data set has no other position
    parts |= {f.name: getattr(data, f.name) for f in fields(data) if f.name not in elsewhere}
    hashed = hashlib.sha256()
    for name, part in parts.items():
        if part is None:
            continue
        hashed.update(name.encode())
        hashed.update(np.ascontiguousarray(part, dtype=np.float64).tobytes())
    return hashed


def _totals_and_the_rest(data: CellData) -> str:
    return _totals_and_columns(data).hexdigest()[:16]


def _with_extra(data: CellData) -> str:
    """The same, and all extra data whole, whether they are sparse or dense."""
    hashed = _totals_and_columns(data)
    for name, matrix in sorted(data.extra.items()):
        hashed.update(f"extra {name} {matrix.shape}".encode())
        for start in range(0, len(data), CELLS_AT_ONCE):
            rows = csr_matrix(matrix[start : start + CELLS_AT_ONCE], dtype=np.float64)
            rows.eliminate_zeros()
            for part in (rows.indptr, rows.indices, rows.data):
                hashed.update(np.ascontiguousarray(part, dtype=np.float64).tobytes())
    return hashed.hexdigest()[:16]


# A checkpoint is compared by the rule that it was written by: leave the rules that are here as
# they are, add another and make it the latest.
DIGESTS = {"1": _totals_and_the_rest, "2": _with_extra}


def _versioned(fingerprint: str) -> str:
    """As it is written now: the first ones, by the first rule, did not say their version."""
    return fingerprint if ":" in fingerprint else f"1:{fingerprint}"


def random_state() -> dict[str, Any]:
    """State of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on with what :func:`random_state` found."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _add_digest(path: Path) -> None:
    """Write the SHA-256 of an archive into its comment, with which it ends; it had none."""
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        comment = MARK + digest.encode()
        file.seek(-2, os.SEEK_END)
        file.write(len(comment).to_bytes(2, "little") + comment)


def _check_digest(path: Path) -> None:
    """ValueError if the archive is not the one of which its comment tells; old ones have none."""
    content = path.read_bytes()
    archive, mark, digest = content.rpartition(MARK)
    if mark and hashlib.sha256(archive[:-2] + b"\0\0").hexdigest() != digest.decode("latin1"):
        raise ValueError("its checksum is wrong")


def _check_whole(path: Path) -> None:
    """torch looks neither at our checksum nor at those of the archive that it writes."""
    _check_digest(path)
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"the checksum of {broken} is wrong")
