"""A trained model as a folder: weights as safetensors, all else as JSON. Nothing is pickled.

``model.json`` holds the SHA-256 of each other file and of itself, so that a damaged folder is an
error and never a model that is silently wrong.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from pyro_scanvi.storage.files import (
    check_folder,
    check_makeable,
    disk_errors,
    exists,
    making_parents,
    reading_errors,
    replacing_folder,
)
from pyro_scanvi.storage.stores import put_anndata, read_anndata
from pyro_scanvi.validation import InputError

FORMAT = 2  # that of models with parts of one's own; all others are written as before
WITHOUT_PARTS = 1
WEIGHTS, RECORD, CELLS = "weights.safetensors", "model.json", "cells.h5ad"
CARD = "README.md"
RULES = "label_rules.safetensors"  # beside the weights, so that older versions open the model


def check_target(directory: Path, overwrite: bool) -> None:
    """Refuse a folder that exists, unless it is a saved model and may be replaced."""
    check_makeable(directory.parent)
    if not exists(directory):
        return
    if not overwrite:
        raise InputError(f"{directory} exists; save elsewhere or with overwrite=True")
    if not (directory / RECORD).is_file():
        raise InputError(f"{directory} exists and holds no saved model; it is not overwritten")
    check_folder(directory)


def write_model(
    directory: Path,
    state: Mapping[str, Tensor],
    record: Mapping[str, Any],
    adata: AnnData | None = None,
    rules: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = True,
    card: str = "",
) -> None:
    """Write a folder whole or not at all, and those above it; an old one is replaced at the end.

    A tensor of several names, such as that of a network that two parts hold, is written once.
    `rules` are further arrays, of the rules by which cells are labelled; `card` is a text for
    people, which nothing reads.
    """
    same = _same_tensors(state)
    weights = save_safetensors({k: _own(v) for k, v in state.items() if k not in same})
    form = FORMAT if record.get("parts") else WITHOUT_PARTS
    record = {"format": form, "weights_sha256": _digest(weights), **record}
    if same:
        record["same_tensors"] = same
    arrays = save_arrays({k: np.ascontiguousarray(v) for k, v in (rules or {}).items()})
    if rules:
        record["rules_sha256"] = _digest(arrays)
    with (
        disk_errors(directory),
        making_parents(directory),
        replacing_folder(directory, overwrite) as fresh,
    ):
        (fresh / WEIGHTS).write_bytes(weights)
        if rules:
            (fresh / RULES).write_bytes(arrays)
        if card:
            (fresh / CARD).write_text(card, encoding="utf-8")
        if adata is not None:
            put_anndata(adata, fresh / CELLS)
            record["cells_sha256"] = _digest_of_file(fresh / CELLS)
        record["record_sha256"] = _digest(_canonical(record))
        (fresh / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def read_model(
    directory: Path, with_anndata: bool
) -> tuple[dict[str, Tensor], dict[str, Any], AnnData | None, dict[str, np.ndarray]]:
    """Weights, record, AnnData where asked for, and label rules of what :func:`write_model` wrote.

    Raises
    ------
    InputError
        If a file is missing or damaged, or was written by a later version.
    """
    with reading_errors(directory):
        _check_files(directory, with_anndata)
        record = _read_record(directory / RECORD)
        state = load_safetensors(_undamaged(directory / WEIGHTS, record["weights_sha256"]))
        state |= {name: state[first] for name, first in record.get("same_tensors", {}).items()}
        rules: dict[str, np.ndarray] = {}
        if "rules_sha256" in record:
            rules = load_arrays(_undamaged(directory / RULES, record["rules_sha256"]))
        cells = _cells(directory / CELLS, record) if with_anndata else None
    return state, record, cells, rules


def _check_files(directory: Path, with_anndata: bool) -> None:
    """Refuse a folder that lacks a file, which it names."""
    for name in (RECORD, WEIGHTS):
        if not (directory / name).is_file():
            theirs = any(directory.glob("*model.pt"))
            hint = "; SCANVI.load_scvi_tools(folder, adata) opens those of scvi-tools"
            raise InputError(
                f"{directory} holds no saved model: there is no {name}{hint if theirs else ''}"
            )
    if with_anndata and not (directory / CELLS).is_file():
        raise InputError(f"{directory} was saved without its cells; give them: load(dir, adata)")


def _cells(path: Path, record: Mapping[str, Any]) -> AnnData:
    """Those saved with a model; the first ones that were have no checksum."""
    is_known = "cells_sha256" in record
    if is_known:
        _check_digest(path, _digest_of_file(path), record["cells_sha256"])
    return read_anndata(path, is_known)


def _undamaged(path: Path, digest: str) -> bytes:
    """The bytes of a file; InputError if they are not those that were written."""
    found = path.read_bytes() if path.is_file() else b""
    _check_digest(path, _digest(found), digest)
    return found


def _check_digest(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise InputError(f"{path} is damaged: its checksum is not that of the record")


def plain(value: Any, name: str) -> Any:
    """A value as JSON holds it; InputError for what JSON cannot hold, such as a callable."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, name) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise InputError(f"{name} is a {type(value).__name__}, which a file does not hold")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        digest = record.pop("record_sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if _digest(_canonical(record)) != digest:
        raise InputError(f"{path} is damaged: its checksum is not its own")
    if record["format"] > FORMAT:
        raise InputError(
            f"{path} has format {record['format']}, written by pyro_scanvi {record['version']}; "
            f"this version reads up to {FORMAT}: update pyro_scanvi"
        )
    return record


def _same_tensors(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each further name of a tensor its first one."""
    first: dict[Any, str] = {}
    return {
        name: first[_place(tensor)]
        for name, tensor in state.items()
        if first.setdefault(_place(tensor), name) != name and tensor.numel()
    }


def _place(tensor: Tensor) -> tuple:
    """Where a tensor lies, and how it is read."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _own(tensor: Tensor) -> Tensor:
    """The tensor with memory of its own, where it is a part of a larger one."""
    tensor = tensor.detach().cpu().contiguous()
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_part else tensor


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of_file(path: Path) -> str:
    """The same of a file that may be too large for the memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
