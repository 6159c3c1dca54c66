"""Paths as users give them, and what is written there: whole or not at all."""

import io
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_scanvi.validation import InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer  # of collections.abc, from Python 3.12 on


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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """InputError for what the system refuses while `path` is written."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"{path} cannot be written: {reason}") from error


class Unfailing(io.RawIOBase):
    """A new file to write that takes all, on a full disk too, and tells of it when it is closed.

    HDF5 ends the process where the disk is full as it closes a file, and torch speaks of its own
    insides. So after the first error everything goes on in memory.
    """

    def __init__(self, path: Path):
        self._disk = path.open("w+b", buffering=0)
        self._file: io.FileIO | io.BytesIO = self._disk
        self._error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        return self._file.seek(offset, whence)

    def readinto(self, buffer: "Buffer") -> int | None:
        """As of any file."""
        return self._file.readinto(buffer)

    def write(self, data: "Buffer") -> int:
        """All of it, on the disk or in memory."""
        start, left = self._file.tell(), memoryview(data).cast("B")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._go_on_in_memory(error)
            self._file.seek(start)
            self._file.write(data)
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        """Cut or lengthen the file."""
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._go_on_in_memory(error)
            return self._file.truncate(size)

    def close(self) -> None:
        """Close the file; OSError if not all of it came to the disk."""
        if not self.closed:
            super().close()
            self._disk.close()
            if self._error is not None:
                raise self._error

    def _go_on_in_memory(self, error: OSError) -> None:
        self._error = error
        self._disk.seek(0)
        self._file = io.BytesIO(self._disk.read())


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


def check_new(path: Path, what: str, overwrite: bool, *others: Path) -> None:
    """Refuse a file that cannot be written, is there and stays, or lies in one of the `others`."""
    check_apart(path, what, *others)
    there = exists(path)
    if there and path.is_dir():
        raise InputError(f"the {what} {path} is a folder; choose another name")
    if there and not overwrite:
        message = f"the {what} {path} exists; overwrite=True replaces it"
        raise InputError(message, {"overwrite": True})
    check_folder(path.parent)


def check_apart(path: Path, what: str, *others: Path) -> None:
    """Refuse a path that is one of the `others`, or lies below it."""
    for other in others:
        if is_within(path, other):
            raise InputError(f"the {what} {path} lies in {other}; write it elsewhere")


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
