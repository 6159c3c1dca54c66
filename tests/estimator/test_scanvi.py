"""The estimator: what goes in, what comes out, what it refuses."""

import copy
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from pyro_scanvi import SCANVAE, SCANVI, InputError
from tests.examples import SMALL, TYPES, as_they_are, simulated, small_model

# Sums of float32 by other routes: kernels differ by the number of cells, and so does what they
# round. This is 200 times what was seen; the latent points of two cells are 0.01 apart or more.
ROUNDING = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def model(trained):
    """A trained model; the tests only read it."""
    return trained


# ---- labels -------------------------------------------------------------------------------------


def test_labels_of_clear_types_are_recovered(model):
    """Half of the cells have none. Chance is 1/3."""
    hidden = (model.adata.obs["cell_type"] == "Unknown").to_numpy()
    assert hidden.sum() > 40
    correct = model.predict() == model.adata.obs["truth"].to_numpy()
    assert correct[hidden].mean() > 0.9


def test_labels_of_new_cells_are_recovered(model):
    """Drawn from the same types, with no column of labels at all."""
    new = simulated(n=240)[120:].copy()
    truth = new.obs["truth"].to_numpy()
    del new.obs["cell_type"]
    assert (model.predict(new) == truth).mean() > 0.9


def test_permuted_labels_give_permuted_predictions():
    """The names come from the labels, not from the order of the types."""
    adata = simulated()
    names = {"B": "T", "T": "B", "NK": "NK", "Unknown": "Unknown"}
    adata.obs["cell_type"] = adata.obs["cell_type"].map(names)
    arguments = {"batch_size": 32, "plan_kwargs": {"lr": 1e-2}, "train_size": 1}
    model = small_model(adata).train(25, **arguments, progress_bar=False)
    expected = adata.obs["truth"].map(names).to_numpy()
    assert (model.predict() == expected).mean() > 0.9


# ---- predictions --------------------------------------------------------------------------------


def test_hard_and_soft_predictions(model):
    soft = model.predict(soft=True)
    assert isinstance(soft, pd.DataFrame)
    assert soft.shape == (120, 3)
    assert list(soft.columns) == list(TYPES)
    assert list(soft.index) == list(model.adata.obs_names)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    assert (soft.idxmax(axis=1).to_numpy() == model.predict()).all()


@pytest.mark.parametrize("indices", [[3], [5, 2, 2], np.arange(7), np.arange(120) % 2 == 0, [-1]])
def test_indices_select_cells(model, indices):
    soft = model.predict(soft=True)
    expected = soft.iloc[np.arange(120)[indices]]
    found = model.predict(indices=indices, soft=True)
    pd.testing.assert_frame_equal(found, expected, **ROUNDING)
    assert (model.predict(indices=indices) == expected.idxmax(axis=1).to_numpy()).all()
    latent = model.get_latent_representation(indices=indices)
    np.testing.assert_allclose(latent, model.get_latent_representation()[indices], **ROUNDING)


@pytest.mark.parametrize("indices", [[], np.zeros(120, dtype=bool)])
def test_no_indices(model, indices):
    with pytest.raises(InputError, match="selects no cell"):
        model.predict(indices=indices)


def test_batch_size_changes_nothing(model):
    expected = model.predict(soft=True)
    latent = model.get_latent_representation()
    for batch_size in (1, 7, 119, 1000):
        found = model.predict(soft=True, batch_size=batch_size)
        pd.testing.assert_frame_equal(found, expected, **ROUNDING)
        found = model.get_latent_representation(batch_size=batch_size)
        np.testing.assert_allclose(found, latent, **ROUNDING)


def test_sampled_predictions_differ_from_those_at_the_mean(model):
    sampled = model.predict(soft=True, use_posterior_mean=False)
    np.testing.assert_allclose(sampled.sum(axis=1), 1, rtol=1e-5)
    assert not sampled.equals(model.predict(soft=True))


def test_predictions_are_made_in_eval_mode(model):
    """Whatever mode the module is in; it is left in that mode."""
    twin = copy.deepcopy(model)
    twin.module.train()
    before = copy.deepcopy(twin.module.state_dict())
    pd.testing.assert_frame_equal(twin.predict(soft=True), model.predict(soft=True))
    latent = twin.get_latent_representation()
    np.testing.assert_array_equal(latent, model.get_latent_representation())
    assert twin.module.training
    for name, value in twin.module.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_sparse_and_dense_counts_agree(model):
    sparse = simulated()
    sparse.X = csr_matrix(sparse.X)
    found = model.predict(sparse, soft=True)
    pd.testing.assert_frame_equal(found, model.predict(soft=True), **ROUNDING)
    latent = model.get_latent_representation(sparse)
    np.testing.assert_allclose(latent, model.get_latent_representation(), **ROUNDING)


def test_known_labels_are_not_read_by_predictions(model):
    other = simulated()
    other.obs["cell_type"] = "T"
    pd.testing.assert_frame_equal(model.predict(other, soft=True), model.predict(soft=True))


def test_latent_representation(model):
    latent = model.get_latent_representation()
    assert latent.shape == (120, 4) and latent.dtype == np.float32
    simplex = as_they_are(small_model(simulated(), latent_distribution="ln"))
    simplex = simplex.get_latent_representation()
    np.testing.assert_allclose(simplex.sum(1), 1, rtol=1e-5)


# ---- annotate -----------------------------------------------------------------------------------


def test_annotate(model, tmp_path):
    adata = model.annotate()
    assert adata is model.adata
    assert (adata.obs["scanvi_prediction"].to_numpy() == model.predict()).all()
    assert list(adata.obs["scanvi_prediction"].cat.categories) == list(TYPES)
    soft = adata.obsm["scanvi_probabilities"]
    pd.testing.assert_frame_equal(soft, model.predict(soft=True))
    np.testing.assert_array_equal(adata.obs["scanvi_confidence"], soft.max(axis=1))
    np.testing.assert_array_equal(adata.obsm["X_scanvi"], model.get_latent_representation())
    record = adata.uns["pyro_scanvi"]
    assert record["n_epochs"] == 25 and record["seed"] == 0
    assert record["settings"]["model"] == {name: str(value) for name, value in SMALL.items()}
    last = model.history.query("split == 'validation'").iloc[-1]
    assert record["final_losses"]["validation"]["elbo"] == last["elbo"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert SCANVI(ad.read_h5ad(tmp_path / "cells.h5ad")).fields.labels_key == "cell_type"


def test_annotate_other_cells(model):
    new = simulated()[:10].copy()
    assert model.annotate(new) is new
    assert (new.obs["scanvi_prediction"].to_numpy() == model.predict(new)).all()


def test_annotate_before_training():
    assert as_they_are(small_model(simulated())).annotate().uns["pyro_scanvi"]["n_epochs"] == 0


# ---- setup --------------------------------------------------------------------------------------


def test_every_column_reaches_the_model():
    adata = simulated()
    rng = np.random.default_rng(0)
    adata.obs["batch"] = rng.choice(["one", "two"], 120)
    adata.obs["donor"] = rng.choice(["a", "b", "c"], 120)
    adata.obs["age"] = rng.normal(size=120)
    adata.obs["size"] = adata.X.sum(1)
    adata.layers["counts"], adata.X = adata.X, np.log1p(adata.X)
    SCANVI.setup_anndata(
        adata,
        "cell_type",
        "Unknown",
        layer="counts",
        batch_key="batch",
        size_factor_key="size",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
    )
    model = SCANVI(adata, n_hidden=8, n_latent=4, encode_covariates=True)
    vae = model.module
    sizes = (vae.n_input, vae.n_batch, vae.n_labels, vae.n_cats_per_cov, vae.n_continuous_cov)
    assert sizes == (20, 2, 3, (3,), 1)
    assert vae.use_size_factor_key
    model.train(1, progress_bar=False)
    before = model.predict(soft=True)
    for key, value in (("batch", "one"), ("donor", "b"), ("age", 3.0)):
        new = adata.copy()
        new.obs[key] = value
        assert not np.allclose(model.predict(new, soft=True), before), key


def test_defaults_for_few_labels(tmp_path):
    """Of the estimator, not of SCANVAE; a folder that does not name them means those of SCANVAE."""
    adata = simulated()
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    vae = SCANVI(adata).module
    assert vae.n_latent == 20 and vae.dropout_rate == 0.5 and not vae.classifier.hidden.layers
    own = {"n_latent": 10, "dropout_rate": 0.1, "linear_classifier": False}
    model = as_they_are(SCANVI(adata, **own))
    assert model.module.state_dict().keys() == SCANVAE(**model.fields.sizes()).state_dict().keys()
    model.vae_arguments = {}
    model.save(tmp_path / "model")
    again = SCANVI.load(tmp_path / "model", adata)
    assert again.predict(soft=True).equals(model.predict(soft=True))
    query = SCANVI.load_query_data(adata, tmp_path / "model")
    assert query.predict(soft=True).equals(model.predict(soft=True))


def test_latent_library_takes_its_prior_from_the_data():
    model = small_model(simulated(), use_observed_lib_size=False)
    log_library = np.log(model.adata.X.sum(1))
    found = model.module.library_log_means.item(), model.module.library_log_vars.item()
    np.testing.assert_allclose(found, (log_library.mean(), log_library.var()), rtol=1e-5)


def test_deepcopy_and_pickle(model):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        pd.testing.assert_frame_equal(twin.predict(soft=True), model.predict(soft=True))
        assert twin.train(1, progress_bar=False).n_epochs_trained == 26
    assert model.n_epochs_trained == 25


# ---- errors -------------------------------------------------------------------------------------


def test_not_set_up():
    with pytest.raises(InputError, match="not been set up.*setup_anndata"):
        SCANVI(simulated())


def test_unknown_arguments_name_the_nearest(model):
    with pytest.raises(TypeError, match="'n_hiden'.*did you mean 'n_hidden'"):
        small_model(simulated(), n_hiden=8)
    with pytest.raises(TypeError, match="'n_input' is given by the data"):
        small_model(simulated(), n_input=20)
    message = "'classification_rate'.*did you mean 'classification_ratio'"
    with pytest.raises(TypeError, match=message):
        model.train(1, plan_kwargs={"classification_rate": 1})


@pytest.mark.parametrize("train_size", [0, -0.1, 1.1])
def test_bad_train_size(model, train_size):
    with pytest.raises(InputError, match="expected a share in .0, 1."):
        model.train(1, train_size=train_size)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"max_epochs": -1}, {"max_epochs": 1.5}])
def test_bad_sizes(model, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.*expected an integer"):
        model.train(**arguments)


def test_a_refused_call_leaves_the_model_as_it_was(model):
    before = model.history.copy(), dict(model.training_settings)
    for arguments in ({"train_size": 2}, {"early_stopping": True, "train_size": 1}):
        with pytest.raises(InputError):
            model.train(1, **arguments)
    assert model.history.equals(before[0])
    assert model.training_settings == before[1]


def test_changed_genes(model):
    adata = simulated()
    with pytest.raises(InputError, match="1 of 20 are missing .gene19., 0 are new"):
        model.predict(adata[:, :19].copy())
    adata.var_names = ["new", *adata.var_names[1:]]
    with pytest.raises(InputError, match="1 of 20 are missing .gene0., 1 are new .new."):
        model.annotate(adata)


def test_genes_changed_after_setup():
    adata = simulated()
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    with pytest.raises(InputError, match="genes differ"):
        SCANVI(adata[:, :10].copy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_plan_of_no_numbers_is_refused(value):
    model = small_model(simulated())
    with pytest.raises(InputError, match="classification_ratio"):
        model.train(max_epochs=1, plan_kwargs={"classification_ratio": value})


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="seed=-1"):
        small_model(simulated(), seed=-1)
    with pytest.raises(ValueError, match="seed=-2"):
        small_model(simulated()).train(1, seed=-2)


def test_labels_are_not_replaced_by_predictions():
    adata = simulated()
    adata.obs["scanvi_prediction"] = adata.obs["cell_type"]
    with pytest.raises(InputError, match="copy it to a column of another name"):
        SCANVI.setup_anndata(adata, "scanvi_prediction", "Unknown")


def test_annotations_of_clashing_labels_can_be_stored(tmp_path):
    """A file takes a slash for a path: "T/NK" cannot stand beside "T"."""
    adata = simulated()
    names = dict(zip(TYPES, ["B", "T/NK", "T"], strict=True))
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace(names)
    model = as_they_are(small_model(adata))
    with pytest.warns(UserWarning, match="a file takes other names"):
        model.annotate()
    assert list(adata.obsm["scanvi_probabilities"]) == ["B", "T", "T|NK"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert list(again.obsm["scanvi_probabilities"]) == ["B", "T", "T|NK"]
    assert list(again.obs["scanvi_prediction"].cat.categories) == ["B", "T", "T/NK"]
