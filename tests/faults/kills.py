"""A process is killed at any of its steps: what stands there is whole, the old one or the new one.

A step is a file that is opened to be written, made, moved or removed, a call of the system that
Python does not make itself, or a write of HDF5 or torch; Python tells of them by audit events.
"""

import os
import resource
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.app import report
from pyro_scanvi.storage.files import JUST_MADE, PART, Unfailing
from pyro_scanvi.storage.stores import read_anndata, write_anndata
from pyro_scanvi.training import checkpoints
from tests.examples import file_limit, simulated, small_model
from tests.faults.children import REFUSED, Work, exit_code_of

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "ctypes.dlopen", "ctypes.dlsym")
SURVIVED = ("the old one", "the new one", "nothing, as before")


@dataclass(frozen=True)
class Writing:
    """Something to be written, and how to tell what stands there.

    Attributes
    ----------
    write
        Writes the old (0) or the new (1) one to a path.
    read
        Which of them is there; raises if it cannot be opened.
    name
        Of the path.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], int]
    name: str

    def at(self, path: Path) -> str:
        """What stands at a path; raises if it is not whole."""
        if not path.exists():
            return SURVIVED[2]
        return SURVIVED[self.read(path)]


# ---- the kill -----------------------------------------------------------------------------------


def at_each_step(work: Work, do: Callable[[], object], *arguments) -> None:
    """Do the work, and something else before each step."""

    def listen(event: str, given: tuple) -> None:
        opened = event == "open" and isinstance(given[2], int) and given[2] & os.O_ACCMODE
        if opened or event in EVENTS:
            do()

    write = Unfailing.write
    Unfailing.write = lambda self, data: (do(), write(self, data))[1]
    sys.addaudithook(listen)
    work(*arguments)


def killed_at_step(work: Work, step: int, *arguments) -> None:
    """Do it, and be killed before that step."""
    numbers = count()
    at_each_step(
        work, lambda: next(numbers) == step and os.kill(os.getpid(), signal.SIGKILL), *arguments
    )


def counted(work: Work, said: Path, *arguments) -> None:
    """Do it, and write down the number of steps."""
    numbers = count()
    at_each_step(work, lambda: next(numbers), *arguments)
    said.write_text(f"{next(numbers)}")


def killed_at_byte(work: Work, size: int, *arguments) -> None:
    """Do it, and be killed where a file becomes larger than that."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    work(*arguments)


def filled_at_byte(work: Work, size: int, *arguments) -> None:
    """Do it where no file may become larger than that: the next best thing to a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    path = next(given for given in arguments if isinstance(given, Path))
    with file_limit(size):
        try:
            work(*arguments)
        except InputError as error:
            assert f"{path} cannot be written: File too large" in str(error), error
            assert not leftovers(path)
            raise


def leftovers(path: Path) -> list[Path]:
    """What a kill has left beside a path; nothing else may be there."""
    others = [p for p in path.parent.iterdir() if p != path]
    strangers = [p for p in others if not (p.name.startswith(f".{path.name}") and PART in p.name)]
    assert not strangers, strangers
    return others


def age(path: Path) -> None:
    """As if the kill had been some time ago."""
    for folder in leftovers(path):
        os.utime(folder, (0, folder.stat().st_mtime - 2 * JUST_MADE))


# ---- what is written ----------------------------------------------------------------------------


def models() -> list[SCANVI]:
    """Two that differ."""
    return [small_model(simulated(40), seed=seed).train(1, progress_bar=False) for seed in (0, 1)]


def writings() -> Mapping[str, Writing]:
    """All that the package writes."""
    pair = models()
    annotated = [model.annotate() for model in pair]
    pages = [f"<html>{number}{'.' * 100_000}</html>" for number in (0, 1)]

    def page(path: Path, number: int) -> None:
        report.rendered = lambda parts: pages[number]
        report.PARTS = []
        report.write_page(None, path)

    def train(path: Path, number: int) -> None:
        if number and path.exists() and checkpoints.read(path).n_epochs > number:
            path.unlink()  # or there would be nothing to train, and to write
        model = small_model(simulated(40))
        model.train(1 + number, progress_bar=False, checkpoint_dir=path.parent, ckpt_path="last")

    def which_cells(path: Path) -> int:
        latent = read_anndata(path, is_known=True).obsm["X_scanvi"]
        return [(latent == adata.obsm["X_scanvi"]).all() for adata in annotated].index(True)

    return {
        "a saved model": Writing(
            lambda path, number: pair[number].save(path, overwrite=True, save_anndata=True),
            lambda path: SCANVI.load(path).seed,
            "model",
        ),
        "annotated cells, .h5ad": Writing(
            lambda path, number: write_anndata(annotated[number], path), which_cells, "cells.h5ad"
        ),
        "annotated cells, .zarr": Writing(
            lambda path, number: write_anndata(annotated[number], path), which_cells, "cells.zarr"
        ),
        "a report": Writing(page, lambda path: pages.index(path.read_text()), "report.html"),
        "a checkpoint": Writing(
            train, lambda path: checkpoints.read(path).n_epochs - 1, checkpoints.LAST
        ),
    }


# ---- trials -------------------------------------------------------------------------------------


class Killing:
    """Kills of one writing; `old` says whether another one stands there before.

    Parameters
    ----------
    writing
        An entry of :func:`writings`.
    folder
        An empty one to work in.
    old
        Whether something is to be replaced.
    """

    def __init__(self, writing: Writing, folder: Path, old: bool):
        self.writing, self.folder, self.old = writing, folder, old
        self.template = folder / "template"
        self.template.mkdir()
        if old:
            assert exit_code_of(writing.write, self.template / writing.name, 0) == 0

    def n_steps(self) -> int:
        """Of writing it; those of threads may be one more or less another time."""
        place, said = self._place(), self.folder / "said"
        exit_code_of(counted, self.writing.write, said, place / self.writing.name, 1)
        shutil.rmtree(place)
        return int(said.read_text())

    def outcome(self, kill: Work, when: int) -> str | None:
        """What stands there after a kill, with a step or a size; None where none came."""
        place = self._place()
        try:
            path = place / self.writing.name
            code = exit_code_of(kill, self.writing.write, when, path, 1)
            if code == 0:
                return None
            if code not in (-signal.SIGKILL, -signal.SIGXFSZ, REFUSED):
                return f"exit code {code}"
            said = self.folder / "said"
            exit_code_of(self._say, path, said)
            return said.read_text()
        finally:
            shutil.rmtree(place)

    def _place(self) -> Path:
        """A folder to write into."""
        return Path(shutil.copytree(self.template, self.folder / "place"))

    def _say(self, path: Path, said: Path) -> None:
        """What is there; then it is written again, after which no trace of the kill is left."""
        warnings.simplefilter("ignore")
        said.write_text("it does not open, or cannot be written again")
        there = self.writing.at(path)
        age(path)
        self.writing.write(path, 1)
        whole = self.writing.at(path) == SURVIVED[1] and not leftovers(path)
        expected = SURVIVED[:2] if self.old else SURVIVED[1:]
        said.write_text(there if whole and there in expected else f"not whole: {there}")


def steps(killing: Killing, chosen: Callable[[int], Iterable[int]]) -> Counter[str]:
    """What came of a kill before each of the steps that are chosen, given their number."""
    found = (killing.outcome(killed_at_step, step) for step in chosen(killing.n_steps()))
    return Counter(outcome for outcome in found if outcome is not None)


def sizes(killing: Killing, growth: float = 1.5, kill: Work = killed_at_byte) -> Counter[str]:
    """What came of a kill, or of a full disk, at the byte of a file, for sizes that grow."""
    found = (killing.outcome(kill, int(growth**i)) for i in range(200))
    return Counter(takewhile(lambda outcome: outcome is not None, found))
