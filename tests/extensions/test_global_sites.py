"""Sites that all cells share against exact posteriors, integrals, limits and sums by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyro.distributions import Normal
from scipy.integrate import quad
from scipy.stats import nbinom, norm
from torch.distributions import kl_divergence

from pyro_scanvi import SCANVAE, SCANVI, InputError, SemiSupervisedELBO, testing
from pyro_scanvi.extensions import (
    BatchEffect,
    CovariateGate,
    GlobalTheta,
    HorseshoeWeights,
    NormalWeights,
)
from pyro_scanvi.model.likelihoods import GeneLikelihood, elementwise
from tests.examples import SIZES, as_they_are, random_cells

BATCHED = SIZES | {"n_batch": 3}


class Together(HorseshoeWeights, BatchEffect, GlobalTheta, CovariateGate):
    """Four of them."""


def made(kind, seed=0, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**(BATCHED | arguments)).eval()


def decoded(vae, cells, shared=None, z=None):
    """Expression at a state of each cell."""
    given = vae.at_shared_points(cells) if shared is None else replace(cells, shared=shared)
    z = torch.linspace(-1, 1, len(cells) * vae.n_latent).reshape(len(cells), -1) if z is None else z
    with torch.no_grad():
        return vae.count_parameters(z, torch.ones(len(cells), 1), None, given)


def parts_of(vae, cells, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SemiSupervisedELBO(None).parts(vae.model, vae.guide, cells)


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("check", testing.CHECKS)
def test_several_together_pass_the_checks(check, adata):
    check(testing.Subject(adata, Together))


ALONE = {
    "gamma": (GlobalTheta, {"theta_prior": "gamma", "theta_hyper": (2.0, 0.5)}),
    "weights": (NormalWeights, {}),
    "weights of z": (NormalWeights, {"weights_of": "z"}),
    "horseshoe of z": (HorseshoeWeights, {"weights_of": "z", "use_observed_lib_size": False}),
    "effect beside": (BatchEffect, {"decoder_sees_batch": True}),
}


@pytest.fixture(scope="module")
def adata():
    return testing.random_cells()


@pytest.mark.parametrize("name", ALONE)
def test_each_passes_the_checks(name, adata):
    kind, arguments = ALONE[name]
    for check in testing.CHECKS_OF_TRACES:
        check(testing.Subject(adata, kind, arguments))


@pytest.mark.parametrize("kind", [NormalWeights, HorseshoeWeights, BatchEffect, GlobalTheta])
def test_they_start_as_the_model_without_them(kind):
    """At the medians of their posteriors, where the decoder does not see the batch."""
    vae = made(kind, n_batch=0)
    plain = made(SCANVAE, n_batch=0)
    q = vae.q_shared()
    each = {name: elementwise(d) for name, d in q.items()}
    shared = {name: d.icdf(torch.full(d.batch_shape, 0.5)) for name, d in each.items()}
    cells = random_cells(vae)
    torch.testing.assert_close(decoded(vae, cells, shared).mu, decoded(plain, cells).mu)
    torch.testing.assert_close(decoded(vae, cells, shared).theta, decoded(plain, cells).theta)


def test_draws_are_decoded_one_by_one_as_together():
    """(S, 1, ...) draws, as questions take them, against each of them by itself."""
    vae = made(Together)
    cells = random_cells(vae)
    torch.manual_seed(0)
    drawn = {name: q.sample((4, 1)) for name, q in vae.q_shared().items()}
    z = torch.randn(4, 12, 4)
    at_once = decoded(vae, cells, drawn, z)
    for s in range(4):
        alone = decoded(vae, cells, {n: v[s, 0] for n, v in drawn.items()}, z[s])
        torch.testing.assert_close(at_once.rho[s], alone.rho)
        torch.testing.assert_close(at_once.theta[s, 0], alone.theta)


def test_the_order_of_bases_does_not_matter():
    class One(NormalWeights, BatchEffect, GlobalTheta):
        pass

    class Other(GlobalTheta, BatchEffect, NormalWeights):
        pass

    one, other = made(One), made(Other)
    other.load_state_dict(one.state_dict())
    cells = random_cells(one)
    shared = {name: q.sample() for name, q in one.q_shared().items()}
    for name in ("rho", "theta", "gate_logits"):
        found = [getattr(decoded(vae, cells, shared), name) for vae in (one, other)]
        torch.testing.assert_close(*found)


def test_the_piecewise_interface_decodes_at_their_means():
    vae = made(Together)
    cells = random_cells(vae)
    z, y = torch.randn(12, 4), torch.zeros(12)
    px = vae.generative(z, torch.zeros(12, 1), cells.batch, y=y)["px"]
    torch.testing.assert_close(px.mu, decoded(vae, cells, z=z).rho)
    torch.testing.assert_close(px.theta[0], vae.q_shared()["theta"].mean)


# ---- theta --------------------------------------------------------------------------------------


def without_state(vae):
    """Expression no longer depends on the state of a cell."""
    vae.x_decoder.logits.weight.data.zero_()
    return vae.double().requires_grad_(False)


def fit(vae, cells, learned, n_draws):
    """The posterior of shared sites that maximises the bound of all cells, at the same draws."""
    z = torch.zeros(len(cells), vae.n_latent).double()
    optimiser = torch.optim.LBFGS(learned, max_iter=20, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        torch.manual_seed(0)
        q, p = vae.q_shared(), vae.p_shared()
        shared = {name: d.rsample((n_draws, 1)) for name, d in q.items()}
        p_x = vae.p_x(z, cells.size_factor, None, replace(cells, shared=shared))
        kl = sum(kl_divergence(q[name], p[name]) for name in q)
        bound = p_x.log_prob(cells.x).sum(-1).mean() - kl
        (-bound).backward()
        return -bound

    for parameter in learned:
        parameter.requires_grad_()
    optimiser.step(loss)


def exact_theta(x, mean, prior):
    """Mean and standard deviation of log theta given the counts of a gene, on a grid."""
    grid = np.linspace(-4, 6, 801)
    theta = np.exp(grid)
    log_p = norm(*prior).logpdf(grid)
    log_p += nbinom.logpmf(x[:, None], theta, theta / (theta + mean[:, None])).sum(0)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    loc = (p * grid).sum()
    return loc, math.sqrt((p * (grid - loc) ** 2).sum())


@pytest.mark.parametrize("n", [30, 120])
def test_theta_has_its_exact_posterior(n):
    """Each gene is one integral where expression does not depend on the state."""
    arguments = {"n_input": 3, "n_batch": 1, "gene_likelihood": "nb", "theta_hyper": (0.5, 1.0)}
    vae, rng = without_state(made(GlobalTheta, **arguments)), np.random.default_rng(0)
    cells = random_cells(vae, "all", n=n)
    mean = 60 * decoded(vae, cells, z=torch.zeros(n, 4).double()).rho.numpy()
    x = rng.poisson(rng.gamma(1.5, mean / 1.5))
    sizes = torch.full((n, 1), 60.0, dtype=torch.double)
    cells = replace(cells, x=torch.tensor(x).double(), size_factor=sizes)
    fit(vae, cells, [vae.dispersion.log_theta, vae.theta_log_scale], n_draws=200)
    exact = [exact_theta(x[:, g], mean[:, g], (0.5, 1.0)) for g in range(3)]
    locs, scales = np.array(exact).T
    found = vae.dispersion.log_theta.detach().numpy()
    # 200 draws are off by a fourteenth of a standard deviation; six times that is one in a billion.
    assert (np.abs(found - locs) < 0.42 * scales).all()
    np.testing.assert_allclose(vae.theta_log_scale.exp().detach(), scales, rtol=0.35)
    assert (scales < 4 / math.sqrt(n)).all()


def test_its_kl_is_that_of_normals_of_the_logarithms():
    vae = made(GlobalTheta, theta_hyper=(0.3, 1.5))
    scale, loc = math.exp(-2.0), vae.dispersion.log_theta.detach().numpy()
    kl = np.log(1.5 / scale) + (scale**2 + (loc - 0.3) ** 2) / (2 * 1.5**2) - 0.5
    found = parts_of(vae, random_cells(vae)).kl_shared["theta"].item()
    assert found == pytest.approx(kl.sum(), rel=1e-5)


@pytest.mark.parametrize("arguments", [{"gene_likelihood": "poisson"}, {"dispersion": "gene-cell"}])
def test_a_model_without_theta_of_each_gene_is_refused(arguments):
    with pytest.raises(InputError, match="dispersion='gene'"):
        made(GlobalTheta, **arguments)


# ---- weights ------------------------------------------------------------------------------------


def test_weights_of_p_z_change_p_z_alone():
    vae, plain = made(NormalWeights, weights_of="z"), made(SCANVAE)
    cells = random_cells(vae)
    u, y = torch.randn(12, 4), torch.eye(3)[torch.arange(12) % 3]
    drawn = vae.q_shared()["weights"].sample()
    hidden = plain.z_decoder.hidden(u, y)
    expected = hidden @ drawn.T + plain.z_decoder.mean.bias
    p = vae.p_z(u, y, replace(cells, shared={"weights": drawn}))
    torch.testing.assert_close(p.mean, expected)
    torch.testing.assert_close(p.variance, plain.p_z(u, y, cells).variance)
    torch.testing.assert_close(decoded(vae, cells).rho, decoded(plain, cells).rho)


def test_the_kl_of_weights_is_a_sum_by_hand():
    vae = made(NormalWeights, weight_scale=0.2)
    m, s = vae.x_decoder.logits.weight.detach().double().numpy(), math.exp(-4)
    kl = (np.log(0.2 / s) + (s**2 + m**2) / (2 * 0.2**2) - 0.5).sum()
    found = parts_of(vae, random_cells(vae)).kl_shared["weights"].item()
    assert found == pytest.approx(kl, rel=1e-5)


def test_the_prior_of_weights_is_a_horseshoe():
    """Shares of 200,000 prior draws within some widths, tau left out, against quad.

    A right prior fails for one choice of the seed in a million.
    """
    vae = made(HorseshoeWeights, n_input=100, n_hidden=200)
    torch.manual_seed(0)
    shared = {name: p.sample((10,)) for name, p in vae.p_shared().items()}
    weights = vae.drawn_weights(shared) / shared["weights_global"][:, None, None]
    for width in (0.01, 0.3, 1.0, 5.0, 50.0):

        def inside(scale, width=width):
            return (2 * norm.cdf(width / scale) - 1) * 2 / math.pi / (1 + scale**2)

        share = quad(inside, 0, 1)[0] + quad(inside, 1, math.inf)[0]
        found = (weights.abs() < width).float().mean().item()
        assert abs(found - share) < 5.1 * math.sqrt(share * (1 - share) / weights.numel())


def test_the_global_scale_is_half_cauchy():
    """Its median is the scale; of 4,000 draws a right one is off so far in one of a million."""
    vae = made(HorseshoeWeights, global_scale=0.3)
    torch.manual_seed(0)
    below = (vae.p_shared()["weights_global"].sample((4000,)) < 0.3).float().mean().item()
    assert abs(below - 0.5) < 4.9 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (NormalWeights, {"weights_of": "u"}, "weights_of='u', expected one of 'x', 'z'"),
        (NormalWeights, {"weight_scale": 0.0}, "weight_scale"),
        (HorseshoeWeights, {"global_scale": -1.0}, "global_scale"),
        (BatchEffect, {"effect_scale": 0.0}, "effect_scale"),
        (GlobalTheta, {"theta_hyper": (0.0,)}, "theta_hyper=.*, expected the two parameters"),
        (GlobalTheta, {"theta_hyper": (0.0, -1.0)}, "theta_hyper=.*, expected the two parameters"),
        (GlobalTheta, {"theta_prior": "normal"}, "theta_prior='normal', expected one of"),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, said):
    with pytest.raises(InputError, match=said):
        made(kind, **arguments)


# ---- the effect of a batch ----------------------------------------------------------------------


def test_the_batch_shifts_log_expression_alone():
    """Odds of two genes change by the difference of their effects, and by nothing else."""
    vae = made(BatchEffect)
    cells = random_cells(vae)
    effects = vae.p_shared()["batch_effect"].sample()
    z = torch.randn(12, 4)

    def log_rho(batch):
        moved = replace(cells, batch=torch.full_like(cells.batch, batch))
        rho = decoded(vae, moved, {"batch_effect": effects}, z).rho
        torch.testing.assert_close(rho.sum(-1), torch.ones(12))
        return rho.log()

    change = log_rho(2) - log_rho(0)
    expected = effects[2] - effects[0]
    torch.testing.assert_close(
        (change - change.mean(-1, keepdim=True)), expected.expand(12, -1) - expected.mean()
    )


def normal_of_log(p):
    return Normal(p.mu.log(), 1.0)


def test_its_posterior_is_the_conjugate_one():
    """A Normal likelihood of log expression with unit variance: Normal times Normal."""
    likelihood = GeneLikelihood(normal_of_log, uses_theta=False, uses_gate=False)
    given = {"gene_likelihood": likelihood, "use_size_factor_key": True, "effect_scale": 0.8}
    vae = without_state(made(BatchEffect, n_input=4, n_batch=2, **given))
    cells = random_cells(vae, "all", n=30)
    none = {"batch_effect": torch.zeros(2, 4, dtype=torch.double)}
    rho = decoded(vae, cells, none, torch.zeros(30, 4).double()).rho
    batch = torch.nn.functional.one_hot(cells.batch, 2).double()
    precision = (1 / 0.8**2 + batch.sum(0)[:, None]).expand(-1, 4)
    exact = batch.T @ (cells.x - (cells.size_factor * rho).log()) / precision
    fit(vae, cells, [vae.effect_loc, vae.effect_log_scale], n_draws=2000)
    # At 2,000 draws off by their mean; six standard errors are one in a billion.
    off = (vae.effect_loc - exact).abs() * precision.sqrt()
    assert (off < 6 / math.sqrt(2000)).all()
    scales = vae.effect_log_scale.exp().detach()
    torch.testing.assert_close(scales, precision.rsqrt(), rtol=0.1, atol=0)


def test_a_new_batch_has_the_prior_as_its_posterior(adata):
    model = as_they_are(SCANVI(adata, module_class=BatchEffect, effect_scale=0.7, n_latent=3))
    model.module.effect_loc.data += 1.0
    new = adata.copy()
    new.obs["batch"] = "three"
    query = SCANVI.load_query_data(new, model).module
    q, p = query.q_shared()["batch_effect"].base_dist, query.p_shared()["batch_effect"].base_dist
    kl = kl_divergence(q, p)
    torch.testing.assert_close(kl[2], torch.zeros(13), atol=1e-6, rtol=0)
    assert (kl[:2] > 0.1).all() and (query.effect_loc[:2] == 1).all()
    query = SCANVI.load_query_data(new, model).train(2, progress_bar=False, accelerator="cpu")
    assert (query.module.effect_loc[2] != 0).all() and (query.module.effect_loc[:2] == 1).all()
