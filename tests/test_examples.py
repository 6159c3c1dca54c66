"""The example runs as its users start it: a file, two processes, a report."""

import importlib.util
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from tests.examples import simulated

EXAMPLE = Path(__file__).parent.parent / "examples" / "reference_to_query.py"


@pytest.mark.slow
def test_reference_to_query(tmp_path, capfd):
    """Three clear types in three batches: the one left out is labelled, the reference kept.

    The first process is this one, which has imported all that it needs; it starts the second.
    """
    spec = importlib.util.spec_from_file_location("reference_to_query", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    adata = simulated(240)
    adata.obs["cell_type"] = adata.obs["truth"]
    adata.obs["batch"] = np.array(["one", "two", "three"])[np.arange(240) // 80]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    options = ["--query-batch", "three", "--folder", str(tmp_path / "out")]
    epochs = ["--epochs", "30", "--query-epochs", "3"]
    arguments = ["run", str(tmp_path / "cells.h5ad"), *options, *epochs]
    with pytest.warns(UserWarning, match="all 160 cells count as labelled"):
        example.app(arguments, standalone_mode=False)
    said = capfd.readouterr().out
    assert "80 query cells" in said and "logistic regression" in said
    assert "0 of the reference's" in said and "weights changed" in said
    annotated = ad.read_h5ad(tmp_path / "out" / "annotated.h5ad")
    truth = adata.obs["truth"][160:]
    assert (annotated.obs["scanvi_prediction"].astype(str) == truth).mean() > 0.9
