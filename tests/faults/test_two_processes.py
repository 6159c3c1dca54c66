"""Two processes write to one place at once: one whole result, or a refusal."""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.storage import files
from pyro_scanvi.storage.files import beside, replacing, replacing_folder
from pyro_scanvi.storage.stores import write_anndata
from pyro_scanvi.training.checkpoints import LastCheckpoint, read
from tests.examples import simulated, small_model
from tests.faults.children import REFUSED, WENT_WELL, as_nobody, exit_codes_of

ATTEMPTS = 3


def trained(seed: int) -> SCANVI:
    return small_model(simulated(30), seed=seed).train(1, progress_bar=False)


def at_once(folder: Path, overwrite: bool) -> None:
    """Two models saved into one folder, of which a third process reads."""
    pair = [trained(seed) for seed in (0, 1)]
    for i in range(ATTEMPTS):
        path = folder / f"model{i}"
        if overwrite:
            trained(2).save(path)
        codes = exit_codes_of(*(partial(model.save, path, overwrite) for model in pair))
        assert codes.count(WENT_WELL) == (2 if overwrite else 1), codes
        assert set(codes) <= {WENT_WELL, REFUSED}
        written = [seed for seed, code in enumerate(codes) if code == WENT_WELL]
        assert SCANVI.load(path, simulated(30)).seed in written
        assert sorted(p.name for p in folder.iterdir()) == [f"model{j}" for j in range(i + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_two_saves(tmp_path, new_process, overwrite):
    assert new_process(at_once, tmp_path, overwrite) == 0


def cells_at_once(folder: Path, suffix: str) -> None:
    pair = [simulated(30, seed=seed) for seed in (0, 1)]
    for i in range(ATTEMPTS):
        path = folder / f"cells{i}.{suffix}"
        works = (partial(write_anndata, adata, path, {}, overwrite=False) for adata in pair)
        assert sorted(exit_codes_of(*works)) == [WENT_WELL, REFUSED]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_two_outputs(tmp_path, new_process, suffix):
    """Neither process found one when it began; that of the first stays."""
    assert new_process(cells_at_once, tmp_path, suffix) == 0


def run_at_once(folder: Path) -> None:
    def train(seed: int) -> None:
        model = small_model(simulated(60), seed=seed)
        model.train(6, batch_size=16, progress_bar=False, checkpoint_dir=folder)

    codes = exit_codes_of(*(partial(train, seed) for seed in (0, 1)))
    assert sorted(codes) == [WENT_WELL, REFUSED], codes
    model = small_model(simulated(60), seed=codes.index(WENT_WELL))
    model.train(7, batch_size=16, progress_bar=False, checkpoint_dir=folder, ckpt_path="last")


@pytest.mark.slow
def test_two_trainings(tmp_path, new_process):
    """The second to end an epoch stops; the checkpoint is that of the other, which goes on."""
    assert new_process(run_at_once, tmp_path / "run") == 0


class Trainer:
    """What a checkpoint needs of Lightning's."""

    is_last_batch = is_global_zero = True

    def save_checkpoint(self, path: Path) -> None:
        path.write_text("ours")


def test_a_checkpoint_of_another_process_stays(tmp_path):
    mine = LastCheckpoint(tmp_path)
    mine.on_train_epoch_end(Trainer(), None)
    mine.on_train_epoch_end(Trainer(), None)
    mine.path.unlink()  # by the user
    mine.on_train_epoch_end(Trainer(), None)
    mine.path.write_text("of another process")
    with pytest.raises(InputError, match=r"another process has written .*last\.ckpt"):
        mine.on_train_epoch_end(Trainer(), None)
    assert mine.path.read_text() == "of another process"


@pytest.mark.parametrize("renames", [True, False], ids=["renameat2", "no renameat2"])
@pytest.mark.parametrize("make", [replacing, replacing_folder])
def test_what_came_meanwhile_stays(tmp_path, monkeypatch, make, renames):
    if not renames:
        monkeypatch.setattr(files, "_renamed", lambda *arguments: False)
    path = tmp_path / "out"
    message = "out was not there before and is now: another process"
    with pytest.raises(InputError, match=message), make(path, overwrite=False) as fresh:
        if make is replacing:
            fresh.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and [*tmp_path.iterdir()] == [path]
    path.unlink()
    with make(path, overwrite=False) as fresh:
        if make is replacing:
            fresh.write_text("mine")
    assert path.exists()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """And what another one is writing is not, nor what was made just now, nor anything else."""
    path = tmp_path / "cells.h5ad"
    for name in (".cells.h5ad.old.part", ".cells.h5ad.new.part", ".other.h5ad.old.part"):
        (tmp_path / name / "fresh").mkdir(parents=True)
        os.utime(tmp_path / name, (0, 0) if ".old." in name else None)
    with beside(path) as mine:
        os.utime(mine, (0, 0))
        with replacing(path) as fresh:
            fresh.touch()
        assert mine.exists()
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"cells.h5ad", ".cells.h5ad.new.part", ".other.h5ad.old.part"}


# ---- folders that may not be changed ------------------------------------------------------------


@pytest.fixture
def locked():
    """A folder with a saved model and a checkpoint, that may be read and not changed."""
    folder = Path(tempfile.mkdtemp())  # that of pytest is for its owner alone
    trained(0).save(folder / "model", save_anndata=True)
    small_model(simulated(30)).train(1, progress_bar=False, checkpoint_dir=folder / "run")
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(folder)


def is_refused(work, path: Path) -> None:
    with pytest.raises(InputError, match=f"{path}.*(Permission denied|cannot be)"):
        work()


def in_a_locked_folder(folder: Path) -> None:
    """All that reads goes well; all that writes is refused before it begins."""
    model = SCANVI.load(folder / "model")
    assert read(folder / "run" / "last.ckpt").n_epochs == 1
    is_refused(partial(model.save, folder / "new"), folder)
    is_refused(partial(model.save, folder / "model", overwrite=True), folder)
    for suffix in ("h5ad", "zarr"):
        is_refused(partial(write_anndata, model.adata, folder / f"new.{suffix}"), folder)
    for run in ("run", "other"):
        train = partial(model.train, 2, progress_bar=False, checkpoint_dir=folder / run)
        is_refused(train, folder)
    assert model.n_epochs_trained == 1


def what_may_not_be_read(folder: Path) -> None:
    is_refused(partial(SCANVI.load, folder / "model"), folder / "model")
    is_refused(partial(read, folder / "run" / "last.ckpt"), folder / "run")


def test_folders_that_may_not_be_changed(locked, new_process):
    assert new_process(as_nobody, in_a_locked_folder, locked) == 0
    for path in (locked / "model", locked / "run"):
        path.chmod(0o000)
    assert new_process(as_nobody, what_may_not_be_read, locked) == 0
    assert sorted(p.name for p in locked.iterdir()) == ["model", "run"]
