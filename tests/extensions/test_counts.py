"""Likelihoods of counts against scipy's integrals and sums, their limits and their draws."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import gammaln, wrightomega
from scipy.stats import chisquare, poisson

from pyro_scanvi import SCANVAE, SCANVI, InputError, testing
from pyro_scanvi.extensions import (
    CovariateGate,
    GeneralisedPoisson,
    PoissonLogNormal,
    generalised_poisson,
    poisson_lognormal,
)
from pyro_scanvi.extensions.counts import _laplace
from pyro_scanvi.testing import Subject, random_cells
from tests.examples import SIZES, as_they_are
from tests.examples import random_cells as cells_of

COUNTS = (0, 1, 2, 10, 100, 1000, 5000)
MEANS = (1e-3, 0.1, 1.0, 10.0, 1000.0)
THETAS = (1e6, 100.0, 1.0, 0.1, 0.01)
GRID = np.array([(x, m, t) for x in COUNTS for m in MEANS for t in THETAS])
BOTH = {"pln": PoissonLogNormal, "gp": GeneralisedPoisson}
LIKELIHOODS = {"pln": poisson_lognormal, "gp": generalised_poisson}


def integral(x, mean, theta):
    """log of the Poisson-lognormal probability by quad, in pieces about the mode."""
    variance = np.log1p(1 / theta)
    sd, m = np.sqrt(variance), np.log(mean) - variance / 2

    def log_joint(t):
        log_normal = -t * t / 2 - np.log(2 * np.pi) / 2
        return x * (m + sd * t) - np.exp(m + sd * t) - gammaln(x + 1) + log_normal

    w = wrightomega(m + variance * x + np.log(variance)).real
    mode, width = (np.log(w) - np.log(variance) - m) / sd, 1 / np.sqrt(1 + w)
    top, ends = log_joint(mode), mode + width * np.array([-40, -8, 0, 8, 40])
    pieces = zip(ends[:-1], ends[1:], strict=True)
    areas = [quad(lambda t: np.exp(log_joint(t) - top), *p, epsrel=1e-10)[0] for p in pieces]
    return top + np.log(sum(areas))


@pytest.fixture(scope="module")
def expected():
    return np.array([integral(*point) for point in GRID])


def log_prob(kind, dtype=torch.float64, points=GRID):
    x, mean, theta = torch.tensor(points, dtype=dtype).T
    return kind(mean, theta).log_prob(x).numpy()


def test_poisson_lognormal_is_the_integral(expected):
    """Counts of 0 to 5,000, variances of the log rate of 1e-6 to 4.6; sixteen nodes."""
    np.testing.assert_allclose(log_prob(PoissonLogNormal), expected, rtol=1e-6, atol=7e-4)
    usual = GRID[:, 2] >= 0.1
    np.testing.assert_allclose(
        log_prob(PoissonLogNormal)[usual], expected[usual], rtol=1e-6, atol=2e-5
    )


@pytest.mark.parametrize("kind", BOTH)
def test_float32_is_float64(kind):
    single, double = log_prob(BOTH[kind], torch.float32), log_prob(BOTH[kind])
    np.testing.assert_allclose(single, double, rtol=5e-6, atol=1e-4)


def test_the_mode_solves_lamberts_equation():
    x, mean, theta = torch.tensor(GRID).T
    variance = (1 / theta).log1p()
    mode, width = _laplace(x, mean.log(), variance)
    c = (mean.log() - variance / 2 + variance * x + variance.log()).numpy()
    w = wrightomega(c).real
    np.testing.assert_allclose(width, 1 / np.sqrt(1 + w), rtol=1e-6)
    expected = variance.sqrt().numpy() * (x.numpy() - w / variance.numpy())
    np.testing.assert_allclose(mode, expected, rtol=1e-6, atol=1e-4)


def generalised(x, mean, theta):
    """Consul and Jain's formula as they wrote it."""
    rate = 1 / (1 + theta)
    a = mean * (1 - rate)
    return np.log(a) + (x - 1) * np.log(a + rate * x) - a - rate * x - gammaln(x + 1)


def test_generalised_poisson_is_the_formula():
    expected = generalised(*GRID.T)
    np.testing.assert_allclose(log_prob(GeneralisedPoisson), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("theta", [0.3, 2.0, 50.0])
def test_moments_are_sums(kind, theta):
    """Of all counts below 20,000, where no more than a millionth is left."""
    mean = torch.tensor(4.0, dtype=torch.float64)
    p, x = BOTH[kind](mean, torch.tensor(theta, dtype=torch.float64)), torch.arange(20_000.0)
    probability = p.log_prob(x.double()).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    assert (probability * x).sum().item() == pytest.approx(p.mean.item(), rel=1e-3)
    second = (probability * (x - 4.0).square()).sum().item()
    assert second == pytest.approx(p.variance.item(), rel=2e-2)


@pytest.mark.parametrize("kind", BOTH)
def test_without_dispersion_it_is_poisson(kind):
    x, mean = torch.tensor([0.0, 1.0, 7.0, 300.0]), torch.tensor([0.5, 3.0, 7.0, 250.0])
    for theta in (1e12, torch.inf):
        found = BOTH[kind](mean, torch.tensor(theta)).log_prob(x)
        np.testing.assert_allclose(found, poisson.logpmf(x, mean), rtol=1e-5)


@pytest.mark.parametrize("kind", BOTH)
def test_draws_have_the_probabilities(kind):
    """Chi-square over counts; a right sampler fails for one seed in a million."""
    p = BOTH[kind](torch.tensor(3.0), torch.tensor(0.4))
    torch.manual_seed(0)
    drawn = p.sample((20_000,)).numpy()
    expected = p.log_prob(torch.arange(12.0)).exp().numpy().astype(float) * len(drawn)
    found = np.bincount(drawn.clip(max=12).astype(int), minlength=13)
    expected = np.append(expected, len(drawn) - expected.sum())
    assert chisquare(found, expected).pvalue > 1e-6


@pytest.mark.parametrize("kind", BOTH)
def test_gradients_are_differences(kind):
    """Of the integral too, though its nodes count as constants."""
    chosen = GRID[(GRID[:, 2] >= 0.1) & (GRID[:, 2] <= 100)]
    x, mean, theta = torch.tensor(chosen).T.requires_grad_()
    gradients = torch.autograd.grad(
        BOTH[kind](mean, theta).log_prob(x.detach()).sum(), [mean, theta]
    )
    for column, found in zip((1, 2), gradients, strict=True):
        step = np.zeros(3)
        step[column] = 1e-4
        up, down = (log_prob(BOTH[kind], points=chosen * (1 + s)) for s in (step, -step))
        expected = (up - down) / (2e-4 * chosen[:, column])
        scale = 1 + np.abs(expected)
        assert (np.abs(found.numpy() - expected) / scale).max() < 2e-3


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("theta", [1e-6, 1.0, 1e10, 1e19, torch.inf])
@pytest.mark.parametrize("mean", [0.0, 1e-30, 1.0, 1e6])
def test_values_and_gradients_are_finite(kind, theta, mean):
    mean = torch.full((3,), mean, requires_grad=True)
    theta = torch.full((3,), theta, requires_grad=True)
    found = BOTH[kind](mean, theta, validate_args=False).log_prob(torch.tensor([0.0, 1.0, 1e4]))
    found.sum().backward()
    for tensor in (found, mean.grad, theta.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_likelihoods_pass_the_checks(kind):
    subject = Subject(random_cells(), arguments={"gene_likelihood": LIKELIHOODS[kind]})
    for check in (*testing.CHECKS_OF_TRACES, *testing.CHECKS_OF_LIKELIHOODS, testing.it_grows):
        check(subject)


def test_they_answer_and_are_saved(tmp_path):
    adata = random_cells()
    model = SCANVI(adata, gene_likelihood=poisson_lognormal, n_hidden=7, n_latent=3)
    as_they_are(model)
    told = model.get_likelihood_parameters(seed=0)
    assert set(told) == {"mean", "dispersions"}
    model.save(tmp_path / "model")
    parts = {"gene_likelihood": poisson_lognormal}
    again = SCANVI.load(tmp_path / "model", adata, parts=parts)
    assert again.get_elbo(seed=0) == model.get_elbo(seed=0)
    with pytest.raises(InputError, match="_poisson_lognormal"):
        SCANVI.load(tmp_path / "model", adata, parts={"gene_likelihood": generalised_poisson})


# ---- a covariate on the gate --------------------------------------------------------------------


def gates(vae, cells):
    z = torch.zeros(len(cells), vae.n_latent)
    with torch.no_grad():
        return vae.count_parameters(z, torch.ones(len(cells), 1), None, cells).gate_logits


def test_the_gate_is_that_of_the_model_and_a_linear_term():
    arguments = SIZES | {"n_batch": 2, "n_continuous_cov": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = CovariateGate(**arguments).eval()
    plain = SCANVAE(**arguments).eval()
    plain.load_state_dict(vae.state_dict(), strict=False)
    cells = cells_of(vae)
    assert torch.equal(gates(vae, cells), gates(plain, cells))
    slopes = torch.randn(4, 20)
    vae.gate_effect.data = slopes
    own = cells.continuous @ slopes[:2] + slopes[2:][cells.batch]
    torch.testing.assert_close(gates(vae, cells), gates(plain, cells) + own)


def test_a_likelihood_without_a_gate_is_refused():
    with pytest.raises(InputError, match="leave gene_likelihood out"):
        CovariateGate(**SIZES, gene_likelihood="nb")
