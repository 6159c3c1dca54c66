"""Seconds to label all cells, probabilities of all labels, beside scvi-tools.

    python benchmarks/predict_speed.py [--cells 10000] [--genes 2000] [--labels 10] [--layers 1]
        [--threads 1 2] [--runs 5] [--peer PYTHON] [--json FILE]

Runs and PYTHON are as of train_speed.py. Compared are the classifiers, which are the same network;
the label rules that ``predict()`` asks by default are learned first, and are a row of their own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measuring.turns import add_sizes, measured

OURS = "pyro_scanvi"
OWN = {OURS: "", "pyro_scanvi, by label rules": "rules"}
OTHERS = {"scvi-tools": ""}
SIZES = {"cells": 10_000, "genes": 2_000, "labels": 10, "layers": 1}


def main() -> None:
    """Measure, and print a table for each number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, SIZES)
    measured(parser.parse_args(), "predict", SIZES, OWN, OTHERS, "seconds")


if __name__ == "__main__":
    main()
