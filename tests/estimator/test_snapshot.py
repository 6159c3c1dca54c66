"""What becomes of a model whose AnnData its user goes on to change."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.sparse import csc_matrix, csr_matrix

from pyro_scanvi import SCANVI, InputError
from tests.examples import SMALL, mostly_slow, simulated

MATRICES = {"CSR": csr_matrix, "dense": np.asarray, "CSC": csc_matrix}
PLACES = ("X", "layer", "raw")


def set_up(matrix=csr_matrix, place: str = "X") -> ad.AnnData:
    """Cells with a batch, a covariate and a size factor that numpy could share with a model."""
    adata = simulated()
    adata.obs["batch"] = ["one", "two"] * 60
    adata.obs["age"] = np.arange(120, dtype=np.float32)
    adata.obs["size"] = adata.X.sum(1)
    adata.X = matrix(adata.X)
    if place == "layer":
        adata.layers["counts"] = adata.X.copy()
    if place == "raw":
        adata.raw = adata.copy()
    SCANVI.setup_anndata(
        adata,
        "cell_type",
        "Unknown",
        layer="counts" if place == "layer" else None,
        use_raw=place == "raw",
        batch_key="batch",
        size_factor_key="size",
        continuous_covariate_keys=["age"],
    )
    return adata


def trained(adata: ad.AnnData) -> SCANVI:
    return SCANVI(adata, **SMALL, encode_covariates=True).train(1, progress_bar=False)


def counts_in(adata: ad.AnnData, place: str):
    return {"X": lambda: adata.X, "layer": lambda: adata.layers["counts"]}.get(
        place, lambda: adata.raw.X
    )()


def spoil(matrix) -> None:
    """Other values in the same memory."""
    values = matrix if isinstance(matrix, np.ndarray) else matrix.data
    values[:] = np.log1p(values)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("matrix", mostly_slow(MATRICES.values()), ids=MATRICES)
def test_values_changed_in_place_change_no_answer(matrix, place):
    """Neither counts, nor covariates, nor what training on learns."""
    adata, twin = set_up(matrix, place), trained(set_up(matrix, place))
    model = trained(adata)
    spoil(counts_in(adata, place))
    adata.obs["age"].to_numpy(dtype=np.float32, copy=False)[:] = 0
    adata.obs["size"].to_numpy(dtype=np.float32, copy=False)[:] = 1
    pd.testing.assert_frame_equal(model.predict(soft=True), twin.predict(soft=True))
    assert model.get_elbo(feed_labels=True, seed=0) == twin.get_elbo(feed_labels=True, seed=0)
    groups = {"groupby": "truth", "n_samples_overall": 20, "seed": 0, "silent": True}
    assert model.differential_expression(**groups).equals(twin.differential_expression(**groups))
    model.train(1, progress_bar=False)
    twin.train(1, progress_bar=False)
    assert model.get_elbo(feed_labels=True, seed=0) == twin.get_elbo(feed_labels=True, seed=0)


def test_what_scanpy_users_do_next():
    """Normalise, take the logarithm, keep some genes: all in place."""
    adata, twin = set_up(), trained(set_up())
    model = trained(adata)
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    adata._inplace_subset_var(np.arange(5))
    pd.testing.assert_frame_equal(model.predict(soft=True), twin.predict(soft=True))
    model.annotate()
    np.testing.assert_array_equal(adata.obsm["X_scanvi"], twin.get_latent_representation(seed=0))
    with pytest.raises(InputError, match="genes differ"):
        model.predict(adata)


QUESTIONS = {
    "predict": lambda m: m.predict(),
    "latent": lambda m: m.get_latent_representation(),
    "expression": lambda m: m.get_normalized_expression(),
    "elbo": lambda m: m.get_elbo(),
    "marginal": lambda m: m.get_marginal_ll(n_mc_samples=1),
    "predictive": lambda m: m.posterior_predictive_sample(),
    "differential": lambda m: m.differential_expression(groupby="truth"),
    "annotate": lambda m: m.annotate(),
    "train": lambda m: m.train(1),
}
CHANGES = {
    "fewer": (lambda a: a._inplace_subset_obs(np.arange(120) % 3 > 0), "now it has 80;"),
    "another order": (lambda a: a._inplace_subset_obs(np.arange(120)[::-1]), "120 others"),
    "other names": (lambda a: setattr(a, "obs_names", [f"n{i}" for i in range(120)]), "others"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_other_cells_are_refused(change, message, tmp_path):
    """By every question: an answer would not belong to the cells that it is written beside."""
    model = trained(set_up())
    change(model.adata)
    before = model.adata.copy()
    save = {"save": lambda m: m.save(tmp_path / "model", save_anndata=True)}
    for ask in (QUESTIONS | save).values():
        with pytest.raises(InputError, match=f"has changed since the model was made.*{message}"):
            ask(model)
    assert list(model.adata.obs) == list(before.obs) and not list(model.adata.obsm)
    assert not list(tmp_path.iterdir())
    assert len(model.predict(model.adata)) == model.adata.n_obs  # the cure that it names
    model.save(tmp_path / "model")


def test_groups_added_later_are_compared():
    """A clustering of the latent space comes after training; means are of the right cells."""
    adata = set_up()
    model = trained(adata)
    expected = [simulated().X[adata.obs["truth"] == name].mean(0) for name in ("B", "T")]
    adata.obs["cluster"] = adata.obs["truth"].astype(str)
    spoil(adata.X)
    table = model.differential_expression(
        groupby="cluster", group1="B", group2="T", n_samples_overall=10, silent=True
    ).loc[adata.var_names]
    np.testing.assert_allclose(table["raw_mean1"], expected[0], rtol=1e-6)
    np.testing.assert_allclose(table["raw_mean2"], expected[1], rtol=1e-6)


def test_labels_given_later_are_not_ignored():
    """By what reads labels; what does not goes on."""
    model = trained(set_up())
    model.adata.obs["cell_type"] = model.adata.obs["truth"]
    expected = model.predict(soft=True)
    reading = [
        lambda: model.train(1),
        lambda: model.predict(keep_observed=True),
        lambda: model.get_elbo(feed_labels=True),
    ]
    for ask in reading:
        with pytest.raises(InputError, match=r"obs\['cell_type'\] has changed in .*make a new"):
            ask()
    pd.testing.assert_frame_equal(model.predict(soft=True), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("genes", [20, 5])
def test_the_training_data_are_saved_as_they_were(tmp_path, place, genes):
    """Loaded, they give the answers of the model; the user's AnnData stays as it is."""
    adata = set_up(place=place)
    model = trained(adata)
    expected = model.predict(soft=True)
    spoil(counts_in(adata, place))
    adata._inplace_subset_var(np.arange(genes))
    adata.obsm["X_pca"] = np.ones((120, 2))
    before = adata.copy()
    with pytest.warns(UserWarning, match="have changed since the model was made"):
        model.save(tmp_path / "model", save_anndata=True)
    again = SCANVI.load(tmp_path / "model")
    pd.testing.assert_frame_equal(again.predict(soft=True), expected)
    assert "X_pca" in again.adata.obsm
    np.testing.assert_array_equal(counts_in(adata, place).data, counts_in(before, place).data)


def test_unchanged_training_data_are_saved_as_they_are(tmp_path):
    adata = set_up()
    adata.layers["scaled"] = adata.X * 0.5
    model = trained(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save(tmp_path / "model", save_anndata=True)
    assert "scaled" in SCANVI.load(tmp_path / "model").adata.layers


def test_the_notes_in_uns_are_copied():
    adata = set_up()
    model = trained(adata)
    adata.uns["pyro_scanvi"]["setup"]["classes"][:] = "X"
    assert set(model.predict()) <= {"B", "NK", "T"}
