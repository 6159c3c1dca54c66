"""The model without u: its p(z | y) is exact, and Bayes' rule that of a sum over a grid."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from pyro_scanvi import SCANVAE, InputError, SemiSupervisedELBO
from pyro_scanvi.extensions import WithoutU
from pyro_scanvi.posterior.importance import log_joint, log_state_density
from pyro_scanvi.testing import check_model
from tests.examples import SIZES, random_cells


@pytest.fixture
def vae():
    """A model of one dimension whose types lie apart."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        vae = WithoutU(**(SIZES | {"n_latent": 1, "n_input": 5})).eval()
        vae.z_decoder.mean.weight.copy_(torch.tensor([[-1.5, 0.0, 1.0]]))
        vae.z_decoder.variance.weight.copy_(torch.tensor([[-1.0, 0.5, 0.0]]))
        vae.x_decoder.hidden.layers[0].linear.weight *= 3
        return vae


def test_it_is_a_model():
    check_model(WithoutU, dispersion="gene-label", use_observed_lib_size=True)


def test_nothing_of_u_is_left(vae):
    whole = SCANVAE(**SIZES)
    assert not any(name.startswith("u_encoder") for name, _ in vae.named_parameters())
    without = WithoutU(**SIZES)
    n_z = sum(p.numel() for p in without.z_decoder.parameters())
    assert n_z == 2 * (3 * 4 + 4)  # mean and variance of 4 dimensions: 3 labels and a bias
    n_old = sum(p.numel() for part in (whole.u_encoder, whole.z_decoder) for p in part.parameters())
    n_all = [sum(p.numel() for p in v.parameters()) for v in (whole, without)]
    assert n_all[0] - n_all[1] == n_old - n_z
    cells = random_cells(without)
    parts = SemiSupervisedELBO(without.q_y).parts(without.model, without.guide, cells)
    assert (parts.kl["u"] == 0).all()


def types(vae):
    """Mean and standard deviation of each type, read off the weights; L."""
    layer = vae.z_decoder
    mean = (layer.mean.weight + layer.mean.bias[:, None])[0]
    variance = (layer.variance.weight + layer.variance.bias[:, None])[0].exp()
    return mean.detach().double().numpy(), variance.sqrt().detach().double().numpy()


def test_the_density_of_a_state_is_exact(vae):
    """Not an estimate: one draw of u, which has no dimension, gives scipy's number."""
    cells = random_cells(vae, n=4)
    z = torch.linspace(-2, 2, 8).reshape(2, 4, 1)
    y = torch.eye(3)[:, None, None].expand(-1, 1, 4, -1)
    with torch.no_grad():
        found = log_state_density(vae, z, y, cells, n_samples=1)
    mean, scale = types(vae)
    expected = norm(mean[:, None, None], scale[:, None, None]).logpdf(z[..., 0].numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bayes_rule_is_the_integral_over_states(vae):
    """p(y) int p(x | z) N(z | mu_y, sigma_y^2) dz, on a grid, against 20,000 draws."""
    cells = random_cells(vae, n=5)
    grid = torch.linspace(-12, 12, 4001)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        log_p = log_joint(vae, cells, n_samples=20_000, n_inner_samples=1)
        z = grid.reshape(-1, 1, 1).expand(-1, 5, -1)
        label = torch.zeros(5, 3)
        log_x = vae.p_x(z, cells.x.sum(-1, keepdim=True), label, cells).log_prob(cells.x)
    mean, scale = types(vae)
    log_z = norm(mean[:, None], scale[:, None]).logpdf(grid.numpy())  # L, S
    joint = log_x.double().numpy()[None] + log_z[..., None] + np.log(24 / 4000) - np.log(3)
    exact = logsumexp(joint, axis=1).T  # N, L
    posterior = np.exp(exact - logsumexp(exact, axis=1, keepdims=True))
    np.testing.assert_allclose(log_p.softmax(-1), posterior, atol=0.02)
    np.testing.assert_allclose(log_p, exact, atol=0.1)
    assert np.ptp(exact, axis=1).max() > 0.3  # the types differ


def test_scvi_tools_has_no_place_for_it(vae):
    with pytest.raises(InputError, match="networks of u"):
        vae.to_scvi_tools()
