"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
