"""Seconds an epoch of training, beside scvi-tools and beside the same loss by hand.

    python benchmarks/train_speed.py [--cells 10000] [--genes 2000] [--labels 10] [--layers 1]
        [--minibatch 128] [--threads 1 2] [--runs 5] [--epochs 5] [--peer PYTHON] [--json FILE]

Each run is a process of its own, and programs take turns. PYTHON is an interpreter of an
environment with ``pip install torch==2.13.0 scvi-tools==1.4.2``. All train on all cells, half of
them labelled; an epoch comes before, and what a call of ``train`` costs beside its epochs is in.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measuring.cells import write_cells
from measuring.turns import in_turns, programs, table, write_json

OURS = "pyro_scanvi"
OWN = {OURS: "", "pyro_scanvi, objective=ELBO()": "elbo", "the same loss by hand": "by hand"}
OTHERS = {"scvi-tools": "", "scvi-tools, fused Adam": "fused"}


def main() -> None:
    """Measure, and print a table for each number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"cells": 10_000, "genes": 2_000, "labels": 10, "layers": 1, "minibatch": 128}
    for name, size in (sizes | {"runs": 5, "epochs": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--nonzero", type=float, default=0.13, help="share of counts above 0")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peer", help="interpreter with scvi-tools")
    parser.add_argument("--json", type=Path, help="all runs, with versions and machine")
    asked = parser.parse_args()
    settings = {name: getattr(asked, name) for name in (*sizes, "epochs", "nonzero")}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        cells = Path(folder) / "cells.h5ad"
        write_cells(cells, asked.cells, asked.genes, asked.labels, asked.nonzero)
        for threads in asked.threads:
            rivals = programs(asked.peer, OWN, OTHERS)
            here = in_turns(rivals, "train", cells, settings | {"threads": threads}, asked.runs)
            print(f"\n{threads} threads, {settings}\n\n{table(here, OURS, 'seconds an epoch')}")
            records += here
    write_json(asked.json, records)


if __name__ == "__main__":
    main()
