"""What is asked of a trained model: latents, expression, draws, correlations, bounds."""

import copy
import tracemalloc
import weakref

import anndata as ad
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch.distributions import kl_divergence, normal

from pyro_scanvi import SCANVAE, SCANVI, InputError, SemiSupervisedELBO
from pyro_scanvi.data.minibatches import CellData
from pyro_scanvi.model.likelihoods import GeneLikelihood
from pyro_scanvi.posterior import correlation, draws
from tests.examples import as_they_are, simulated, small_model

N, G, K = 60, 20, 4
BATCHES = ("one", "two", "six")
KINDS = {
    "zinb": {},
    "nb": {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    "poisson": {"gene_likelihood": "poisson"},
    "labels": {"dispersion": "gene-label"},
    "library": {"use_observed_lib_size": False},
    "covariates": {"encode_covariates": True},
    "softmax": {"latent_distribution": "ln"},
}


def batched(n: int = N) -> ad.AnnData:
    """Cells of three types in three batches, half of them unlabelled."""
    adata = simulated(n)
    adata.obs["batch"] = np.array(BATCHES)[np.random.default_rng(1).integers(3, size=n)]
    return adata


def model_of(adata: ad.AnnData, **arguments) -> SCANVI:
    """A small model of cells in batches; batch norm has seen none of them."""
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key="batch")
    return SCANVI(adata, **({"n_hidden": 16, "n_latent": K} | arguments))


def certain(model: SCANVI) -> SCANVI:
    """A copy whose q(z | x) has next to no variance."""
    model = copy.deepcopy(model)
    model.module.z_encoder.var_eps = 1e-20
    with torch.no_grad():
        model.module.z_encoder.variance.weight.zero_()
        model.module.z_encoder.variance.bias.fill_(-50.0)
    return model


@pytest.fixture(scope="module")
def models():
    """One of each kind, trained for an epoch; the tests only read them."""
    return {k: model_of(batched(), **v).train(1, progress_bar=False) for k, v in KINDS.items()}


@pytest.fixture(scope="module")
def model(models):
    return models["zinb"]


@pytest.fixture
def one_noise(monkeypatch):
    """Every reparametrised Normal takes the same noise in every cell: from -1 to 1 along K."""

    def noise(shape, dtype, device):
        return torch.linspace(-1, 1, shape[-1], dtype=dtype).expand(shape)

    monkeypatch.setattr(normal, "_standard_normal", noise)


def tensors(model: SCANVI) -> dict[str, torch.Tensor]:
    cells = model._data[np.arange(len(model._data))]
    return {"x": cells.x, "batch": cells.batch, "label": cells.label, "cells": cells}


def decoded(model: SCANVI, batch: np.ndarray | None = None, size: float = 1.0):
    """p(x | z) at the mean of q(z | x), by the interface of scvi-tools."""
    given = tensors(model)
    codes = given["batch"] if batch is None else torch.as_tensor(batch)
    with torch.no_grad():
        z = model.module.inference(given["x"], given["batch"])["qz"].mean
        library = torch.full((len(z), 1), float(np.log(size)))
        return model.module.generative(z, library, codes, y=given["label"].clamp(min=0))["px"]


# ---- every method -------------------------------------------------------------------------------

METHODS = {
    "latent mean": lambda m, **a: m.get_latent_representation(**a),
    "latent sample": lambda m, **a: m.get_latent_representation(give_mean=False, **a),
    "latent moments": lambda m, **a: m.get_latent_representation(return_dist=True, **a),
    "expression": lambda m, **a: m.get_normalized_expression(n_samples=3, **a),
    "expression as of batches": lambda m, **a: m.get_normalized_expression(
        transform_batch=["one", "two"], n_samples=2, return_mean=False, **a
    ),
    "expression overall": lambda m, **a: m.get_normalized_expression(n_samples_overall=7, **a),
    "parameters": lambda m, **a: m.get_likelihood_parameters(n_samples=2, **a),
    "library": lambda m, **a: m.get_latent_library_size(give_mean=False, **a),
    "predictive": lambda m, **a: m.posterior_predictive_sample(n_samples=2, **a),
    "pearson": lambda m, **a: m.get_feature_correlation_matrix(correlation_type="pearson", **a),
    "spearman": lambda m, **a: m.get_feature_correlation_matrix(**a),
    "elbo": lambda m, **a: m.get_elbo(**a),
    "elbo of cells": lambda m, **a: m.get_elbo(return_mean=False, feed_labels=True, **a),
    "reconstruction": lambda m, **a: m.get_reconstruction_error(**a),
}


def flattened(answer) -> np.ndarray:
    """All numbers of an answer."""
    parts = answer.values() if isinstance(answer, dict) else answer
    parts = parts if isinstance(answer, dict | tuple) else [answer]
    return np.concatenate([np.ravel(np.asarray(p, dtype=float)) for p in parts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_moves_nothing(models, method, kind):
    """Not a bit of the state dict, the mode, a gradient, or with a seed torch's generator."""
    model = copy.deepcopy(models[kind])
    model.module.train()
    state, generator = copy.deepcopy(model.module.state_dict()), torch.get_rng_state()
    answer = flattened(METHODS[method](model, seed=3, batch_size=25))
    assert np.isfinite(answer).all()
    assert model.module.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in model.module.parameters())
    model.module.eval()
    np.testing.assert_array_equal(flattened(METHODS[method](model, seed=3, batch_size=25)), answer)


EXACT = ("latent mean", "latent moments")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in EXACT])
def test_seeds_matter(models, method):
    model = models["library"]
    one, two = (flattened(METHODS[method](model, seed=s)) for s in (0, 1))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("method", METHODS)
def test_one_minibatch_lives_at_a_time(model, method, monkeypatch):
    """Of 12 that are read; the one before the last may not be collected yet."""
    alive, most, read = weakref.WeakSet(), [], CellData.__getitem__

    def watched(self, positions):
        cells = read(self, positions)
        assert len(cells) <= 5
        alive.add(cells.x)
        most.append(len(alive))
        return cells

    monkeypatch.setattr(CellData, "__getitem__", watched)
    METHODS[method](model, batch_size=5)
    assert len(most) >= (2 if method == "expression overall" else 12)
    assert max(most) <= 2


@pytest.mark.parametrize("method", ["expression", "parameters", "predictive"])
def test_many_samples_pass_in_parts(model, method, monkeypatch):
    """No tensor of samples is larger than a pass, and all the samples are there."""
    ask = {
        "expression": lambda n: model.get_normalized_expression(n_samples=n),
        "parameters": lambda n: model.get_likelihood_parameters(n_samples=n, give_mean=True),
        "predictive": lambda n: model.posterior_predictive_sample(n_samples=n),
    }[method]
    drawn, count = [], SCANVAE.count_parameters

    def watched(self, z, *parents):
        drawn.append(z.shape[0])
        return count(self, z, *parents)

    monkeypatch.setattr(SCANVAE, "count_parameters", watched)
    monkeypatch.setattr(draws, "LARGEST_PASS", 3 * N * G + 1)
    ask(10)
    assert drawn == [3, 3, 3, 1]


@pytest.mark.parametrize("n_samples, size, expected", [(5, 10**9, [1] * 5), (5, 1, [5])])
def test_passes(n_samples, size, expected):
    assert draws.passes(n_samples, size) == expected


def test_answers_are_joined_along_any_dimension(model):
    """Against a single minibatch."""
    data, vae = model._data, model.module
    for dim, shape in ((0, (N, 2, 3)), (1, (2, N, 3)), (-1, (2, 3, N))):

        def ask(cells, dim=dim):
            return cells.index.float()[:, None, None].expand(-1, 2, 3).movedim(0, dim)

        found = draws.over_minibatches(vae, data, 7, ask, dim)
        assert found.shape == shape
        np.testing.assert_array_equal(found, draws.over_minibatches(vae, data, N, ask, dim))


# ---- latent space -------------------------------------------------------------------------------


def test_moments_are_those_of_the_normal(model):
    with torch.no_grad():
        q_z = model.module.inference(tensors(model)["x"])["qz"]
    mean, variance = model.get_latent_representation(return_dist=True, batch_size=17)
    np.testing.assert_allclose(mean, q_z.loc, atol=1e-6)
    np.testing.assert_allclose(variance, q_z.scale**2, rtol=1e-4)
    np.testing.assert_array_equal(model.get_latent_representation(batch_size=17), mean)


def test_draws_of_the_latent_are_normal(model):
    """Kolmogorov-Smirnov over 240 draws; false-alarm rate 1e-6."""
    mean, variance = model.get_latent_representation(return_dist=True)
    z = model.get_latent_representation(give_mean=False, seed=0)
    standard = ((z - mean) / np.sqrt(variance)).ravel()
    assert scipy.stats.kstest(standard, "norm").pvalue > 1e-6


def test_mean_of_a_softmax(models):
    """Against draws of numpy; 6 standard errors, false-alarm rate below 1e-6 over 240 figures."""
    model = models["softmax"]
    mean, variance = model.get_latent_representation(return_dist=True)
    noise = np.random.default_rng(0).normal(size=(5000, N, K))
    draws = scipy.special.softmax(mean + np.sqrt(variance) * noise, axis=-1)
    found = model.get_latent_representation(seed=0)
    error = draws.std(0) * np.sqrt(2 / 5000)
    assert (np.abs(found - draws.mean(0)) < 6 * error).all()
    at_mean = scipy.special.softmax(mean, axis=-1)
    assert np.abs(found - at_mean).max() > 6 * error.max()
    sharp = certain(model).get_latent_representation(mc_samples=2)
    np.testing.assert_allclose(sharp, at_mean, rtol=1e-3, atol=1e-5)
    sample = model.get_latent_representation(give_mean=False)
    np.testing.assert_allclose(sample.sum(1), 1, rtol=1e-5)


# ---- expression ---------------------------------------------------------------------------------


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


# ---- library ------------------------------------------------------------------------------------


def test_latent_library(models):
    """The mean of a LogNormal, by quadrature; 100 draws have it, within 6 errors."""
    model = models["library"]
    with torch.no_grad():
        q_l = model.module.inference(tensors(model)["x"])["ql"]
    found = model.get_latent_library_size(batch_size=9)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    values = np.exp(q_l.loc.numpy() + q_l.scale.numpy() * nodes)
    np.testing.assert_allclose(found[:, 0], values @ weights / np.sqrt(2 * np.pi), rtol=1e-4)
    draws = [model.get_latent_library_size(give_mean=False, seed=s) for s in range(100)]
    error = np.std(draws, axis=0) / 10
    assert (np.abs(np.mean(draws, axis=0) - found) < 6 * error).all()


def test_observed_library(model):
    found = model.get_latent_library_size(give_mean=False)
    np.testing.assert_allclose(found, model.adata.X.sum(1, keepdims=True))
    with pytest.raises(InputError, match="not latent.*give_mean=False"):
        model.get_latent_library_size()


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
    """It names what it reads; without a dispersion there is no Gamma noise."""
    likelihood = GeneLikelihood(zero_inflated_poisson, uses_theta=False)
    model = as_they_are(model_of(batched(), gene_likelihood=likelihood))
    assert set(model.get_likelihood_parameters()) == {"mean", "dropout"}
    assert model.posterior_predictive_sample().shape == (N, G)
    assert np.isfinite(model.get_elbo())
    assert model.get_feature_correlation_matrix().notna().all(axis=None)


# ---- correlation --------------------------------------------------------------------------------


def blocks_of(values: np.ndarray, size: int = 7):
    return (values[i : i + size] for i in range(0, len(values), size))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_pearson_of_blocks(offset):
    """Against numpy; sums of squares would leave no digit at this offset."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) * 1e-2 + offset
    found = correlation.pearson(blocks_of(values), *values.shape)
    np.testing.assert_allclose(found, np.corrcoef(values, rowvar=False), atol=1e-9)


def test_spearman_of_blocks(monkeypatch):
    """Against scipy, with many equal values; in passes of 10 rows."""
    rng = np.random.default_rng(0)
    values = np.rint(np.exp(rng.normal(size=(501, 6)) @ rng.normal(size=(6, 6))))
    monkeypatch.setattr(correlation, "LARGEST_PASS", 60)
    found = correlation.spearman(blocks_of(values.astype(np.float32)), *values.shape)
    np.testing.assert_allclose(found, scipy.stats.spearmanr(values).statistic, atol=1e-10)


@pytest.mark.parametrize("correlate", correlation.CORRELATIONS.values())
def test_columns_that_do_not_vary(correlate):
    values = np.random.default_rng(0).normal(size=(20, 3))
    values[:, 1] = 0
    found = correlate(blocks_of(values), 20, 3)
    assert np.isnan(found[1]).all() and np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(np.diag(found)[[0, 2]], 1)


def samples_of(model: SCANVI, batch: int | None = None, **changes) -> np.ndarray:
    """What is correlated, (S N, G)."""
    settings = {"n_samples": 10, "size_factor": 1000.0, "batches": [batch]} | changes
    with draws.seeded(0):
        return correlation.correlation_of_genes(
            model.module, model._data, 64, lambda blocks, *_: np.concatenate([*blocks]), **settings
        )


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_correlation_of_genes(models, kind):
    """Against numpy and scipy on the same samples."""
    model = models[kind]
    samples = samples_of(model).astype(float)
    expected = {
        "pearson": np.corrcoef(samples, rowvar=False),
        "spearman": scipy.stats.spearmanr(samples).statistic,
    }
    for name, matrix in expected.items():
        found = model.get_feature_correlation_matrix(correlation_type=name, seed=0)
        assert list(found.index) == list(found.columns) == list(model.adata.var_names)
        np.testing.assert_allclose(found, matrix, atol=1e-8)


def test_correlations_of_batches_are_averaged(models):
    """Where nothing is drawn."""
    model = certain(models["poisson"])
    singles = [model.get_feature_correlation_matrix(transform_batch=b) for b in BATCHES]
    found = model.get_feature_correlation_matrix(transform_batch=BATCHES)
    np.testing.assert_allclose(found, np.mean(singles, axis=0), atol=1e-4)
    assert not np.allclose(singles[0], singles[1], atol=1e-3)


def test_denoised_samples_are_gamma(models):
    """Mean size rho, variance mean^2 / theta: means of standardised draws and squares.

    Each over 1,200 pairs of cell and gene, within 6 errors: false-alarm rate below 1e-5.
    """
    model = certain(models["nb"])
    px = decoded(model)
    mean, theta = px.mu.numpy() * 500, px.theta.numpy()
    samples = samples_of(model, n_samples=1000, size_factor=500.0).reshape(-1, N, G)
    standard = (samples - mean) / (mean / np.sqrt(theta))
    squares = standard**2
    assert (np.abs(standard.mean(0)) < 6 * standard.std(0) / np.sqrt(1000)).all()
    assert (np.abs(squares.mean(0) - 1) < 6 * squares.std(0) / np.sqrt(1000)).all()


def test_a_poisson_has_no_gamma_noise(models):
    model = certain(models["poisson"])
    samples = samples_of(model, n_samples=1, size_factor=500.0)
    np.testing.assert_allclose(samples, decoded(model).mu * 500, rtol=1e-4)


@pytest.mark.parametrize("name", correlation.CORRELATIONS)
def test_memory_grows_with_genes_only(name, monkeypatch):
    """100 genes: 8 times the rows, which all together would take 2.8 MB more."""
    monkeypatch.setattr(correlation, "LARGEST_PASS", 2**14)
    rng, peaks = np.random.default_rng(0), []
    for n_rows in (1024, 8192):
        blocks = (rng.normal(size=(64, 100)).astype(np.float32) for _ in range(n_rows // 64))
        tracemalloc.start()
        correlation.CORRELATIONS[name](blocks, n_rows, 100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_gene_ranked = 8192 * 64
    assert peaks[1] - peaks[0] < {"pearson": 1e5, "spearman": one_gene_ranked}[name]


def test_the_temporary_file_is_removed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model.get_feature_correlation_matrix()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of(model, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="GiB of disk.*TMPDIR"):
        model.get_feature_correlation_matrix()
    model.get_feature_correlation_matrix(correlation_type="pearson")


# ---- bounds -------------------------------------------------------------------------------------


def by_hand(model: SCANVI, feed_labels: bool) -> tuple[np.ndarray, np.ndarray]:
    """ELBO and reconstruction of each cell, summed over labels, in float64, at `one_noise`."""
    vae = copy.deepcopy(model.module).double()
    given = tensors(model)
    cells, label = given["cells"].to(torch.float64), given["label"]
    cells = SCANVAE.cells(vae, given["x"].double(), given["batch"], label)
    noise = torch.linspace(-1, 1, K, dtype=torch.float64)
    with torch.no_grad():
        q_z = vae.q_z(cells)
        z = q_z.mean + q_z.stddev * noise
        q_y, reconstruction, values = vae.q_y(z).probs, [], []
        library, kl_l = cells.x.sum(-1, keepdim=True), 0.0
        if vae.latent_library:
            q_l, p_l = (d.base_dist.base_dist for d in (vae.q_l(cells), vae.p_l(cells)))
            library = (q_l.mean - q_l.stddev).exp()  # a single dimension has noise -1
            kl_l = kl_divergence(q_l, p_l).sum(-1)
        for code in range(3):
            y = torch.eye(3, dtype=torch.float64)[code].expand(N, 3)
            q_u = vae.q_u(z, y)
            u = q_u.mean + q_u.stddev * noise
            v, m = q_u.variance, q_u.mean
            kl_u = 0.5 * (v + m**2 - 1 - v.log()).sum(-1)
            reconstruction.append(-vae.p_x(z, library, y, cells).log_prob(cells.x))
            values.append(-reconstruction[-1] + vae.p_z(u, y).log_prob(z) - kl_u + np.log(1 / 3))
        reconstruction, values = torch.stack(reconstruction, -1), torch.stack(values, -1)
        elbo = (q_y * (values - q_y.log())).sum(-1)
        if feed_labels:
            at_label = values.gather(1, label.clamp(min=0)[:, None])[:, 0]
            elbo = torch.where(label >= 0, at_label, elbo)
        return elbo - q_z.log_prob(z) - kl_l, (q_y * reconstruction).sum(-1)


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson", "labels", "library", "covariates"])
@pytest.mark.parametrize("feed_labels", [True, False])
def test_elbo_by_hand(models, kind, feed_labels, one_noise):
    """At fixed noise; for any size of minibatch. The mean is that over cells."""
    model = models[kind]
    elbo, reconstruction = by_hand(model, feed_labels)
    for batch_size in (7, None):
        found = model.get_elbo(batch_size=batch_size, return_mean=False, feed_labels=feed_labels)
        assert found.shape == (N,)
        np.testing.assert_allclose(found, elbo, rtol=1e-4)
        found = model.get_reconstruction_error(batch_size=batch_size, return_mean=False)
        np.testing.assert_allclose(found, reconstruction, rtol=1e-4)
    mean = model.get_elbo(feed_labels=feed_labels)
    assert isinstance(mean, float) and mean == pytest.approx(elbo.mean().item(), rel=1e-5)
    mean = model.get_reconstruction_error()
    assert isinstance(mean, float) and mean == pytest.approx(reconstruction.mean().item(), rel=1e-5)


def test_elbo_is_that_of_the_objective(model):
    """The figures of training, at the same draws."""
    vae, cells = model.module, tensors(model)["cells"]
    for feed_labels in (True, False):
        with draws.seeded(4), torch.no_grad():
            objective = SemiSupervisedELBO(vae.q_y, feed_labels=feed_labels)
            loss = objective.parts(vae.model, vae.guide, cells)
        expected = -(loss.loss - 50 * loss.classification[cells.labelled].mean()).item()
        assert model.get_elbo(feed_labels=feed_labels, seed=4) == pytest.approx(expected, rel=1e-4)


def test_training_raises_the_bound(models):
    """By more than the draws of z can: those of eight seeds do not overlap."""
    model = copy.deepcopy(models["nb"])
    before = [(model.get_elbo(seed=s), model.get_reconstruction_error(seed=s)) for s in range(8)]
    model.train(4, batch_size=16, plan_kwargs={"lr": 1e-2}, progress_bar=False)
    after = [(model.get_elbo(seed=s), model.get_reconstruction_error(seed=s)) for s in range(8)]
    assert min(e for e, _ in after) > max(e for e, _ in before)
    assert max(r for _, r in after) < min(r for _, r in before)


# ---- errors -------------------------------------------------------------------------------------

REFUSED = [
    ("get_latent_representation", {"mc_samples": 0}, "mc_samples=0"),
    ("get_latent_representation", {"batch_size": 0}, "batch_size=0"),
    ("get_latent_representation", {"give_mean": False, "seed": -1}, "seed=-1"),
    ("get_latent_representation", {"indices": []}, "selects no cell"),
    ("get_normalized_expression", {"transform_batch": "twoo"}, "'twoo'; did you mean 'two'"),
    ("get_normalized_expression", {"transform_batch": ["one", "xyz"]}, "'xyz'; the model knows"),
    ("get_normalized_expression", {"transform_batch": []}, "transform_batch is empty"),
    ("get_normalized_expression", {"gene_list": ["gene1", "gnee2"]}, "did you mean 'gene2'"),
    ("get_normalized_expression", {"gene_list": ["x", "y", "z"]}, "'x' and 2 more"),
    ("get_normalized_expression", {"gene_list": "gene1"}, "expected a list of names"),
    ("get_normalized_expression", {"library_size": "observed"}, "expected one of 'latent'"),
    ("get_normalized_expression", {"library_size": 0}, "library_size=0"),
    ("get_normalized_expression", {"library_size": float("nan")}, "library_size=nan"),
    ("get_normalized_expression", {"library_size": None}, "expected one of 'latent'"),
    ("get_normalized_expression", {"n_samples": 0}, "n_samples=0"),
    ("get_normalized_expression", {"n_samples": 2.5}, "n_samples=2.5"),
    ("get_normalized_expression", {"n_samples_overall": 0}, "n_samples_overall=0"),
    ("get_normalized_expression", {"n_samples_overall": 3, "n_samples": 2}, "choose one"),
    (
        "get_normalized_expression",
        {"weights": "importance"},
        "'importance' is not supported.*prior of z",
    ),
    (
        "get_normalized_expression",
        {"n_samples": 2, "return_mean": False, "return_numpy": False},
        "three dimensions",
    ),
    ("get_likelihood_parameters", {"n_samples": -1}, "n_samples=-1"),
    ("posterior_predictive_sample", {"n_samples": True}, "n_samples=True"),
    ("posterior_predictive_sample", {"transform_batch": ["one", "two"]}, "in turn"),
    ("posterior_predictive_sample", {"gene_list": []}, "gene_list is empty"),
    ("get_feature_correlation_matrix", {"n_samples": 0}, "n_samples=0"),
    ("get_feature_correlation_matrix", {"batch_size": 0}, "batch_size=0"),
    ("get_feature_correlation_matrix", {"rna_size_factor": -1}, "rna_size_factor=-1"),
    ("get_feature_correlation_matrix", {"correlation_type": "kendall"}, "'pearson', 'spearman'"),
    ("get_feature_correlation_matrix", {"indices": [0], "n_samples": 1}, "no correlation"),
    ("get_elbo", {"batch_size": -3}, "batch_size=-3"),
    ("get_reconstruction_error", {"batch_size": 1.5}, "batch_size=1.5"),
]


@pytest.mark.parametrize("method, arguments, message", REFUSED)
def test_bad_arguments_are_refused(model, method, arguments, message, monkeypatch):
    """Before the model is asked."""
    monkeypatch.setattr(SCANVAE, "q_z", None)
    with pytest.raises(InputError, match=message):
        getattr(model, method)(**arguments)


def test_a_model_without_batches_has_one():
    model = as_they_are(small_model(simulated(N)))
    found = model.get_normalized_expression(transform_batch="all cells", seed=0)
    pd.testing.assert_frame_equal(found, model.get_normalized_expression(seed=0))


def test_numbered_batches_are_found_by_number():
    adata = batched()
    adata.obs["batch"] = adata.obs["batch"].map({"one": 1, "two": 2, "six": 6})
    model = as_they_are(model_of(adata))
    one, text = (model.get_normalized_expression(transform_batch=b, seed=0) for b in (6, "6"))
    pd.testing.assert_frame_equal(one, text)
    assert not one.equals(model.get_normalized_expression(transform_batch=2, seed=0))
