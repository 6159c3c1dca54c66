"""Seconds to label all cells, probabilities of all labels, beside scvi-tools.

    python benchmarks/predict_speed.py [--cells 10000] [--genes 2000] [--labels 10] [--layers 1]
        [--threads 1 2] [--runs 5] [--peer PYTHON] [--json FILE]

Runs and PYTHON are as of train_speed.py. Compared are the classifiers, which are the same network;
the label rules that ``predict()`` asks by default are learned first, and are a row of their own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measuring.turns import measure

OWN = {"pyro_scanvi": "", "pyro_scanvi, by label rules": "rules"}
OTHERS = {"scvi-tools": ""}
SIZES = {"cells": 10_000, "genes": 2_000, "labels": 10, "layers": 1}


if __name__ == "__main__":
    measure(__doc__, "predict", SIZES, OWN, OTHERS, "seconds")
