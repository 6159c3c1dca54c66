"""Counts as files have them: in raw, among many genes, corrected, in other orders."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import coo_matrix, csr_matrix

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.data.counts import CountsPlace, drop_empty_cells, variable_genes
from pyro_scanvi.data.fields import Fields
from tests.examples import SMALL, simulated, small_model


def in_raw() -> ad.AnnData:
    """The layout of CELLxGENE: log-normalised in X, counts of more genes in raw."""
    adata = simulated()
    adata.X = csr_matrix(adata.X)
    adata.raw = adata.copy()
    adata.X = np.log1p(adata.X.toarray() * 1e4 / adata.X.sum(1).A1[:, None])
    return adata[:, 3:15].copy()


def test_a_refusal_says_that_raw_holds_counts():
    for layer in (False, True):
        adata = in_raw()
        advice = "raw holds whole numbers: use_raw=True"
        if layer:
            adata.layers["counts"], adata.raw = adata.raw.X[:, 3:15].copy(), None
            advice = "layer 'counts' holds whole numbers: layer='counts'"
        with pytest.raises(InputError, match=f"look log-normalised.*{advice}"):
            SCANVI.setup_anndata(adata, "cell_type", "Unknown")
        adata.X = None
        with pytest.raises(InputError, match=f"X is empty.*{advice}"):
            SCANVI.setup_anndata(adata, "cell_type", "Unknown")


@pytest.mark.parametrize("place", [{"use_raw": True}, {"layer": "raw"}], ids=str)
def test_counts_in_raw(tmp_path, place):
    """All of its genes are read; equal to the same counts in X, after a file and in a query too."""
    expected = small_model(simulated()).train(2, progress_bar=False)
    adata = in_raw()
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", **place)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad")
    model = SCANVI(adata, **SMALL).train(2, progress_bar=False)
    soft = expected.predict(soft=True)
    pd.testing.assert_frame_equal(model.predict(soft=True), soft, rtol=1e-4)
    assert len(model.fields.genes) == 20
    model.save(tmp_path / "model", save_anndata=True)
    again = SCANVI.load(tmp_path / "model")
    pd.testing.assert_frame_equal(again.predict(soft=True), model.predict(soft=True))
    prepared = SCANVI.prepare_query_anndata(in_raw(), model)
    assert prepared.n_vars == 20
    pd.testing.assert_frame_equal(model.predict(prepared, soft=True), model.predict(soft=True))
    mapped = SCANVI.load_query_data(prepared, tmp_path / "model")
    pd.testing.assert_frame_equal(mapped.predict(soft=True), model.predict(soft=True))


def test_a_layer_called_raw_comes_before_raw():
    adata = in_raw()
    adata.layers["raw"] = adata.raw.X[:, 3:15].copy()
    assert CountsPlace.find(adata, "raw") == CountsPlace(layer="raw")
    assert CountsPlace.find(adata, None, use_raw=True) == CountsPlace(use_raw=True)


def test_no_raw():
    with pytest.raises(InputError, match="there is no raw"):
        SCANVI.setup_anndata(simulated(), "cell_type", "Unknown", use_raw=True)
    with pytest.raises(InputError, match="name two places"):
        SCANVI.setup_anndata(in_raw(), "cell_type", "Unknown", layer="raw", use_raw=True)


def test_empty_cells_of_raw_are_dropped():
    adata = in_raw()
    x = adata.raw.X
    x.data[x.indptr[4] : x.indptr[5]] = 0
    assert "cell4" not in drop_empty_cells(adata, "raw").obs_names
    assert drop_empty_cells(adata, use_raw=True).n_obs == 119


# ---- fractions ----------------------------------------------------------------------------------


def corrected(scale: float = 30.0) -> ad.AnnData:
    """Counts less an ambient share, as SoupX and DecontX leave them."""
    adata = simulated()
    adata.X = np.maximum(adata.X * scale - np.linspace(0.1, 3.7, 20), 0).astype(np.float32)
    return adata


@pytest.mark.parametrize("matrix", [np.asarray, csr_matrix])
def test_corrected_counts_are_rounded_and_said(matrix):
    adata = corrected()
    adata.X = matrix(adata.X)
    with pytest.warns(UserWarning, match="fractions of .* the model reads them rounded"):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    rounded = corrected()
    rounded.X = np.rint(rounded.X)
    with pytest.warns(UserWarning, match="rounded"):
        found = Fields.from_uns(adata).encode(adata)[np.arange(120)].x
    np.testing.assert_array_equal(found, rounded.X)
    assert (np.rint(adata.X.toarray() if matrix is csr_matrix else adata.X) != adata.X).sum()


def test_rounding_errors_of_a_logarithm_are_no_fractions():
    adata = simulated()
    adata.X = np.expm1(np.log1p(adata.X * 100)).astype(np.float32)
    assert (np.rint(adata.X) != adata.X).any()
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")  # a warning would be an error
    np.testing.assert_array_equal(Fields.from_uns(adata).encode(adata).counts, simulated().X * 100)


TRANSFORMS = {
    "log1p": (lambda x, total: np.log1p(x * 1e4 / total), "look log-normalised; expected"),
    "log2": (lambda x, total: np.log2(1 + x * 1e4 / total), "look log-normalised; expected"),
    "a common total": (lambda x, total: x * 1e4 / total, "look normalised; expected"),
    "size factors": (lambda x, total: x * 977.0 / np.sqrt(total), "look normalised; expected"),
    "root": (lambda x, total: np.sqrt(x * 1e4 / total) / 9, "look log-normalised; if they are"),
    "shallow": (lambda x, total: np.minimum(x, 20) * 0.73, "round them: adata.X = adata.X.round"),
}


@pytest.mark.parametrize(("transform", "message"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_is_normalised_is_no_count(transform, message):
    adata = simulated()
    adata.X = transform(adata.X, adata.X.sum(1, keepdims=True)).astype(np.float32)
    if "round them" in message:
        adata.X += 0.17 * np.random.default_rng(0).random(adata.shape).astype(np.float32)
    with pytest.raises(InputError, match=message):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")


def test_values_beyond_float32():
    adata = simulated()
    adata.X = adata.X.astype(float)
    adata.X[3, 4] = 1e300
    with pytest.raises(InputError, match="not finite: inf in cell 'cell3', gene 'gene4'"):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown")


def test_doubled_entries_of_a_sparse_matrix_are_added():
    """Legal in the format; halves that add up are a whole count."""
    adata = simulated()
    x = coo_matrix(adata.X)
    halves = np.concatenate([x.data / 2, x.data / 2])
    place = np.concatenate([x.col, x.col])
    order = np.argsort(np.concatenate([x.row, x.row]), kind="stable")
    indptr = np.append(0, np.cumsum(2 * np.bincount(x.row, minlength=120)))
    adata.X = csr_matrix((halves[order], place[order], indptr), shape=x.shape)
    assert not adata.X.has_canonical_format
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    found = Fields.from_uns(adata).encode(adata)[np.arange(120)].x
    np.testing.assert_array_equal(found, simulated().X)


# ---- genes --------------------------------------------------------------------------------------


def test_genes_are_found_by_name():
    """In any order and among others."""
    model = small_model(simulated()).train(1, progress_bar=False)
    expected = model.predict(soft=True)
    other = simulated()[:, ::-1].copy()
    pd.testing.assert_frame_equal(model.predict(other, soft=True), expected)
    strangers = np.full((120, 3), 99, dtype=np.float32)
    genes = pd.DataFrame(index=[*other.var_names, "x", "y", "z"])
    more = ad.AnnData(np.hstack([other.X, strangers]), other.obs, genes)
    pd.testing.assert_frame_equal(model.predict(more, soft=True), expected)


@pytest.fixture(scope="module")
def many():
    """60 genes, of which every third varies between types; the others are Poisson noise."""
    rng = np.random.default_rng(0)
    adata = simulated(n=240)
    x = rng.poisson(8, size=(240, 60)).astype(np.float32)
    x[:, ::3] = adata.X
    obs = adata.obs.assign(batch=np.resize(["one", "two", "two"], 240))
    cells = ad.AnnData(csr_matrix(x), obs)
    cells.var_names = [f"gene{i}" for i in range(60)]
    return cells


@pytest.mark.parametrize("keys", [{}, {"batch_key": "batch"}], ids=str)
def test_the_most_variable_genes_are_read(tmp_path, many, keys):
    """The AnnData keeps all; new cells with all genes, in another order, are read by name."""
    adata = many.copy()
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", n_top_genes=12, **keys)
    assert adata.shape == (240, 60) and not list(adata.var)
    model = SCANVI(adata, **SMALL).train(1, progress_bar=False)
    chosen = list(model.fields.genes)
    assert len(chosen) == 12
    # Drawn without a look at the counts, 4 would be right, and 9 with probability 0.0013.
    assert len(set(chosen) & {f"gene{i}" for i in range(0, 60, 3)}) >= 9
    assert chosen == sorted(chosen, key=list(adata.var_names).index)
    x = model._data[np.arange(240)].x
    np.testing.assert_array_equal(x, many[:, chosen].X.toarray())
    expected = model.predict(soft=True)
    pd.testing.assert_frame_equal(model.predict(many[:, ::-1].copy(), soft=True), expected)
    model.save(tmp_path / "model")
    again = SCANVI.load(tmp_path / "model", many.copy())
    pd.testing.assert_frame_equal(again.predict(soft=True), expected)
    mapped = SCANVI.load_query_data(many.copy(), model)
    pd.testing.assert_frame_equal(mapped.predict(soft=True), expected)
    assert len(model.get_normalized_expression().columns) == 12


def test_more_genes_than_there_are_is_all_of_them(many):
    assert list(variable_genes(many.X, np.zeros(240), 100)) == list(range(60))
    with pytest.raises(InputError, match="n_top_genes=0, expected an integer"):
        SCANVI.setup_anndata(many.copy(), "cell_type", "Unknown", n_top_genes=0)


def test_cells_without_counts_in_the_chosen_genes(many):
    """What helps is not to drop cells without any counts: they have some."""
    adata = many.copy()
    dense = adata.X.toarray()
    dense[5, ::3] = 0
    adata.X = csr_matrix(dense)
    with pytest.raises(InputError, match=r"\(cell5\) in the 12 genes.*raise n_top_genes, or drop"):
        SCANVI.setup_anndata(adata, "cell_type", "Unknown", n_top_genes=12)
    assert not adata.uns


def test_a_batch_of_few_cells(many):
    batch = np.zeros(240, dtype=int)
    batch[:2] = 1
    assert len(variable_genes(many.X, batch, 12)) == 12


# ---- what a question reads ----------------------------------------------------------------------


def test_columns_that_are_not_read_are_not_checked():
    """Labels and batches never seen, missing values, no columns at all."""
    adata = simulated()
    adata.obs["batch"] = ["one", "two"] * 60
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key="batch")
    model = SCANVI(adata, **SMALL).train(1, progress_bar=False)
    expected = model.predict(soft=True)
    latent = model.get_latent_representation()
    for columns in ({"cell_type": "new"}, {"batch": "new"}, {"cell_type": None, "batch": None}):
        other = simulated()
        other.obs = adata.obs.assign(**columns)
        pd.testing.assert_frame_equal(model.predict(other, soft=True), expected)
        np.testing.assert_array_equal(model.get_latent_representation(other), latent)
        assert model.annotate(other) is other
    with pytest.raises(InputError, match=r"not seen \(new\)"):
        model.predict(simulated_with(adata, cell_type="new"), keep_observed=True)
    for ask in (model.get_normalized_expression, model.get_elbo, model.get_marginal_ll):
        with pytest.raises(InputError, match=r"batches that the model has not seen \(new\)"):
            ask(simulated_with(adata, batch="new"))
    with pytest.raises(InputError, match=r"batches that the model has not seen \(new\)"):
        model.predict(simulated_with(adata, batch="new"), method="bayes")
    assert np.isfinite(model.get_elbo(simulated_with(adata, cell_type="new")))


def test_an_encoder_that_sees_batches_reads_them():
    adata = simulated()
    adata.obs["batch"] = ["one", "two"] * 60
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key="batch")
    model = SCANVI(adata, **SMALL, encode_covariates=True).train(1, progress_bar=False)
    for ask in (model.predict, model.get_latent_representation, model.annotate):
        with pytest.raises(InputError, match=r"batches that the model has not seen \(new\)"):
            ask(simulated_with(adata, batch="new"))


def simulated_with(adata: ad.AnnData, **columns) -> ad.AnnData:
    """The same cells with other columns."""
    other = simulated()
    other.obs = adata.obs.assign(**columns)
    return other


def test_two_groups_do_not_mind_cells_of_none():
    adata = simulated()
    adata.obs["group"] = adata.obs["truth"].replace({"NK": None})
    model = small_model(adata).train(1, progress_bar=False)
    table = model.differential_expression(
        groupby="group", group1="B", group2="T", n_samples_overall=10, silent=True
    ).loc[adata.var_names]
    for column, name in (("raw_mean1", "B"), ("raw_mean2", "T")):
        expected = adata.X[adata.obs["truth"] == name].mean(0)
        np.testing.assert_allclose(table[column], expected, rtol=1e-6)
    with pytest.raises(
        InputError, match="40 cells, which are then in no group and not in the rest"
    ):
        model.differential_expression(groupby="group", group1="B")
