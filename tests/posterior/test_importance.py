"""Marginal likelihood and label posterior: against normal theory, quadrature and explicit loops."""

import copy
import dataclasses
import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from pyro_scanvi import SCANVAE, Cells, SemiSupervisedELBO
from pyro_scanvi.posterior import importance
from tests.examples import as_they_are, random_cells, simulated, small_model, small_vae
from tests.posterior.examples import by_bayes

N_GENES, N_LATENT, N_LABELS = 5, 2, 3
EYE_Z, EYE_X = torch.eye(N_LATENT).double(), torch.eye(N_GENES).double()
SIGMAS = 4.5  # two-sided, 7e-6 a comparison


def log_prior(vae):
    """log p(y) in float64, (L,); thirds in float32 do not sum to 1."""
    prior = vae.y_prior.double()
    return (prior / prior.sum()).log()


class LinearGaussian(SCANVAE):
    """u, z, log l and x are jointly Normal given y, so log p(x, y) has a closed form.

    z = A u + m_y + noise, x = B z + c log l + d_y + noise. The guide is wrong on purpose: its
    location is off, and it is wider than the posterior.
    """

    def __init__(self, seed: int = 0, **changes):
        super().__init__(N_GENES, n_labels=N_LABELS, n_latent=N_LATENT, n_hidden=4, **changes)
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.double()
        self.A, self.m = normal(N_LATENT, N_LATENT), normal(N_LABELS, N_LATENT)
        self.B, self.d = normal(N_GENES, N_LATENT), 0.3 * normal(N_LABELS, N_GENES)
        self.c = 0.5 * normal(N_GENES) if self.latent_library else torch.zeros(N_GENES).double()
        self.noise_z, self.noise_x, self.wider, self.off = 0.5, 0.8, 1.3, 0.1

    def p_z(self, u, y, cells):
        return dist.Normal(u @ self.A.T + y @ self.m, self.noise_z).to_event(1)

    def p_x(self, z, library, y, cells):
        log_library = library.log() if self.latent_library else 0.0
        mean = z @ self.B.T + log_library * self.c + y @ self.d
        return dist.Normal(mean, self.noise_x).to_event(1)

    def q_u(self, z, y, cells):
        gain, covariance = self.given_z()
        mean = (z - y @ self.m) @ gain.T + self.off
        return dist.MultivariateNormal(mean, self.wider * covariance)

    def q_z(self, cells):
        """Around the posterior of the middle of the labels."""
        gain, covariance = self.given_x()
        middle = self.m.mean(0)
        residual = cells.x - middle @ self.B.T - self.d.mean(0)
        spread = self.wider * covariance + (self.off > 0) * self.m.T.cov()
        return dist.MultivariateNormal(middle + residual @ gain.T + self.off, spread)

    def q_l(self, cells):
        return dist.LogNormal(self.off * torch.ones(len(cells), 1).double(), 1.1).to_event(1)

    def given_z(self):
        """Gain and covariance of u given z and y."""
        gain = self.A.T @ (self.A @ self.A.T + self.noise_z**2 * EYE_Z).inverse()
        return gain, EYE_Z - gain @ self.A

    def given_x(self):
        """Gain and covariance of z given x and y, at log l = 0."""
        prior = self.A @ self.A.T + self.noise_z**2 * EYE_Z
        total = self.B @ prior @ self.B.T + self.noise_x**2 * EYE_X
        gain = prior @ self.B.T @ total.inverse()
        return gain, prior - gain @ self.B @ prior

    def exact_log_joint(self, x):
        """log p(x, y) of each cell and label by scipy, (N, L)."""
        z = self.A @ self.A.T + self.noise_z**2 * EYE_Z
        x_noise = self.noise_x**2 * EYE_X
        covariance = self.B @ z @ self.B.T + x_noise
        mean = self.m @ self.B.T + self.d
        if self.latent_library:
            mean = mean + self.library_log_means * self.c
            covariance = covariance + self.library_log_vars * torch.outer(self.c, self.c)
        by_label = [multivariate_normal(m, covariance).logpdf(x) for m in mean]
        return np.stack(by_label, -1).reshape(len(x), -1) + log_prior(self).numpy()


class ExactGuide(LinearGaussian):
    """The guide is the exact posterior of a cell of label `target`."""

    def __init__(self, target: int):
        super().__init__()
        self.target, self.wider, self.off = target, 1.0, 0.0

    def q_z(self, cells):
        gain, covariance = self.given_x()
        mean = self.m[self.target]
        residual = cells.x - mean @ self.B.T - self.d[self.target]
        return dist.MultivariateNormal(mean + residual @ gain.T, covariance)


LATENT_LIBRARY = {
    "use_observed_lib_size": False,
    "library_log_means": [0.3],
    "library_log_vars": [0.5],
}


def normal_cells(n_distinct: int, repeats: int = 1) -> Cells:
    """Cells of real numbers, each `repeats` times: replicates with draws of their own."""
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(n_distinct, N_GENES, generator=rng, dtype=torch.float64)
    return Cells.from_counts(x.repeat_interleave(repeats, 0))


def estimate(vae, cells, n_samples, n_inner_samples, seed=0, **changes):
    """log p(x, y), (N, L), with the noise of a seed."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        return importance.log_joint(vae, cells, n_samples, n_inner_samples, **changes)


def assert_unbiased(vae, cells, repeats, exact, n_samples=3, n_inner_samples=2):
    """The mean of p_hat / p over replicates is 1, within `SIGMAS` standard errors."""
    found = estimate(vae.eval(), cells, n_samples, n_inner_samples).numpy()
    ratio = np.exp(found.reshape(-1, repeats, found.shape[-1]) - exact[:, None])
    error = ratio.std(1) / np.sqrt(repeats)
    assert error.max() < 0.1  # the test has power
    assert (np.abs(ratio.mean(1) - 1) < SIGMAS * error).all()


# ---- a model whose answers are known ------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, LATENT_LIBRARY, {"y_prior": [0.7, 0.2, 0.1]}])
def test_unbiased_for_a_mixture_of_normals(changes):
    """With 3 draws of z and 2 of u. Nine comparisons a case: false alarms in 2e-4 of the runs."""
    vae = LinearGaussian(**changes)
    cells = normal_cells(3, 3000)
    exact = vae.exact_log_joint(cells.x[::3000].numpy())
    assert_unbiased(vae, cells, 3000, exact)


@pytest.mark.parametrize("changes", [{}, LATENT_LIBRARY, {"y_prior": [0.7, 0.2, 0.1]}])
def test_marginal_likelihood_and_label_posterior_of_a_mixture_of_normals(changes):
    """At 4,000 draws the error of log p is 0.02 to 0.05; the bounds are four times that."""
    vae, cells = LinearGaussian(**changes).eval(), normal_cells(20)
    exact = vae.exact_log_joint(cells.x.numpy())
    found = estimate(vae, cells, 4000, 4).numpy()
    assert found.dtype == np.float64 and found.shape == (20, N_LABELS)
    np.testing.assert_allclose(logsumexp(found, axis=1), logsumexp(exact, axis=1), atol=0.2)
    posterior = np.exp(exact - logsumexp(exact, axis=1, keepdims=True))
    np.testing.assert_allclose(torch.tensor(found).softmax(-1), posterior, atol=0.05)


@pytest.mark.parametrize("target", range(N_LABELS))
@pytest.mark.parametrize("draws", [(1, 1), (2, 3)])
def test_no_noise_at_all_where_the_guide_is_exact(target, draws):
    """All weights are then p(x, y): one draw is enough."""
    vae, cells = ExactGuide(target).eval(), normal_cells(6)
    found = estimate(vae, cells, *draws)[:, target]
    expected = vae.exact_log_joint(cells.x.numpy())[:, target]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def assert_rising(vae, steps, exact, which):
    """The mean of log p_hat rises at each step, and stays below log p."""
    cells = normal_cells(1, 2000)
    found = [which(estimate(vae, cells, *step)).numpy() for step in steps]
    mean = np.array([f.mean() for f in found])
    error = np.array([f.std() for f in found]) / math.sqrt(2000)
    assert (np.diff(mean) > SIGMAS * np.hypot(error[1:], error[:-1])).all()
    assert (mean < exact + SIGMAS * error).all()


def test_more_draws_of_z_raise_the_bound_and_never_pass_the_truth():
    """Burda et al., theorem 1. Five comparisons; false alarms in 2e-5 of the runs."""
    vae = LinearGaussian().eval()
    exact = logsumexp(vae.exact_log_joint(normal_cells(1).x.numpy()))
    assert_rising(vae, [(1, 2), (4, 2), (16, 2)], exact, lambda log_p: log_p.logsumexp(-1))


def test_more_draws_of_u_raise_the_bound_and_never_pass_the_truth():
    """The guide of z is exact, so all noise is that of u. Five comparisons as above."""
    vae = ExactGuide(0).eval()
    vae.wider, vae.off = 1.5, 0.5  # q(u | z, y) reads them
    exact = vae.exact_log_joint(normal_cells(1).x.numpy())[0, 0]
    assert_rising(vae, [(1, 1), (1, 4), (1, 16)], exact, lambda log_p: log_p[:, 0])


# ---- counts, against quadrature -----------------------------------------------------------------


def quadrature(vae: SCANVAE, cells: Cells) -> np.ndarray:
    """log p(x, y) of a model with K = 1 on grids of u and z, and of log l where it is latent."""
    grid = torch.linspace(-8, 8, 321, dtype=torch.float64)
    weight = math.log(16 / 320)
    z, u, library = grid[:, None, None], grid[:, None, None, None], vae.observed_library(cells)
    log_l = torch.zeros(())
    if library is None:
        mean, sd = vae.library_log_means[0], vae.library_log_vars[0].sqrt()
        logs = torch.linspace(-6, 6, 61, dtype=torch.float64) * sd + mean
        library = logs.exp()[:, None, None, None]
        normal = torch.distributions.Normal(mean, sd)
        log_l = (normal.log_prob(logs) + (12 / 60 * sd).log())[:, None, None]
    result = []
    for label in range(vae.n_labels):
        y = torch.eye(vae.n_labels, dtype=torch.float64)[label].expand(len(cells), -1)
        p_z = vae.p_z(u, y[:1], cells).log_prob(z) + vae.p_u(cells).log_prob(u)  # u, z, 1
        p_z = p_z.logsumexp(0) + weight  # z, 1
        states = z.expand(-1, len(cells), 1)
        p_x = vae.p_x(states, library, y, cells).log_prob(cells.x)  # (l,) z, N
        p_x = (p_x + log_l).logsumexp(0) if log_l.ndim else p_x
        result.append((p_x + p_z).logsumexp(0) + weight + log_prior(vae)[label])
    return torch.stack(result, -1).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dispersion": "gene-label", "y_prior": [0.5, 0.3, 0.2]},
        {"use_observed_lib_size": False, "library_log_means": [3.7], "library_log_vars": [0.1]},
    ],
)
def test_unbiased_for_counts(changes):
    """ZINB with networks, K = 1. Nine comparisons a case: false alarms in 2e-4 of the runs."""
    vae = small_vae(n_latent=1, **changes).double().eval()
    if vae.latent_library:  # an untrained guide proposes no library near the counts
        vae.l_encoder.mean.bias.data.fill_(3.7)
    cells = random_cells(vae, n=3)
    with torch.no_grad():
        exact = quadrature(vae, cells)
    repeated = Cells.from_counts(cells.x.repeat_interleave(2000, 0))
    assert_unbiased(vae, repeated, 2000, exact, n_samples=10)


# ---- every configuration, against loops ---------------------------------------------------------

CONFIGURATIONS = {
    "plain": {},
    "gene-label": {"dispersion": "gene-label"},
    "latent library": LATENT_LIBRARY
    | {"n_batch": 2, "library_log_means": [3.0, 4.0]}
    | {"library_log_vars": [0.2, 0.1]},
    "logistic normal": {"latent_distribution": "ln"},
    "size factor": {"use_size_factor_key": True},
    "covariates": {
        "n_batch": 3,
        "n_cats_per_cov": [2, 3],
        "n_continuous_cov": 2,
        "encode_covariates": True,
    },
    "embedded batch, gene-batch": {
        "n_batch": 3,
        "batch_representation": "embedding",
        "dispersion": "gene-batch",
    },
    "gene-cell, nb": {"dispersion": "gene-cell", "gene_likelihood": "nb"},
}


def by_loops(vae, cells, n_samples, n_inner):
    """The estimate by its formula, one label, draw of z and draw of u at a time."""
    n, n_labels = len(cells), vae.n_labels
    q_z, q_l = vae.q_z(cells), vae.q_l(cells) if vae.latent_library else None
    z = q_z.sample((n_samples,))
    library = vae.observed_library(cells)
    if library is None:
        library = q_l.sample((n_samples,))
    noise = torch.randn(n_labels, n_inner, n_samples, n, vae.n_latent, dtype=z.dtype)
    result = torch.zeros(n, n_labels, dtype=torch.float64)
    for label in range(n_labels):
        y = torch.eye(n_labels, dtype=z.dtype)[label].expand(n, -1)
        total = 0
        for s in range(n_samples):
            q_u = vae.q_u(z[s], y, cells)
            inner = 0
            for m in range(n_inner):
                u = q_u.mean + q_u.stddev * noise[label, m, s]
                log_ratio = vae.p_u(cells).log_prob(u) + vae.p_z(u, y, cells).log_prob(z[s])
                inner = inner + (log_ratio - q_u.log_prob(u)).exp() / n_inner
            size = library[s] if q_l is not None else library
            log_weight = vae.p_x(z[s], size, y, cells).log_prob(cells.x) - q_z.log_prob(z[s])
            if q_l is not None:
                log_weight = log_weight + vae.p_l(cells).log_prob(size) - q_l.log_prob(size)
            total = total + (log_weight.exp() * inner) / n_samples
        result[:, label] = log_prior(vae)[label] + total.log()
    return result


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equal_to_explicit_loops(name):
    """With the same draws, in float64."""
    vae = small_vae(**CONFIGURATIONS[name]).double().eval()
    cells = random_cells(vae, n=6)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        expected = by_loops(vae, cells, 4, 3)
    torch.testing.assert_close(estimate(vae, cells, 4, 3), expected, rtol=0, atol=1e-9)


class Blind(SCANVAE):
    """p(z | u) does not depend on the label, nor q(u) on anything: p(x, y) = p(x) p(y)."""

    def p_z(self, u, y, cells):
        return super().p_z(u, torch.ones(1, u.shape[-2], 3) / 3, cells)

    def q_u(self, z, y, cells):
        return self.p_u(cells)


def test_factors_that_ignore_the_label():
    """Shapes without a dimension of labels; what is left of the posterior is the prior."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = Blind(n_input=20, n_labels=3, n_latent=4, n_hidden=8, y_prior=[0.5, 0.3, 0.2]).eval()
    found = estimate(vae, random_cells(vae), 7, 4)
    assert found.shape == (12, 3)
    expected = vae.y_prior.double().expand(12, -1)
    torch.testing.assert_close(found.softmax(-1), expected, rtol=1e-6, atol=0)


# ---- passes -------------------------------------------------------------------------------------


class Tape(dist.Normal):
    """Its draws are read from a table of noise, (S, N_all, K), at the rows of some cells."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = iter(noise)

    def sample(self, shape=()):
        return torch.stack([self.loc + self.scale * next(self.noise) for _ in range(shape[0])])


class Middle(dist.Normal):
    """Every draw lies half a standard deviation above the mean."""

    def expand(self, shape, _instance=None):
        return Middle(self.loc.expand(shape), self.scale.expand(shape))

    def sample(self, shape=()):
        return (self.loc + self.scale / 2).expand(*shape, *self.loc.shape)


class Taped(SCANVAE):
    """Its guide draws the same numbers for a cell, however the cells and draws are divided."""

    def q_z(self, cells):
        noise = torch.randn(10, cells.n_obs, 4, generator=torch.Generator().manual_seed(0))
        loc, scale = self.z_encoder(*self.encoder_input(cells))
        return Tape(loc, scale, noise[:, cells.index].to(loc.dtype)).to_event(1)

    def q_u(self, z, y, cells):
        return Middle(*self.u_encoder(self.state(z), y)).to_event(1)


@pytest.fixture(scope="module")
def taped():
    """A model on tape, as an estimator."""
    model = as_they_are(small_model(simulated(n=12)))
    vae = Taped(n_input=20, n_labels=3, n_hidden=16, n_latent=4)
    vae.load_state_dict(model.module.state_dict())
    model.module = vae.eval()
    return model


@pytest.mark.parametrize("n_per_pass", [None, 1, 3, 50])
def test_passes_over_draws_change_nothing(taped, n_per_pass):
    vae = copy.deepcopy(taped.module).double()
    cells = taped._data[np.arange(12)].to(torch.device("cpu"))
    cells = dataclasses.replace(cells, x=cells.x.double())
    expected = estimate(vae, cells, 10, 2, n_per_pass=10)
    found = estimate(vae, cells, 10, 2, n_per_pass=n_per_pass)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("batch_size", "pass_elements"), [(None, 1), (5, 2000), (1, 10**9), (11, 10**9), (100, 10**9)]
)
def test_minibatches_change_nothing(taped, batch_size, pass_elements, monkeypatch):
    expected = taped.get_marginal_ll(n_mc_samples=10, return_mean=False)
    soft = taped.predict(soft=True, method="bayes", n_mc_samples=10)
    monkeypatch.setattr(importance, "PASS_ELEMENTS", pass_elements)
    arguments = {"n_mc_samples": 10, "batch_size": batch_size}
    found = taped.get_marginal_ll(return_mean=False, **arguments)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    found = taped.predict(soft=True, method="bayes", **arguments)
    pd.testing.assert_frame_equal(found, soft, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"n_hidden": 2}, 20),  # genes
        ({"n_hidden": 2, "dispersion": "gene-label"}, 20 * 3),  # by labels
        ({"n_hidden": 64}, 64 * 3 * 2),  # hidden units by labels and draws of u
    ],
)
def test_numbers_of_a_draw(changes, numbers):
    """They say how many cells and draws fit into a pass."""
    vae = small_vae(**changes).eval()
    assert importance._numbers_per_draw(vae, random_cells(vae, n=5), 2) == 5 * numbers


def test_sums_over_genes_keep_their_digits():
    """Log probabilities of float32 are summed in float64; a float32 sum is off by 1e-4 here."""
    x = torch.randn(7, 5000, generator=torch.Generator().manual_seed(0))
    normal = dist.Normal(torch.zeros(5000), 0.1)
    found = importance.log_prob_of_events(normal.to_event(1), x)
    expected = normal.log_prob(x).double().numpy().sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_counts_are_decoded_once_for_all_labels():
    """Where p(x) does not depend on the label."""
    vae = small_vae().eval()
    shapes = []
    vae.x_decoder.register_forward_hook(lambda module, given, out: shapes.append(out.shape[:-1]))
    estimate(vae, random_cells(vae), 4, 2, n_per_pass=2)
    assert shapes == [(2, 12), (2, 12)]


# ---- what users ask -----------------------------------------------------------------------------


@pytest.fixture
def model(trained):
    """A trained model; the tests only read it."""
    return trained


@pytest.mark.parametrize("feed_labels", [False, True])
def test_marginal_likelihood_lies_above_the_elbo(model, feed_labels):
    """By 1.4 nats a cell here, with labels fed too; the mean of the ELBO is known to 0.04.

    A term that is counted twice, or left out, moves the estimate by more: 1.1 for y, 2.5 for z.
    """
    vae = model.module
    cells = model._data[np.arange(120)]
    objective = SemiSupervisedELBO(vae.q_y, feed_labels=feed_labels)(vae.model, vae.guide)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        elbo = torch.stack([objective.parts(cells).elbo().mean() for _ in range(50)]).mean()
    found = model.get_marginal_ll(n_mc_samples=200, feed_labels=feed_labels, seed=0)
    assert elbo + 0.5 < found < elbo + 2.4


def test_known_labels_are_fed_only_when_asked(model):
    """log p(x, y) < log p(x) for labelled cells; the others are as they were."""
    arguments = {"n_mc_samples": 20, "return_mean": False, "seed": 3}
    labelled = (model.adata.obs["cell_type"] != "Unknown").to_numpy()
    without = model.get_marginal_ll(**arguments)
    fed = model.get_marginal_ll(feed_labels=True, **arguments)
    assert fed.shape == (120,) and fed.dtype == np.float64
    np.testing.assert_array_equal(fed[~labelled], without[~labelled])
    log_posterior = np.log(by_bayes(model, n_mc_samples=20, seed=3).to_numpy())
    codes = model._data.label[labelled]
    expected = without[labelled] + log_posterior[labelled, codes]
    np.testing.assert_allclose(fed[labelled], expected, atol=1e-8)


def test_mean_and_indices(model):
    each = model.get_marginal_ll(n_mc_samples=10, return_mean=False, seed=0)
    mean = model.get_marginal_ll(n_mc_samples=10, seed=0)
    assert isinstance(mean, float) and mean == pytest.approx(each.mean())
    indices = [each.argmax(), each.argmin()]
    some = model.get_marginal_ll(indices=indices, n_mc_samples=300, return_mean=False, seed=0)
    np.testing.assert_allclose(some, each[indices], atol=6)
    assert some[0] - some[1] > 10


def test_seeds(model):
    """A seed fixes what is drawn, and leaves torch's generator alone; None draws on from it."""
    before = torch.get_rng_state()
    arguments = {"n_mc_samples": 5}
    first, again, other = (by_bayes(model, seed=s, **arguments) for s in (1, 1, 2))
    assert model.get_marginal_ll(seed=1, **arguments) == model.get_marginal_ll(seed=1, **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.equals(again) and not first.equals(other)
    assert not by_bayes(model, **arguments).equals(by_bayes(model, **arguments))
    sampled = [model.predict(soft=True, use_posterior_mean=False, seed=1) for _ in range(2)]
    assert sampled[0].equals(sampled[1])


def test_evaluation_moves_nothing(model):
    twin = copy.deepcopy(model)
    twin.module.train()
    before = copy.deepcopy(twin.module.state_dict())
    pd.testing.assert_frame_equal(by_bayes(twin, seed=0), by_bayes(model, seed=0))
    twin.get_marginal_ll(n_mc_samples=5)
    assert twin.module.training
    for name, value in twin.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_refusals(model):
    with pytest.raises(
        ValueError, match="method='vote', expected one of 'consensus', 'classifier', 'bayes'"
    ):
        model.predict(method="vote")
    for bad in (0, 1.5, -1):
        with pytest.raises(ValueError, match="n_mc_samples=.*expected an integer of at least 1"):
            model.predict(method="bayes", n_mc_samples=bad)
        with pytest.raises(ValueError, match="n_mc_samples=.*expected an integer of at least 1"):
            model.get_marginal_ll(n_mc_samples=bad)
        with pytest.raises(ValueError, match="n_inner_samples=.*expected an integer of at least"):
            model.get_marginal_ll(n_inner_samples=bad)
    with pytest.raises(ValueError, match="seed=-1"):
        model.get_marginal_ll(seed=-1)
    with pytest.raises(ValueError, match="seed=-1"):
        model.predict(seed=-1)
