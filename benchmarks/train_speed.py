"""Seconds an epoch of training, beside scvi-tools and beside the same loss by hand.

    python benchmarks/train_speed.py [--cells 10000] [--genes 2000] [--labels 10] [--layers 1]
        [--minibatch 128] [--threads 1 2] [--runs 5] [--epochs 5] [--peer PYTHON] [--json FILE]

Each run is a process of its own, and programs take turns. PYTHON is an interpreter of an
environment with ``pip install torch==2.13.0 scvi-tools==1.4.2``. All train on all cells, half of
them labelled; an epoch comes before, and what a call of ``train`` costs beside its epochs is in.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measuring.turns import measure

OWN = {
    "pyro_scanvi": "",
    "pyro_scanvi, objective=ELBO()": "elbo",
    "the same loss without Lightning": "without Lightning",
    "the same loss by hand": "by hand",
}
OTHERS = {"scvi-tools": "", "scvi-tools, fused Adam": "fused"}
SIZES = {
    "cells": 10_000,
    "genes": 2_000,
    "labels": 10,
    "layers": 1,
    "minibatch": 128,
    "epochs": 5,
}


if __name__ == "__main__":
    measure(__doc__, "train", SIZES, OWN, OTHERS, "seconds an epoch")
