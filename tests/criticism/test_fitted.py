"""Calibration of fits: frequencies of labels with a Dirichlet posterior, known in closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyro.distributions import Dirichlet
from scipy.stats import binom
from torch.distributions import kl_divergence

from pyro_scanvi import SCANVAE, InputError
from pyro_scanvi.criticism.fitted import (
    FitGuide,
    calibration_of_fits,
    noisy_labels,
    parameters_of_guide,
)
from pyro_scanvi.model.label_noise import FixedNoise, LabelSizes
from tests.criticism.examples import Frequencies, conjugate

FALSE_ALARM = 0.01
N = 20
RUN = {"n_cells": N, "n_labelled": N, "library": 1.0, "n_draws": 49, "progress_bar": False}


def numbers(cells):
    return torch.bincount(cells.label[cells.labelled], minlength=3)


def exact(vae, cells):
    with torch.no_grad():
        vae.log_concentration.copy_((2.0 + numbers(cells)).log())
    return vae


def log_likelihood(shared, cells):
    return (shared["pi"].log() * numbers(cells)).sum(-1)


def failing(found):
    table = found.test(FALSE_ALARM)
    return set(table.loc[table["fails"], "quantity"])


def test_the_exact_posterior_passes():
    ranked = {"quantities": {"log likelihood": log_likelihood}, "n_simulations": 60, "seed": 0}
    found = calibration_of_fits(conjugate(Frequencies), exact, **RUN, **ranked)
    assert failing(found) == set()
    assert set(found.ranks["quantity"]) == {"pi[0]", "pi[1]", "pi[2]", "log likelihood"}


def test_a_fit_that_does_nothing_is_seen_by_a_quantity_of_the_data_alone():
    ranked = {"quantities": {"log likelihood": log_likelihood}, "n_simulations": 60, "seed": 0}
    found = calibration_of_fits(conjugate(Frequencies), lambda vae, _: vae, **RUN, **ranked)
    assert failing(found) == {"log likelihood"}


def test_a_fit_that_counts_each_cell_twice_fails():
    def twice(vae, cells):
        with torch.no_grad():
            vae.log_concentration.copy_((2.0 + 4 * numbers(cells)).log())
        return vae

    found = calibration_of_fits(conjugate(Frequencies), twice, n_simulations=60, seed=0, **RUN)
    assert failing(found) >= {"pi[0]"}


def test_the_guide_is_fitted_to_the_posterior():
    """The minimum of its ELBO is the posterior: the KL from it falls to a third on the way."""
    vae = conjugate(Frequencies)
    cells = replace(vae.unseen(N, library=1.0), label=torch.arange(N) % 4 % 3)
    posterior = Dirichlet(2.0 + numbers(cells))
    before = kl_divergence(vae.q_shared()["pi"], posterior)
    torch.manual_seed(0)
    FitGuide(n_steps=40, lr=0.1)(vae, cells)
    assert kl_divergence(vae.q_shared()["pi"], posterior) < before / 3


def test_the_guide_alone_is_fitted():
    vae = conjugate(Frequencies)
    free = parameters_of_guide(vae, vae.unseen(4, library=1.0))
    assert any(p is vae.log_concentration for p in free)
    vae = SCANVAE(n_input=4, n_labels=2, n_latent=2, n_hidden=4).eval()
    free = {id(p) for p in parameters_of_guide(vae, vae.unseen(4, library=1.0))}
    names = {n.partition(".")[0] for n, p in vae.named_parameters() if id(p) in free}
    assert names == {"z_encoder", "u_encoder", "classifier"}


def test_labels_are_given_as_the_noise_says():
    matrix = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]])
    vae = conjugate()
    vae.label_noise = FixedNoise(LabelSizes(3, 1), matrix)
    n = 3000
    y = torch.eye(3)[torch.arange(n) % 3]
    torch.manual_seed(0)
    label = noisy_labels(vae, y, vae.unseen(n, library=1.0)).reshape(-1, 3).numpy()
    for k in range(3):
        found = np.bincount(label[:, k], minlength=3)
        low, high = binom.ppf([[0.0005], [0.9995]], n // 3, matrix[k].numpy())  # 9 of them
        assert (low <= found).all() and (found <= high).all()


def test_a_model_without_shared_sites_is_refused():
    with pytest.raises(InputError, match="Conjugate has no site that all cells share"):
        calibration_of_fits(conjugate(), FitGuide(), n_cells=3)
