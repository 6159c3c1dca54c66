"""Execute notebooks and compare what comes out with the text that is stored in them.

``python notebooks/execute.py [NAMES ...] [--store]`` runs those whose file name starts with one of
the names (all, without a name), two at a time with one thread each. The executed copies, with
pictures, go to ``build/notebooks``. Of stored text and new text the words have to be equal and the
numbers close, since training on other processors differs in its last bits, which grow. A cell that
fails and a text that differs end with exit code 1. ``--store`` writes the new text, and nothing
else, into the notebooks: no pictures, no HTML, no times; so a change is a small diff.

Two tags of a cell are for what no seed fixes: "numbers-vary" (only words are compared) and
"output-varies" (nothing is).
"""

import argparse
import itertools
import multiprocessing
import os
import re
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from pyro_scanvi.storage.files import replacing

FOLDER = Path(__file__).resolve().parent
EXECUTED = FOLDER.parent / "build" / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = ("tags", "jupyter")
NUMBERS_VARY, OUTPUT_VARIES = "numbers-vary", "output-varies"
ABSOLUTE, RELATIVE = 0.05, 0.25
TIMEOUT = 600
SHOWN = 5  # differences of a cell

# A number is no part of a word: CD25 and batch_2 are words. Other signs are words of their own.
TOKEN = re.compile(
    r"(?P<number>(?<![\w.])(?:(?<![^\s(\[{,;:=|±])[-+])?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|\w+|[^\w\s]"
)
RULE = re.compile(r"([-=_─━═~])\1{2,}")  # its length follows the width of a table


# ---- text of outputs ----------------------------------------------------------------------------


def text_outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs as they are stored: text alone, what was printed in a row as one."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if kept and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
            else:
                kept.append(nbformat.v4.new_output("stream", name=output.name, text=output.text))
        elif "text/plain" in output.get("data", {}):
            data = {"text/plain": output.data["text/plain"]}
            kept.append(nbformat.v4.new_output(output.output_type, data=data))
    return kept


def text(cell: NotebookNode) -> str:
    """All that a cell said, printed or as its value."""
    parts = [
        output.text if output.output_type == "stream" else output.data["text/plain"]
        for output in text_outputs(cell.outputs)
    ]
    return "\n".join(part.rstrip("\n") for part in parts)


def stripped(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is stored: of outputs their text, of metadata what changes the page."""
    result = nbformat.from_dict(
        {"cells": [], "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    )
    for cell in notebook.cells:
        new = nbformat.from_dict(
            {key: value for key, value in cell.items() if key != "attachments"}
        )
        new.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
        )
        if cell.cell_type == "code":
            new.outputs, new.execution_count = text_outputs(cell.outputs), None
        result.cells.append(new)
    return result


# ---- comparison ---------------------------------------------------------------------------------


def tokens(words: str) -> list[str | float]:
    """Words and signs as strings, numbers as floats; blanks and lengths of rules do not count."""
    found = TOKEN.finditer(RULE.sub(r"\1", words))
    return [float(m.group()) if m.group("number") else m.group() for m in found]


def same(stored: str | float | None, new: str | float | None, numbers_vary: bool) -> bool:
    """Whether one token may stand for the other."""
    if isinstance(stored, float) and isinstance(new, float):
        return numbers_vary or abs(new - stored) <= ABSOLUTE + RELATIVE * abs(stored)
    return type(stored) is type(new) and stored == new


def differences(stored: str, new: str, tags: tuple[str, ...] | list[str] = ()) -> list[str]:
    """In words, where two texts differ; empty if one may stand for the other."""
    if OUTPUT_VARIES in tags:
        return []
    numbers_vary = NUMBERS_VARY in tags
    pairs = list(itertools.zip_longest(tokens(stored), tokens(new)))
    found = []
    for i, (a, b) in enumerate(pairs):
        if not same(a, b, numbers_vary):
            before = " ".join(str(x) for x, _ in pairs[max(0, i - 3) : i])
            found.append(f"after '{before}': {told(a)} is stored, {told(b)} came")
            if not (isinstance(a, float) and isinstance(b, float)):
                break  # what follows has lost its place
    return found


def told(token: str | float | None) -> str:
    """A token in a message."""
    return "nothing" if token is None else f"{token:g}" if isinstance(token, float) else repr(token)


def compared(stored: NotebookNode, executed: NotebookNode) -> list[str]:
    """In words, in which cells a notebook said something else than what is stored."""
    found = []
    for old, new in zip(stored.cells, executed.cells, strict=True):
        if old.cell_type == "code":
            different = differences(text(old), text(new), old.metadata.get("tags", []))
            found += [f"cell '{old.id}' {x}" for x in different[:SHOWN]]
            found += [f"cell '{old.id}' and {len(different) - SHOWN} more"] * (
                len(different) > SHOWN
            )
    return found


# ---- execution ----------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of a notebook: seconds by the clock and of processors, what is wrong."""

    name: str
    seconds: float
    cpu_seconds: float
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"{self.name:40} {self.seconds:6.0f} s, {self.cpu_seconds:4.0f} s of processors"
        return "\n  ".join([line, *self.wrong])


def execute(path: Path, folder: Path = EXECUTED, store: bool = False) -> Result:
    """Run a notebook from its own folder; its copy with pictures goes to `folder`."""
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.from_dict(stored)
    copy = folder / path.name
    copy.unlink(missing_ok=True)
    start, used = time.perf_counter(), _children()
    wrong = []
    try:
        NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
    except CellExecutionError as error:
        wrong.append(str(error))
    result = Result(path.name, time.perf_counter() - start, _children() - used, wrong)
    if not wrong:
        result.wrong += [] if store else compared(stored, notebook)
        if store:
            _write(stripped(notebook), path)
        _write(notebook, copy)  # it is newer than what it was made of
    return result


def _children() -> float:
    """Seconds of processors of the kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _write(notebook: NotebookNode, path: Path) -> None:
    """Whole or not at all; times of day, which change with every run, are left out."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        nbformat.write(notebook, temporary)


def chosen(names: list[str], folder: Path = FOLDER) -> list[Path]:
    """The notebooks whose file names start with one of `names`; all, without a name."""
    paths = sorted(folder.glob("*.ipynb"))
    wanted = [Path(name).name for name in names]
    unknown = [x for x in wanted if not any(path.name.startswith(x) for path in paths)]
    if unknown:
        sys.exit(f"no notebook is called {', '.join(unknown)}; there are {[p.name for p in paths]}")
    return [p for p in paths if not wanted or any(p.name.startswith(x) for x in wanted)]


def main(arguments: list[str] | None = None) -> int:
    """Run, tell, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how file names start; all, without one")
    parser.add_argument("--store", action="store_true", help="write the new text to the notebooks")
    options = parser.parse_args(arguments)
    paths = chosen(options.names)
    # tqdm misses widgets that nobody needs; and a warning would show the path of the kernel.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress,ignore:a file takes other names"
    os.environ["OMP_NUM_THREADS"] = "1"
    start, results = time.perf_counter(), []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        folders, stores = itertools.repeat(EXECUTED), itertools.repeat(options.store)
        for result in pool.map(execute, paths, folders, stores):
            print(result, flush=True)
            results.append(result)
    cpu = sum(result.cpu_seconds for result in results)
    total = time.perf_counter() - start
    print(f"{len(paths)} notebooks {total:.0f} s, {cpu:.0f} s of processors")
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
