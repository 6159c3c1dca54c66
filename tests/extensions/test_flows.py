"""Flows of zuko: densities that integrate to 1 on a grid, and starts equal to the default."""

import importlib
import sys
from functools import partial

import pytest
import torch
from zuko.flows import MAF, NSF

from pyro_scanvi import SCANVAE
from pyro_scanvi.extensions import LearnedFrequencies
from pyro_scanvi.extensions.flows import FlowPosterior, FlowPrior
from pyro_scanvi.testing import check_model
from tests.examples import SIZES, random_cells

coupled = partial(NSF, transforms=2, passes=2, bins=4, hidden_features=(8,))


def make(kind, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**(SIZES | arguments)).eval()


def moved(vae, part):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in vae.get_submodule(part).parameters():
            p += 0.2 * torch.randn(p.shape)
    return vae


class Flows(FlowPrior, FlowPosterior, LearnedFrequencies):
    """A flow before and one behind, beside another extension."""


def test_they_are_models():
    affine = partial(MAF, transforms=1, hidden_features=(8,))
    flows = {"prior_flow": affine, "posterior_flow": coupled}
    check_model(Flows, encode_covariates=True, use_observed_lib_size=True, **flows)


def test_new_flows_are_the_default():
    plain, vae = make(SCANVAE), make(Flows)
    cells = random_cells(vae)
    q, default = vae.q_z(cells), plain.q_z(cells)
    z = default.sample((3,))
    torch.testing.assert_close(q.log_prob(z), default.log_prob(z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.latent_point(q), default.mean)
    torch.testing.assert_close(vae.classify(cells.x), plain.classify(cells.x))
    u = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    p = vae.p_u(cells)
    torch.testing.assert_close(p.log_prob(u), plain.p_u(cells).log_prob(u), rtol=1e-4, atol=1e-4)


def grid(centre, half_width, n=161):
    """Points (n * n, 2) about a centre (2,), and the area of each."""
    side = torch.linspace(-1, 1, n)
    points = torch.cartesian_prod(side, side) * half_width + centre
    return points, (2 / (n - 1)) ** 2 * half_width.prod()


@pytest.mark.parametrize("flow", [partial(MAF, transforms=1), coupled])
def test_a_prior_integrates_to_one(flow):
    vae = moved(make(FlowPrior, n_latent=2, prior_flow=flow), "prior_flow")
    points, area = grid(torch.zeros(2), torch.full((2,), 20.0), n=321)
    with torch.no_grad():
        log_p = vae.p_u(random_cells(vae)).log_prob(points)
    assert (log_p.exp().sum() * area).item() == pytest.approx(1, abs=0.02)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(points).sum(-1)
    assert (log_p - standard).abs()[points.norm(dim=-1) < 1].max() > 0.1  # it has moved


def test_a_posterior_integrates_to_one_and_draws_are_of_its_density():
    """Mean and standard deviation of 20,000 draws against the grid: 5 standard errors, so a right
    flow fails for fewer than one seed in 100,000."""
    vae = moved(make(FlowPosterior, n_latent=2, posterior_flow=coupled), "posterior_flow")
    cells = random_cells(vae, n=1)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        q, (loc, scale) = vae.q_z(cells), vae.z_encoder(cells.x.log1p())
        points, area = grid(loc[0], 8 * scale[0])
        p = q.log_prob(points.unsqueeze(1))[:, 0].exp() * area
        drawn = q.sample((20_000,))[:, 0]
    assert p.sum().item() == pytest.approx(1, abs=0.01)
    mean = (p[:, None] * points).sum(0)
    std = (p[:, None] * (points - mean) ** 2).sum(0).sqrt()
    assert ((drawn.mean(0) - mean).abs() < 5 * std / 20_000**0.5 + 0.01 * std).all()
    torch.testing.assert_close(drawn.std(0), std, rtol=0.05, atol=0)
    assert not torch.allclose(mean, loc[0], atol=0.05)  # it has moved


def test_without_zuko_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    monkeypatch.delitem(sys.modules, "pyro_scanvi.extensions.flows")
    with pytest.raises(ImportError, match=r'pip install "pyro-scanvi\[flows\]"'):
        importlib.import_module("pyro_scanvi.extensions.flows")
