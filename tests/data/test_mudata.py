"""A MuData as one AnnData: cells stay beside their own proteins."""

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.data.mudata import as_anndata
from tests.examples import simulated


@pytest.fixture
def mdata():
    """RNA of 30 cells; proteins of 20 of them, in another order: the number of their cell."""
    rna = simulated(30)
    order = np.random.default_rng(0).permutation(30)[:20]
    counts = np.stack([order, order + 100], 1).astype(np.float32)
    obs, var = pd.DataFrame(index=rna.obs_names[order]), pd.DataFrame(index=["CD3", "CD4"])
    return SimpleNamespace(mod={"rna": rna, "protein": ad.AnnData(csr_matrix(counts), obs, var)})


def test_cells_keep_their_proteins(mdata):
    """By name; those that were not measured have none, and the MuData stays as it is."""
    adata = as_anndata(mdata, others=["protein"])
    table = adata.obsm["protein"]
    assert list(table.columns) == ["CD3", "CD4"] and table.notna().all(axis=1).sum() == 20
    measured = table.dropna()
    numbers = [int(name.removeprefix("cell")) for name in measured.index]
    np.testing.assert_array_equal(measured["CD3"], numbers)
    np.testing.assert_array_equal(measured["CD4"], np.array(numbers) + 100)
    assert not mdata.mod["rna"].obsm.keys()
    np.testing.assert_array_equal(adata.X, mdata.mod["rna"].X)


def test_the_model_reads_them(mdata):
    adata = as_anndata(mdata, others="protein")
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", extra={"protein": "obsm/protein"})
    assert SCANVI(adata, n_hidden=8, n_latent=3).module.n_extra == {"protein": 2}


def test_without_others_it_is_the_rna(mdata):
    assert not as_anndata(mdata).obsm.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.mod.pop("rna"), "no modality 'rna', only protein"),
        (lambda m: m.mod.pop("protein"), "no modality 'protein', only rna"),
        (lambda m: m.mod.update(rna=m.mod["rna"][:25].copy()), "are not in 'rna'"),
        (lambda m: m.mod["protein"].var_names.values.fill("CD3"), "twice in 'protein'.*CD3"),
        (lambda m: m.mod["rna"].obsm.update(protein=np.zeros((30, 1))), "is there already"),
    ],
    ids=["no RNA", "no protein", "strangers", "twice", "taken"],
)
def test_what_is_refused(mdata, change, message):
    change(mdata)
    with pytest.raises(InputError, match=message):
        as_anndata(mdata, others=["protein"])


def test_an_anndata_is_no_mudata():
    with pytest.raises(InputError, match="got a AnnData, expected a MuData"):
        as_anndata(simulated(12))
