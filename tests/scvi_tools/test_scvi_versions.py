"""A SCANVI of each minor version of scvi-tools, from 0.16 on: it opens and answers as it did."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_scanvi import SCANVI
from pyro_scanvi.scvi_tools.saves import read_save
from tests.parity import TOLERANCE

FOLDER = Path(__file__).parent.parent / "reference" / "versions"
VERSIONS = sorted(path.parent.name for path in FOLDER.glob("*/model.pt"))
CLOSE = {"rtol": 0, "atol": TOLERANCE}


def cells_of(expected: dict[str, np.ndarray]) -> ad.AnnData:
    """The cells that it was trained with."""
    n, columns = len(expected["X"]), ("label", "batch", "sex", "age")
    obs = pd.DataFrame({k: expected[k] for k in columns}, index=[f"cell {i}" for i in range(n)])
    return ad.AnnData(expected["X"], obs, pd.DataFrame(index=expected["genes"]))


def test_no_minor_version_is_left_out():
    """Of 1.4 there are the files beside."""
    minor = {version.rpartition(".")[0] for version in VERSIONS}
    assert minor == {"0.16", "0.17", "0.18", "0.19", "0.20", "1.0", "1.1", "1.2", "1.3", "1.5"}


@pytest.mark.parametrize("version", VERSIONS)
def test_it_opens_and_answers_as_it_did(version):
    """Order of the labels, probabilities, latent means; covariates reach the encoder."""
    expected = dict(np.load(FOLDER / version / "expected.npz"))
    assert read_save(FOLDER / version).version == version
    model = SCANVI.load_scvi_tools(FOLDER / version, cells_of(expected))
    soft = model.predict(soft=True)
    assert list(soft.columns) == list(expected["classes"]) == ["B", "T", "zeta"]
    np.testing.assert_allclose(soft, expected["probabilities"], **CLOSE)
    np.testing.assert_allclose(model.get_latent_representation(), expected["latent"], **CLOSE)
