"""The example runs as its users start it: a file, two processes, a report."""

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np

from tests.examples import simulated

EXAMPLE = Path(__file__).parent.parent / "examples" / "reference_to_query.py"


def test_reference_to_query(tmp_path):
    """Three clear types in three batches: the one left out is labelled, the reference kept."""
    adata = simulated(240)
    adata.obs["cell_type"] = adata.obs["truth"]
    adata.obs["batch"] = np.array(["one", "two", "three"])[np.arange(240) // 80]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    options = ["--query-batch", "three", "--folder", str(tmp_path / "out")]
    epochs = ["--epochs", "40", "--query-epochs", "5"]
    arguments = [sys.executable, str(EXAMPLE), "run", str(tmp_path / "cells.h5ad")]
    done = subprocess.run(arguments + options + epochs, capture_output=True, timeout=300)
    said = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "80 query cells" in said and "logistic regression" in said
    assert "0 of the reference's" in said and "weights changed" in said
    annotated = ad.read_h5ad(tmp_path / "out" / "annotated.h5ad")
    truth = adata.obs["truth"][160:]
    assert (annotated.obs["scanvi_prediction"].astype(str) == truth).mean() > 0.9
