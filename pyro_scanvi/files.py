"""Paths as users give them, and what is written there: whole or not at all."""

import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyro_scanvi.checks import InputError


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gave it; ``~`` is the home folder, which a shell does not always fill in."""
    return Path(os.path.expanduser(path))


# ---- whole or not at all ------------------------------------------------------------------------


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


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; one that stands at `path` is moved away at the end, then removed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as beside:
        fresh, old = Path(beside) / "fresh", Path(beside) / "old"
        fresh.mkdir()
        yield fresh
        if os.path.lexists(path):
            path.replace(old)
        try:
            fresh.replace(path)
        except OSError:
            if os.path.lexists(old):
                old.replace(path)
            raise


@contextmanager
def making_parents(path: Path) -> Iterator[None]:
    """Make the folders above `path`; those that were made are removed if the block fails."""
    new = [folder for folder in path.parents if not exists(folder)]
    make_folder(path.parent)
    try:
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


# ---- checks at the door -------------------------------------------------------------------------


def exists(path: Path) -> bool:
    """Whether there is something at `path`; InputError where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a name too long, a folder that may not be entered
        raise InputError(f"{path} cannot be used: {error.strerror}") from None
    return True


def is_within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies below it, by any links; neither need be there."""
    path, folder = path.resolve(), folder.resolve()
    return any(p == folder or _is_same(p, folder) for p in (path, *path.parents))


def _is_same(one: Path, other: Path) -> bool:
    return exists(one) and exists(other) and one.samefile(other)


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there, and check that it takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {error.strerror}") from None
    check_folder(folder)


def check_makeable(folder: Path) -> None:
    """Refuse a folder that :func:`make_folder` could not make; nothing is made yet."""
    absolute = folder.absolute()
    there = next(path for path in (absolute, *absolute.parents) if exists(path))
    if not there.is_dir():
        raise InputError(f"the folder {folder} cannot be made: {there} is a file")
    check_folder(there)


def check_folder(folder: Path) -> None:
    """Refuse a folder that does not exist or takes no files."""
    if not folder.is_dir():
        make = f"make it first: mkdir -p {shlex.quote(str(folder))}"
        mend = "it is a file" if folder.exists() else make
        raise InputError(f"there is no folder {folder}; {mend}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"nothing can be written into {folder}: {error.strerror}") from None
