"""Posteriors of z with correlations: equal to the default at the start, to scipy elsewhere."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from pyro_scanvi import SCANVAE, InputError
from pyro_scanvi.extensions import (
    DirichletFrequencies,
    FrequenciesOfBatch,
    FullCovariancePosterior,
    LowRankPosterior,
    MixturePrior,
    VampPrior,
)
from pyro_scanvi.testing import check_model
from tests.examples import SIZES, random_cells


def make(kind, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**SIZES, **arguments).eval()


def moved(vae, part):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in vae.get_submodule(part).parameters():
            p += torch.randn(p.shape)
    return vae


class Combined(MixturePrior, FullCovariancePosterior, FrequenciesOfBatch):
    """A prior, a guide and label frequencies in one."""


class Another(VampPrior, LowRankPosterior, DirichletFrequencies):
    """The others, in one."""


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Combined, {"n_components": 3, "spread": 0.5, "dispersion": "gene-label"}),
        (Another, {"n_pseudo": 5, "rank": 3, "n_layers": 0, "encode_covariates": True}),
    ],
)
def test_several_extensions_are_one_model(kind, arguments):
    """Each is a model, and so are they together."""
    check_model(kind, **arguments)


def test_a_new_full_covariance_is_the_default():
    plain, vae = make(SCANVAE), make(FullCovariancePosterior)
    cells = random_cells(vae)
    q, default = vae.q_z(cells), plain.q_z(cells)
    z = default.sample((3,))
    torch.testing.assert_close(q.log_prob(z), default.log_prob(z))
    torch.testing.assert_close(q.covariance_matrix, torch.diag_embed(default.variance))


def test_a_full_covariance_is_the_square_of_its_factor():
    vae = moved(make(FullCovariancePosterior), "z_below")
    cells = random_cells(vae, n=3)
    q = vae.q_z(cells)
    z = q.sample()
    with torch.no_grad():
        hidden = vae.z_encoder.hidden(cells.x.log1p())
        loc, scale = vae.z_encoder(cells.x.log1p())
        below = vae.z_below(hidden)
    for i in range(3):
        t = np.eye(4)
        t[np.tril_indices(4, -1)] = below[i]
        factor = scale[i].numpy()[:, None] * t
        expected = multivariate_normal(loc[i].numpy(), factor @ factor.T).logpdf(z[i].numpy())
        assert q.log_prob(z)[i].item() == pytest.approx(expected, rel=1e-4)


def test_a_low_rank_starts_near_the_default_and_is_what_it_says():
    plain, vae = make(SCANVAE), make(LowRankPosterior)
    cells = random_cells(vae, n=3)
    default = plain.q_z(cells)
    near = torch.distributions.MultivariateNormal(
        default.mean, scale_tril=torch.diag_embed(default.stddev)
    )
    assert (torch.distributions.kl_divergence(vae.q_z(cells), near) < 0.05).all()
    q = moved(vae, "z_factor").q_z(cells)
    z = q.sample()
    factor = vae.z_factor(vae.z_encoder.hidden(cells.x.log1p())).reshape(3, 4, 2)
    for i, f in enumerate(factor.detach().double().numpy()):
        s = np.diag(default.stddev[i].detach().double().numpy())
        exact = multivariate_normal(default.mean[i].detach(), s @ (np.eye(4) + f @ f.T) @ s)
        assert q.log_prob(z)[i].item() == pytest.approx(exact.logpdf(z[i].numpy()), rel=1e-3)


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(InputError, match="rank=0"):
        make(LowRankPosterior, rank=0)


def test_one_dimension_has_nothing_to_covary_with():
    with pytest.raises(InputError, match="n_latent=1"):
        FullCovariancePosterior(n_input=5, n_labels=2, n_latent=1)
