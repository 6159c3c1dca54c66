"""Models that scvi-tools saved, opened as estimators: same cells, same answers."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_scanvi import SCANVI, InputError
from tests.examples import as_they_are
from tests.parity import TOLERANCE

FOLDER = Path(__file__).parent.parent / "reference"
CLOSE = {"rtol": 0, "atol": TOLERANCE}  # scvi-tools' figures came from another processor


@pytest.fixture
def expected():
    """Cells, and what scvi-tools 1.4.2 answered for them."""
    return dict(np.load(FOLDER / "saved_scanvi" / "expected.npz"))


@pytest.fixture
def adata(expected):
    """The cells as an AnnData, their columns in another order of categories than the codes'."""
    obs = pd.DataFrame(
        {
            "batch": np.array(["b0", "b1", "b2"])[expected["batch"]],
            "sex": np.array(["f", "m"])[expected["sex"]],
            "label": np.where(np.arange(48) % 3 == 0, "Unknown", np.array(["t1"])),
        },
        index=[f"cell {i}" for i in range(48)],
    )
    return ad.AnnData(expected["X"], obs, pd.DataFrame(index=[str(i) for i in range(40)]))


def test_scanvi_answers_as_scvi_tools_did(adata, expected):
    """Probabilities and label order; then it trains on here."""
    model = SCANVI.load_scvi_tools(FOLDER / "saved_scanvi", adata)
    soft = model.predict(soft=True)
    assert list(soft.columns) == list(expected["classes"])
    assert model.is_trained
    np.testing.assert_allclose(soft, expected["probabilities"], **CLOSE)
    model.train(max_epochs=1, progress_bar=False)
    assert not np.allclose(model.predict(soft=True), expected["probabilities"], **CLOSE)


def test_scvi_is_a_warm_start(adata, expected):
    """The latent space is that of the SCVI; classes come from the new labels."""
    adata.obs["kind"] = np.where(np.arange(48) % 2, "odd", "even")
    adata.obs.loc["cell 5", "kind"] = "?"
    model = SCANVI.from_scvi_model(FOLDER / "saved_scvi", adata, "kind", "?")
    assert not model.is_trained  # its classifier is new
    model = as_they_are(model)
    np.testing.assert_allclose(model.get_latent_representation(), expected["scvi_latent"], **CLOSE)
    assert list(model.fields.classes) == ["even", "odd"]
    model.is_trained = False
    assert model.train(max_epochs=1, progress_bar=False).n_epochs_trained == 1
    assert model.is_trained


def test_the_set_up_survives_a_file(adata, tmp_path):
    """What is noted in uns can be written and read."""
    before = SCANVI.load_scvi_tools(FOLDER / "saved_scanvi", adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = SCANVI(ad.read_h5ad(tmp_path / "cells.h5ad"))
    assert list(again.fields.classes) == list(before.fields.classes)
    assert list(again.fields.batches) == list(before.fields.batches)


def test_other_genes_are_counted_and_listed(adata):
    """Two genes renamed."""
    adata.var_names = ["alpha", "beta", *adata.var_names[2:]]
    with pytest.raises(
        InputError, match=r"2 of 40 are missing \(0, 1\), 2 are new \(alpha, beta\)"
    ):
        SCANVI.load_scvi_tools(FOLDER / "saved_scanvi", adata)


@pytest.mark.parametrize("column, unseen", [("batch", "b9"), ("sex", "x"), ("label", "t9")])
def test_unseen_categories_are_named(adata, column, unseen):
    """In batch, covariate and label."""
    adata.obs.loc["cell 7", column] = unseen
    with pytest.raises(InputError, match=unseen):
        SCANVI.load_scvi_tools(FOLDER / "saved_scanvi", adata)


def test_the_wrong_kind_says_which_call(adata):
    """SCVI and SCANVI each name the other's way in."""
    with pytest.raises(InputError, match="from_scvi_model"):
        SCANVI.load_scvi_tools(FOLDER / "saved_scvi", adata)
    with pytest.raises(InputError, match="load_scvi_tools"):
        SCANVI.from_scvi_model(FOLDER / "saved_scanvi", adata, "label", "Unknown")
    with pytest.raises(InputError, match="is not there"):
        SCANVI.load_scvi_tools(FOLDER, adata)


def test_latent_library_gets_its_prior_from_the_data(adata):
    """Mean and variance of log totals by batch."""
    adata.obs.loc["cell 1", "label"] = "t2"
    SCANVI.setup_anndata(adata, "label", "Unknown", batch_key="batch")
    model = SCANVI(adata, use_observed_lib_size=False, n_hidden=8)
    log_total = np.log(adata.X.sum(1))
    for code, name in enumerate(model.fields.batches):
        rows = log_total[(adata.obs["batch"] == name).to_numpy()]
        assert model.module.library_log_means[code].item() == pytest.approx(rows.mean(), rel=1e-5)
        assert model.module.library_log_vars[code].item() == pytest.approx(rows.var(), rel=1e-4)
    assert model.train(max_epochs=1, progress_bar=False).history["kl_l"].gt(0).all()
