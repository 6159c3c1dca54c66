"""Latent space and library: means, moments and draws against theory and quadrature."""

import numpy as np
import pytest
import scipy.stats
import torch

from pyro_scanvi import InputError
from tests.posterior.examples import K, N, certain, tensors


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
