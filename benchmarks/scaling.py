"""How training time and memory grow with genes, labels, cells and the size of a minibatch.

    python benchmarks/scaling.py [--axes genes labels cells minibatch layers] [--threads 1]
        [--runs 3] [--json FILE] [--plot FILE.png]

One size is changed at a time, from 4,000 cells, 1,000 genes, 10 labels, one layer and minibatches
of 128. The exponent is the slope of log seconds an epoch over log size between the two largest
sizes: 1 is in proportion. What an epoch of few cells costs beside its cells flattens it.
"""

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))

from measuring.cells import write_cells
from measuring.turns import Program, in_turns, write_json

BASE = {"cells": 4_000, "genes": 1_000, "labels": 10, "layers": 1, "minibatch": 128, "epochs": 1}
AXES = {
    "genes": (500, 1_000, 2_000, 5_000, 20_000),
    "labels": (2, 10, 50, 100, 200, 400, 1_000),
    "cells": (1_000, 4_000, 16_000, 64_000),
    "minibatch": (128, 512, 1_024, 4_096),
    "layers": (1, 2),
}
OURS = Program("pyro_scanvi", sys.executable, "ours.py")


def main() -> None:
    """Measure, print a table of each axis with its exponent, and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="all runs, with versions and machine")
    parser.add_argument("--plot", type=Path, help="picture of seconds over size")
    asked = parser.parse_args()
    found = {axis: along(axis, asked.threads, asked.runs) for axis in asked.axes}
    for axis, records in found.items():
        print(f"\n{table(axis, records)}")
    write_json(asked.json, [record for records in found.values() for record in records])
    if asked.plot is not None:
        draw(found, asked.plot)


def along(axis: str, threads: int, n_runs: int) -> list[dict[str, Any]]:
    """Runs at each size of an axis."""
    records = []
    for size in AXES[axis]:
        settings = BASE | {axis: size, "threads": threads}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cells.h5ad"
            write_cells(path, settings["cells"], settings["genes"], settings["labels"], 0.13)
            records += in_turns([OURS], "train", path, settings, n_runs)
    return records


def medians(axis: str, records: list[dict[str, Any]], what: str) -> dict[int, float]:
    """Median of each size."""
    sizes = dict.fromkeys(record[axis] for record in records)
    return {s: statistics.median(r[what] for r in records if r[axis] == s) for s in sizes}


def table(axis: str, records: list[dict[str, Any]]) -> str:
    """A column for each size."""
    seconds, memory = (medians(axis, records, what) for what in ("seconds", "peak_mib"))
    (n, t), (larger, longer) = list(seconds.items())[-2:]
    exponent = math.log(longer / t) / math.log(larger / n)
    return "\n".join(
        [
            f"| {axis} | {' | '.join(f'{size:,}' for size in seconds)} |",
            f"|---|{'---|' * len(seconds)}",
            f"| seconds an epoch | {' | '.join(f'{s:.2f}' for s in seconds.values())} |",
            f"| peak MiB | {' | '.join(f'{m:.0f}' for m in memory.values())} |",
            f"\nExponent at the end: {exponent:.2f}.",
        ]
    )


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each axis."""
    matplotlib.use("agg")
    figure, panels = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3), squeeze=False)
    for (axis, records), panel in zip(found.items(), panels[0], strict=True):
        seconds = medians(axis, records, "seconds")
        panel.loglog(list(seconds), list(seconds.values()), marker="o")
        panel.set(xlabel=axis, ylabel="seconds an epoch")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
