"""Names and settings that an .h5ad file and a .zarr store can hold, whoever writes them."""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

RESERVED = ("_index", "zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
LONGEST = 200  # bytes; a .zarr store makes a folder of a name, and few systems take more than 255
INSTEAD = {ord("/"): "|", 0: "|"}  # of what no key may hold


def storable_names(names: Iterable, taken: Iterable[str] = ()) -> list[str]:
    """Names of columns as files can hold them: as they are, "|" for a slash, numbered if need be.

    A file takes a name for a path, and a store makes a folder of it: "T/NK" would be a part of
    "T", ".." the folder above, and some systems do not tell "t" from "T". A name that can stay as
    it is does, whatever the others are.

    Parameters
    ----------
    names
        In any type; they are read as strings.
    taken
        Names that are none for a column, such as that of the index.

    Examples
    --------
    >>> storable_names(["B", "CD4/CD8 T", "b"])
    ['B', 'CD4|CD8 T', '2: b']
    """
    names = [str(name) for name in names]
    mended = [_mended(name) for name in names]
    used = {_on_disk(name) for name in (*RESERVED, *taken)}
    stored = list(mended)
    for i in sorted(range(len(names)), key=lambda i: mended[i] != names[i]):
        while not _is_key(stored[i]) or _on_disk(stored[i]) in used:
            stored[i] = f"{i}: {stored[i]}"
        used.add(_on_disk(stored[i]))
    return stored


def storable(settings: Any) -> Any:
    """Settings as files can hold them: dicts, arrays, strings and numbers; all else as text."""
    if isinstance(settings, Mapping):
        keys = storable_names(settings)
        return dict(zip(keys, map(storable, settings.values()), strict=True))
    if isinstance(settings, np.generic):
        return settings.item()
    return (
        settings if isinstance(settings, str | bool | int | float | np.ndarray) else str(settings)
    )


def _mended(name: str) -> str:
    """Without what no key may hold, and not too long."""
    short = name.encode("utf-8", errors="replace")[:LONGEST].decode("utf-8", errors="ignore")
    return short.translate(INSTEAD)


def _is_key(name: str) -> bool:
    """Whether a file takes it for a name: not nothing, no step of a path, none of zarr's own."""
    return bool(name.strip() and name.strip(".")) and not name.startswith("__")


def _on_disk(name: str) -> str:
    """The name as a file system reads it that tells neither case nor ways of writing an accent."""
    return unicodedata.normalize("NFC", name.casefold())
