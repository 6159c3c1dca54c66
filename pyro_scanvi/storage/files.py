"""Paths as users give them, and what is written there: whole or not at all."""

import ctypes
import errno
import io
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_scanvi.validation import InputError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from typing_extensions import Buffer  # of collections.abc, from Python 3.12 on

PART = ".part"  # how the names of folders end that hold what is not whole yet
JUST_MADE = 10  # seconds
ROOM = "; make room, or write to another disk"
ALLOWED = "; write into a folder that you may change"
CURES = {errno.ENOSPC: ROOM, errno.EDQUOT: ROOM, errno.EACCES: ALLOWED, errno.EROFS: ALLOWED}
HERE, NO_REPLACE, EXCHANGE = -100, 1, 2  # of Linux: AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gave it; ``~`` is the home folder, which a shell does not always fill in."""
    return Path(os.path.expanduser(path))


# ---- whole or not at all ------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A path for a new file, which is moved onto `path` if the block succeeds, removed if not.

    Raises
    ------
    InputError
        Unless `overwrite`, if something stands at `path` at the end: another process wrote it.
    """
    with beside(path) as folder:
        fresh = (folder / "fresh").with_suffix(path.suffix)
        yield fresh
        if overwrite:
            fresh.replace(path)
        else:
            _move_to_nothing(fresh, path)


@contextmanager
def replacing_folder(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """The same for a new folder, which is there; one that stands at `path` is removed at the end.

    Where the system can exchange two folders in one step, as Linux can on most file systems,
    there is a whole one at `path` at any time.
    """
    with beside(path) as folder:
        fresh, old = folder / "fresh", folder / "old"
        fresh.mkdir()
        yield fresh
        if not (overwrite and os.path.lexists(path)):
            _move_to_nothing(fresh, path)
        elif not _renamed(fresh, path, EXCHANGE):
            _move_in_two_steps(fresh, path, old)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what is not whole yet; it is removed at the end.

    A kill leaves it. The system then ends its lock, by which the next to write to `path` knows
    that nobody writes into it any more, and removes it.
    """
    with suppress(OSError):  # the folder may not be listed
        _sweep(path)
    made = tempfile.TemporaryDirectory(dir=path.parent, prefix=_mark(path), suffix=PART)
    with made as folder, _lock(Path(folder)):
        yield Path(folder)


def _mark(path: Path) -> str:
    """How the names of folders beside `path` begin; no name may be longer than 255 bytes."""
    return f".{path.name[:40]}."


def _sweep(path: Path) -> None:
    """Remove the folders that killed processes left beside `path`."""
    beside_it = (f for f in path.parent.iterdir() if f.name.startswith(_mark(path)))
    for folder in (f for f in beside_it if f.name.endswith(PART)):
        with suppress(OSError), _lock(folder) as is_ours:
            # One that was made just now is not locked yet.
            if is_ours and time.time() - folder.stat().st_mtime > JUST_MADE:
                shutil.rmtree(folder)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this process has got the lock of a folder, which no other process gets then."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except OSError:  # another process has it, or the file system knows no locks
        is_ours = False
    try:
        yield is_ours
    finally:
        os.close(descriptor)


def _move_to_nothing(fresh: Path, path: Path) -> None:
    """Move a file or a folder to where there is nothing; InputError where there is something."""
    try:
        if not _renamed(fresh, path, NO_REPLACE):
            if os.path.lexists(path):
                raise FileExistsError
            fresh.replace(path)
    except FileExistsError:
        raise InputError(
            f"{path} was not there before and is now: another process has written it; it stays as "
            "it is, overwrite=True would replace it",
            {"overwrite": True},
        ) from None


def _move_in_two_steps(fresh: Path, path: Path, old: Path) -> None:
    """Move `path` away and `fresh` there; `path` comes back where that fails."""
    path.replace(old)
    try:
        fresh.replace(path)
    except OSError:
        old.replace(path)
        raise


def _renamed(path: Path, to: Path, how: int) -> bool:
    """Rename in one step, as Linux can and Python cannot; False where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(HERE, os.fsencode(path), HERE, os.fsencode(to), how) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(to))


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
        cure = CURES.get(error.errno or 0, "")
        raise InputError(f"{path} cannot be written: {_reason(error)}{cure}") from error


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """InputError for what the system refuses while `path` is read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


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
