"""Expression, parameters of the likelihood, and draws of counts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pyro_scanvi import SCANVAE, SCANVI
from pyro_scanvi.model.likelihoods import GeneLikelihood
from tests.examples import as_they_are
from tests.posterior.examples import (
    BATCHES,
    KINDS,
    G,
    K,
    N,
    batched,
    certain,
    decoded,
    model_of,
    tensors,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 1e4])
def test_expression_sums_to_the_library_size(models, kind, size):
    found = models[kind].get_normalized_expression(library_size=size, n_samples=2)
    assert isinstance(found, pd.DataFrame)
    assert list(found.index) == list(models[kind].adata.obs_names)
    assert list(found.columns) == list(models[kind].adata.var_names)
    np.testing.assert_allclose(found.sum(axis=1), size, rtol=1e-5)


@pytest.mark.parametrize("kind", ["zinb", "covariates", "softmax"])
def test_expression_of_a_batch(models, kind):
    """As decoding with changed codes, at latents of the cells' own batch; where q(z) is a point."""
    model = certain(models[kind])
    for code, name in enumerate(model.fields.batches):
        expected = decoded(model, np.full(N, code)).mu
        found = model.get_normalized_expression(transform_batch=name, batch_size=13)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    found = model.get_normalized_expression()
    np.testing.assert_allclose(found, decoded(model).mu, rtol=1e-4)
    assert not np.allclose(found, expected, rtol=1e-4)


def test_expression_of_a_batch_is_that_of_cells_moved_there(model):
    """The encoder of this model does not read the batch."""
    moved = model.adata.copy()
    moved.obs["batch"] = "two"
    found = model.get_normalized_expression(transform_batch="two", seed=0)
    pd.testing.assert_frame_equal(found, model.get_normalized_expression(moved, seed=0))


def test_batches_are_averaged_over(model):
    """At the same draws."""
    singles = [model.get_normalized_expression(transform_batch=b, seed=0) for b in BATCHES]
    found = model.get_normalized_expression(transform_batch=BATCHES, seed=0)
    np.testing.assert_allclose(found, np.mean(singles, axis=0), rtol=1e-5)


def test_latent_size_is_the_library(model):
    """Total counts times the proportions, at the same draws."""
    rho = model.get_normalized_expression(seed=0)
    found = model.get_normalized_expression(library_size="latent", seed=0)
    np.testing.assert_allclose(found, rho * model.adata.X.sum(1, keepdims=True), rtol=1e-5)


def test_latent_size_of_a_latent_library(models):
    """Rows sum to draws from q(l | x): their logs have its mean; 5 errors, false alarm 6e-5."""
    model = models["library"]
    drawn = model.get_normalized_expression(
        library_size="latent", n_samples=400, return_mean=False, seed=0
    )
    with torch.no_grad():
        q_l = model.module.inference(tensors(model)["x"])["ql"]
    logs = np.log(drawn.sum(-1)).T
    error = q_l.scale.numpy() / np.sqrt(400)
    assert (np.abs(logs.mean(1, keepdims=True) - q_l.loc.numpy()) < 5 * error).all()


def test_size_factors_multiply_expression():
    adata = batched()
    adata.obs["size"] = np.random.default_rng(0).gamma(4, size=N)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", size_factor_key="size")
    model = as_they_are(SCANVI(adata, n_hidden=8, n_latent=K))
    rho = model.get_normalized_expression(seed=0)
    found = model.get_normalized_expression(library_size="latent", seed=0)
    np.testing.assert_allclose(found, rho.mul(adata.obs["size"], axis=0), rtol=1e-5)
    assert not np.allclose(rho.sum(axis=1), 1, rtol=1e-2)
    sizes = model.get_latent_library_size(give_mean=False)
    np.testing.assert_allclose(sizes[:, 0], adata.obs["size"], rtol=1e-6)


def test_means_are_means_of_samples(model):
    """And samples are arrays of three dimensions, unless there is one."""
    many = model.get_normalized_expression(n_samples=9, return_mean=False, seed=0)
    assert isinstance(many, np.ndarray) and many.shape == (9, N, G)
    mean = model.get_normalized_expression(n_samples=9, return_numpy=True, seed=0)
    np.testing.assert_allclose(mean, many.mean(0), rtol=1e-5)
    one = model.get_normalized_expression(return_mean=False)
    assert isinstance(one, pd.DataFrame) and one.shape == (N, G)


def test_many_draws_of_a_point_are_that_point(model):
    model = certain(model)
    mean = model.get_normalized_expression(n_samples=50, return_numpy=True)
    np.testing.assert_allclose(mean, decoded(model).mu, rtol=1e-4)


def test_draws_overall(model):
    """Of cells with replacement: rows are those of their cells; evenly, false-alarm rate 1e-6."""
    model = certain(model)
    each = model.get_normalized_expression()
    found = model.get_normalized_expression(n_samples_overall=3000, seed=0)
    assert found.shape == (3000, G)
    np.testing.assert_allclose(found, each.loc[found.index], rtol=1e-4)
    counts = found.index.value_counts().reindex(each.index, fill_value=0)
    assert scipy.stats.chisquare(counts).pvalue > 1e-6
    few = model.get_normalized_expression(indices=[3, 8], n_samples_overall=5, weights="uniform")
    assert set(few.index) <= {"cell3", "cell8"}


def test_genes_come_in_the_order_asked_for(model):
    genes = ["gene7", "gene2", "gene11"]
    every = model.get_normalized_expression(seed=0)
    found = model.get_normalized_expression(gene_list=genes, seed=0)
    pd.testing.assert_frame_equal(found, every[genes])
    counts = model.posterior_predictive_sample(gene_list=genes, n_samples=2, seed=0)
    expected = model.posterior_predictive_sample(n_samples=2, seed=0)
    np.testing.assert_array_equal(counts, expected[:, [7, 2, 11]])


def test_cells_are_chosen(model):
    found = certain(model).get_normalized_expression(indices=[5, 2])
    expected = certain(model).get_normalized_expression().iloc[[5, 2]]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)


# ---- parameters of the likelihood ---------------------------------------------------------------


OF_LIKELIHOOD = {
    "zinb": {"mean": "mu", "dispersions": "theta", "dropout": "gate_logits"},
    "nb": {"mean": "mu", "dispersions": "theta"},
    "poisson": {"mean": "mu"},
}


@pytest.mark.parametrize("kind", OF_LIKELIHOOD)
def test_likelihood_parameters(models, kind):
    model = certain(models[kind])
    px = decoded(model, size=1.0)
    total = model.adata.X.sum(1, keepdims=True)
    one = model.get_likelihood_parameters(batch_size=11)
    three = model.get_likelihood_parameters(n_samples=3)
    mean = model.get_likelihood_parameters(n_samples=3, give_mean=True)
    assert set(one) == set(three) == set(mean) == set(OF_LIKELIHOOD[kind])
    for name, attribute in OF_LIKELIHOOD[kind].items():
        expected = getattr(px, attribute).numpy()
        expected = expected * total if name == "mean" else expected
        expected = 1 / (1 + np.exp(-expected)) if name == "dropout" else expected
        assert three[name].shape == (3, N, G)
        for found in (one[name], *three[name], mean[name]):
            np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


def test_dispersions_of_labels(models):
    """Known labels have their own; an unknown one has that of a drawn label."""
    model = models["labels"]
    table = model.module.dispersion.log_theta.detach().exp().numpy()
    found = model.get_likelihood_parameters()["dispersions"]
    label = tensors(model)["label"].numpy()
    np.testing.assert_allclose(found[label >= 0], table[label[label >= 0]], rtol=1e-5)
    unknown = found[label < 0][:, None]
    assert np.isclose(unknown, table, rtol=1e-5).all(-1).any(-1).all()


# ---- posterior predictive -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", OF_LIKELIHOOD)
def test_moments_of_predictive_draws(models, kind):
    r"""Mean (1-h) mu and variance (1-h) mu (1 + mu/theta + h mu); q(z) is a point.

    100 means and 100 variances of 4,000 draws, each within 6 errors as the draws tell them:
    false-alarm rate below 1e-6.
    """
    model = certain(models[kind])
    chosen = {"indices": range(5)}
    p = model.get_likelihood_parameters(**chosen)
    mu, gate, theta = p["mean"], p.get("dropout", 0.0), p.get("dispersions", np.inf)
    mean, variance = (1 - gate) * mu, (1 - gate) * mu * (1 + mu / theta + gate * mu)
    counts = model.posterior_predictive_sample(n_samples=4000, seed=0, **chosen)
    assert counts.shape == (5, G, 4000) and (counts == np.rint(counts)).all()
    assert (np.abs(counts.mean(-1) - mean) < 6 * np.sqrt(variance / 4000)).all()
    squares = (counts - mean[..., None]) ** 2
    error = squares.std(-1) / np.sqrt(4000)
    assert (np.abs(squares.mean(-1) - variance) < 6 * error).all()


def test_one_predictive_draw(model):
    found = model.posterior_predictive_sample(seed=0)
    assert found.shape == (N, G) and found.dtype == np.float32


def test_predictive_draws_of_a_batch(model):
    moved = model.adata.copy()
    moved.obs["batch"] = "two"
    found = model.posterior_predictive_sample(transform_batch="two", seed=0)
    np.testing.assert_array_equal(found, model.posterior_predictive_sample(moved, seed=0))
    assert not np.array_equal(found, model.posterior_predictive_sample(seed=0))


class Threes(SCANVAE):
    """Every count is 3 plus the code of its batch."""

    def p_x(self, z, library, y, cells):
        value = torch.zeros(*z.shape[:-1], self.n_input) + 3 + cells.batch[:, None]
        return dist.Delta(value).to_event(1)


def zero_inflated_poisson(p):
    return dist.ZeroInflatedPoisson(p.mu, gate_logits=p.gate_logits)


def test_an_own_factor_is_drawn_from():
    model = as_they_are(model_of(batched()))
    sizes = model._given_by_data()
    model.module = Threes(**sizes, n_hidden=8, n_latent=K).eval()
    counts = model.posterior_predictive_sample(n_samples=2)
    expected = np.broadcast_to(3 + model._data.batch[:, None, None], (N, G, 2))
    np.testing.assert_array_equal(counts, expected)
    code = list(model.fields.batches).index("two")
    assert (model.posterior_predictive_sample(transform_batch="two") == 3 + code).all()


def test_an_own_likelihood():
    """It tells its mean, and what else it says of itself; genes are correlated over its draws."""
    likelihood = GeneLikelihood(zero_inflated_poisson, uses_theta=False)
    model = as_they_are(model_of(batched(), gene_likelihood=likelihood))
    assert set(model.get_likelihood_parameters()) == {"mean"}
    told = replace(likelihood, parameters=lambda p: {"gate": p.gate_logits.sigmoid()})
    model = as_they_are(model_of(batched(), gene_likelihood=told))
    assert set(model.get_likelihood_parameters()) == {"gate"}
    assert model.posterior_predictive_sample().shape == (N, G)
    assert np.isfinite(model.get_elbo())
    assert model.get_feature_correlation_matrix().notna().all(axis=None)
