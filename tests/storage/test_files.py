"""Paths as users give them; files and folders that are there whole or not at all."""

import errno
import os
import stat
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from pyro_scanvi import InputError
from pyro_scanvi.storage import files
from pyro_scanvi.storage.files import (
    Unfailing,
    check_folder,
    check_makeable,
    check_new,
    disk_errors,
    exists,
    is_within,
    make_folder,
    making_parents,
    replacing,
    replacing_folder,
    user_path,
)
from tests.examples import file_limit


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- whole or not at all ------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "old"])
def test_replacing_puts_the_file_in_place(tmp_path, old):
    path = tmp_path / "out.h5ad"
    if old is not None:
        path.write_text(old)
    with replacing(path) as temporary:
        assert (temporary.parent.parent, temporary.suffix) == (tmp_path, ".h5ad")
        temporary.write_text("new")
        assert old is None or path.read_text() == old
    assert path.read_text() == "new"
    assert names(tmp_path) == ["out.h5ad"]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replacing_leaves_all_as_it_was_if_the_block_raises(tmp_path, old, error):
    path = tmp_path / "out.h5ad"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ([] if old is None else ["out.h5ad"])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "out.h5ad") as temporary:
            temporary.write_text("new")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.h5ad").stat().st_mode) == mode


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert (target.read_text(), link.read_text()) == ("old", "new")


@pytest.fixture(params=[None, "old"])
def target(request, tmp_path):
    """The path of a folder that is not there, or holds a file "old"."""
    path = tmp_path / "out.zarr"
    if request.param:
        path.mkdir()
        (path / request.param).touch()
    return path


def test_replacing_a_folder(target):
    before = names(target) if target.exists() else None
    with replacing_folder(target) as temporary:
        (temporary / "new").touch()
        assert before == (names(target) if target.exists() else None)
    assert names(target) == ["new"]
    assert names(target.parent) == ["out.zarr"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o700 == 0o700


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replacing_a_folder_leaves_all_as_it_was_if_the_block_raises(target, error):
    before = [names(f) for f in (target.parent, target) if f.exists()]
    with pytest.raises(error), replacing_folder(target) as temporary:
        (temporary / "half").touch()
        raise error
    assert [names(f) for f in (target.parent, target) if f.exists()] == before


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(target, monkeypatch):
    before = [names(f) for f in (target.parent, target) if f.exists()]
    move = Path.replace

    def fail(self, to):
        if self.name == "fresh":
            raise OSError(errno.EIO, "no")
        return move(self, to)

    monkeypatch.setattr(Path, "replace", fail)
    monkeypatch.setattr(files, "_renamed", lambda *arguments: False)
    with pytest.raises(OSError, match="no"), replacing_folder(target):
        pass
    assert [names(f) for f in (target.parent, target) if f.exists()] == before


def test_a_link_to_a_folder_is_replaced_and_not_what_it_points_to(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    (tmp_path / "link").symlink_to("target")
    with replacing_folder(tmp_path / "link") as temporary:
        (temporary / "new").touch()
    assert (names(tmp_path / "target"), names(tmp_path / "link")) == (["old"], ["new"])


@pytest.mark.parametrize("there", ["", "a", "a/b"])
def test_parents_are_made_and_taken_back(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyError), making_parents(tmp_path / "a" / "b" / "c"):
        assert names(tmp_path / "a" / "b") == []
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == before
    with making_parents(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "b" / "c").touch()
    assert names(tmp_path / "a" / "b") == ["c"]


def written_by(device) -> tuple[int, bytes]:
    """A file written here and there, and what was read of it on the way."""
    rng = np.random.default_rng(0)
    for start in (0, 3000, 100, 5000, 900):
        device.seek(start)
        device.write(memoryview(rng.bytes(700)))
    device.truncate(5500)
    device.seek(2900)
    buffer = bytearray(900)
    device.readinto(buffer)
    return device.seek(0, os.SEEK_END), bytes(buffer)


@pytest.mark.parametrize("limit", [None, 10000, 3500, 1, 5300])
def test_unfailing(tmp_path, limit):
    """Equal to a file of Python where the disk has place for it, and as long as it is open."""
    with open(tmp_path / "expected", "w+b") as file:
        expected = written_by(file)
    full = limit is not None and limit < 5500
    device = Unfailing(tmp_path / "found")
    with file_limit(limit):
        assert written_by(device) == expected
    with pytest.raises(OSError, match="File too large") if full else nullcontext():
        device.close()
    device.close()
    if not full:
        assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_disk_errors(tmp_path):
    for error in (OSError(errno.ENOSPC, "h5py's own words"), OSError("no number")):
        said = "No space left on device; make room, or .*disk" if error.errno else "no number"
        message = f"x cannot be written: {said}$"
        with pytest.raises(InputError, match=message), disk_errors(Path("x")):
            raise error


# ---- paths of users -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home_folder(monkeypatch, kind):
    monkeypatch.setenv("HOME", "/home/me")
    expected = {"~/x": "/home/me/x", "~": "/home/me", "a/~": "a/~", "x~": "x~", "/a b/c": "/a b/c"}
    assert {p: str(user_path(kind(p))) for p in expected} == expected


INSIDE = {  # path, folder: whether the one is the other or in it
    ("store", "store"): True,
    ("store/sub/x", "store"): True,
    ("store/none/x", "store"): True,
    ("link/x", "store"): True,
    ("store/x", "link"): True,
    ("store/../x", "store"): False,
    ("store2", "store"): False,
    ("store", "store/sub"): False,
    ("none/x", "none"): True,
}


@pytest.mark.parametrize(("path", "folder"), INSIDE)
def test_what_lies_in_a_folder(tmp_path, path, folder):
    (tmp_path / "store" / "sub").mkdir(parents=True)
    (tmp_path / "store2").mkdir()
    (tmp_path / "link").symlink_to("store")
    assert is_within(tmp_path / path, tmp_path / folder) == INSIDE[path, folder]


# ---- where nothing can be written ---------------------------------------------------------------


def test_no_permission(tmp_path, monkeypatch):
    """Tests may run as root, to whom all is permitted."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="nothing can be written into .*: Permission denied"):
        check_folder(tmp_path)
    with pytest.raises(InputError, match="nothing can be written into .*: Permission denied"):
        check_makeable(tmp_path / "a" / "b")
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(InputError, match="cannot be used: Permission denied"):
        exists(tmp_path)


def test_make_folder(tmp_path):
    check_makeable(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    check_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(InputError, match="cannot be made"):
            make_folder(path)
        with pytest.raises(InputError, match="cannot be made: .*file is a file"):
            check_makeable(path)
    assert names(tmp_path) == ["a", "file"]


def test_the_way_to_make_a_folder_is_told(tmp_path):
    with pytest.raises(InputError, match=r"make it first: mkdir -p '.*/my runs/1'$"):
        check_folder(tmp_path / "my runs" / "1")


NEW = {  # a file in a folder with "old" and "folder/", whether to overwrite, and what is said of it
    "there": ("old", False, "the page .*old exists; overwrite=True replaces it"),
    "a folder": ("folder", True, "the page .*folder is a folder"),
    "in no folder": ("none/a", True, "there is no folder .*none; make it first"),
}


@pytest.mark.parametrize(("name", "overwrite", "message"), NEW.values(), ids=NEW)
def test_a_file_that_cannot_be_new(tmp_path, name, overwrite, message):
    (tmp_path / "old").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=message):
        check_new(tmp_path / name, "page", overwrite)
    check_new(tmp_path / "new", "page", overwrite)
    check_new(tmp_path / "old", "page", overwrite=True)
    with pytest.raises(InputError, match="the page .*a lies in .*folder; write it elsewhere"):
        check_new(tmp_path / "folder" / "a", "page", True, tmp_path / "old", tmp_path / "folder")


@pytest.mark.parametrize("system", ["not Linux", "no renameat2", "no locks"])
def test_folders_are_replaced_on_any_system(tmp_path, monkeypatch, system):
    """In two moves where one will not do; what a kill left stays where there are no locks."""
    if system == "not Linux":
        monkeypatch.setattr(files.sys, "platform", "darwin")
    if system == "no renameat2":
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: None)
    if system == "no locks":
        monkeypatch.setattr(files, "fcntl", None)
    path, left = tmp_path / "model", tmp_path / ".model.old.part"
    for folder in (path, left):
        folder.mkdir()
        os.utime(folder, (0, 0))
    with replacing_folder(path) as fresh:
        (fresh / "new").touch()
    assert (path / "new").exists()
    assert names(tmp_path) == ["model"] if system != "no locks" else [".model.old.part", "model"]


def test_what_cannot_be_read(tmp_path):
    path, message = tmp_path / "model", "model cannot be read: No such file or directory"
    with pytest.raises(InputError, match=message), files.reading_errors(path):
        path.read_bytes()
