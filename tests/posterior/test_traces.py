"""Stories of one's own, weighed by traces: against normal theory and nested sampling."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from pyro_scanvi import SCANVAE, InputError
from pyro_scanvi.model.scanvae import sample_shared
from pyro_scanvi.posterior import importance
from pyro_scanvi.posterior.traces import TraceWeights
from tests.examples import as_they_are, random_cells, simulated, small_model, small_vae
from tests.posterior.test_importance import (
    LATENT_LIBRARY,
    SIGMAS,
    LinearGaussian,
    estimate,
    normal_cells,
)


def by_traces(vae, cells, n_samples, n_per_pass=None, by_label=True):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        weights = TraceWeights(vae.eval(), by_label)
        return weights.log_joint(cells, n_samples, n_per_pass or n_samples).numpy()


def assert_unbiased(vae, exact, n_distinct=3, repeats=3000):
    """The mean of p_hat / p over replicates is 1, within `SIGMAS` standard errors."""
    found = by_traces(vae, normal_cells(n_distinct, repeats), 3)
    ratio = np.exp(found.reshape(n_distinct, repeats, -1) - exact[:, None])
    error = ratio.std(1) / np.sqrt(repeats)
    assert error.max() < 0.1  # the test has power
    assert (np.abs(ratio.mean(1) - 1) < SIGMAS * error).all()


def nothing(cells):
    """No further site."""


class Told(SCANVAE):
    """The story of SCANVAE, in a model and a guide of its own; each may have more of a cell."""

    more_of_model = more_of_guide = staticmethod(nothing)

    def model(self, cells):
        cells = sample_shared(self.p_shared(), cells)
        with self.plate(cells):
            u, y = pyro.sample("u", self.p_u(cells)), pyro.sample("y", self.p_y(cells))
            z, library = pyro.sample("z", self.p_z(u, y, cells)), self.observed_library(cells)
            if library is None:
                library = pyro.sample("l", self.p_l(cells))
            for name, (p, value) in self.observed(z, library, y, cells).items():
                pyro.sample(name, p, obs=value)
            self.more_of_model(cells)

    def guide(self, cells):
        cells = sample_shared(self.q_shared(), cells)
        with self.plate(cells):
            z = pyro.sample("z", self.q_z(cells))
            y = pyro.sample("y", self.q_y(z, cells))
            pyro.sample("u", self.q_u(z, y, cells))
            if self.latent_library:
                pyro.sample("l", self.q_l(cells))
            self.more_of_guide(cells)


class Copied(LinearGaussian):
    """The story of SCANVAE, by a model of its own that is the same."""

    def model(self, cells):
        SCANVAE.model(self, cells)


class Measured(Told, LinearGaussian):
    """A further state w ~ N(0, 1) of a cell, and a measurement x2 ~ N(w, 1) of it."""

    def more_of_model(self, cells):
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x2", dist.Normal(w, 1.0), obs=cells.x[:, 0])

    def exact_log_joint(self, x):
        return super().exact_log_joint(x) + norm(0, 2**0.5).logpdf(x[:, :1])


class MeasuredByGuide(Measured):
    """The same, with a posterior of w that is off."""

    def more_of_guide(self, cells):
        pyro.sample("w", dist.Normal(0.4 * cells.x[:, 0], 0.9))


@pytest.mark.parametrize("changes", [{}, LATENT_LIBRARY, {"y_prior": [0.7, 0.2, 0.1]}])
@pytest.mark.parametrize("kind", [Copied, Measured, MeasuredByGuide])
def test_unbiased_for_a_mixture_of_normals(kind, changes):
    """At 3 draws. A site that the guide does not draw comes from the prior.

    Nine comparisons a case at 7e-6: false alarms in 6e-4 of the runs.
    """
    vae = kind(**changes)
    assert_unbiased(vae, vae.exact_log_joint(normal_cells(3).x.numpy()))


def test_agrees_with_nested_sampling_and_gives_the_label_posterior():
    """At 4,000 draws the error of log p is at most 0.05 each; the bounds are four times that."""
    vae, cells = Copied(), normal_cells(10)
    found, nested = by_traces(vae, cells, 4000, 1000), estimate(vae.eval(), cells, 4000, 4).numpy()
    assert found.dtype == np.float64 and found.shape == (10, 3)
    exact = vae.exact_log_joint(cells.x.numpy())
    np.testing.assert_allclose(logsumexp(found, 1), logsumexp(nested, 1), atol=0.28)
    np.testing.assert_allclose(logsumexp(found, 1), logsumexp(exact, 1), atol=0.2)
    posterior = np.exp(exact - logsumexp(exact, axis=1, keepdims=True))
    np.testing.assert_allclose(torch.tensor(found).softmax(-1), posterior, atol=0.05)


class NoLabels(LinearGaussian):
    """z ~ N(0, I) and x ~ N(B z, .), without types; guided by the exact posterior."""

    def model(self, cells):
        with self.plate(cells):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.B.T, self.noise_x).to_event(1), obs=cells.x)

    def guide(self, cells):
        covariance = (torch.eye(2).double() + self.B.T @ self.B / self.noise_x**2).inverse()
        with self.plate(cells):
            mean = cells.x @ self.B @ covariance / self.noise_x**2
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))


def test_a_story_without_labels():
    """All weights are p(x), to the rounding of float64."""
    vae, cells = NoLabels(), normal_cells(6)
    covariance = vae.B @ vae.B.T + vae.noise_x**2 * torch.eye(5).double()
    expected = dist.MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(cells.x)
    found = by_traces(vae, cells, 2, by_label=False)
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="no latent site y .*3 labels .there is none"):
        TraceWeights(vae, by_label=True).numbers_per_draw(cells)


class Enumerated(Told, LinearGaussian):
    """A second enumerated site, of which nothing depends, changes nothing."""

    def more_of_model(self, cells):
        pyro.sample("cycle", dist.Categorical(torch.tensor([0.2, 0.8]).double()))

    def more_of_guide(self, cells):
        q = dist.Categorical(torch.tensor([0.5, 0.5]))
        pyro.sample("cycle", q, infer={"enumerate": "parallel"})


def test_other_enumerated_sites_are_summed():
    """With the draws of the guide, which are the same in both."""
    cells = normal_cells(5)
    found, expected = (by_traces(kind(), cells, 50, 20) for kind in (Enumerated, Copied))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dispersion", ["gene", "gene-label"])
def test_counts_agree_with_nested_sampling(dispersion):
    """ZINB with networks: means over 16 runs of each. Twelve comparisons at 5 sigma: 1e-5."""
    vae = small_vae(dispersion=dispersion, n_latent=1).double().eval()
    cells = random_cells(vae, n=4)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        runs = torch.stack([TraceWeights(vae, True).log_joint(cells, 300, 300) for _ in range(16)])
        nested = torch.stack([importance.log_joint(vae, cells, 300, 2) for _ in range(16)])
    ratio = (runs - nested.mean(0)).exp()
    others = (nested - nested.mean(0)).exp()
    error = ((ratio.var(0) + others.var(0)) / 16).sqrt()
    assert error.max() < 0.2 and ((ratio.mean(0) - others.mean(0)).abs() < 5 * error).all()


# ---- asked of the estimator ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def told():
    return as_they_are(small_model(simulated(30), module_class=Told))


def test_what_users_ask(told, monkeypatch):
    """Known labels are fed when asked; memory is bounded by passes of draws and of cells."""
    arguments = {"n_mc_samples": 40, "return_mean": False, "seed": 1}
    soft = told.predict(soft=True, method="bayes", n_mc_samples=40, seed=1).to_numpy()
    without = told.get_marginal_ll(**arguments)
    fed = told.get_marginal_ll(feed_labels=True, **arguments)
    labelled = told._data.label >= 0
    np.testing.assert_array_equal(fed[~labelled], without[~labelled])
    at = np.log(soft[labelled, told._data.label[labelled]])
    np.testing.assert_allclose(fed[labelled], without[labelled] + at, atol=1e-8)
    shapes = []
    told.module.x_decoder.register_forward_hook(lambda m, given, out: shapes.append(out.shape[:-1]))
    monkeypatch.setattr(importance, "PASS_ELEMENTS", 3 * 16 * 10 * 7)
    told.get_marginal_ll(**arguments | {"batch_size": 10})
    assert {s[:2] for s in shapes if len(s) == 2} >= {(7, 10), (5, 10)}
    assert max(len(s) for s in shapes) == 2  # decoded once for all labels


def with_sites(*, model=nothing, guide=nothing, shared=(), outside=()):
    """A class whose model and guide have more sites."""

    class Odd(Told):
        def p_shared(self):
            return {name: dist.Normal(0.0, 1.0) for name in shared}

        def model(self, cells):
            for name in outside:
                normal(name)(cells)
            super().model(cells)

        def guide(self, cells):
            for name in outside[1:]:
                normal(name)(cells)
            super().guide(cells)

    Odd.more_of_model, Odd.more_of_guide = staticmethod(model), staticmethod(guide)
    return Odd


def normal(name):
    return lambda cells: pyro.sample(name, dist.Normal(torch.zeros(()), 1.0))


def in_a_plate(cells):
    with pyro.plate("genes", 3, dim=-2):
        pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))


REFUSED = {
    "guide draws w, which is no latent site of the model": {"guide": normal("w")},
    "v is outside the plate of cells": {"outside": ("v",)},
    "v is outside the plate of cells, and not": {"outside": ("v", "w")},
    "pi is outside the plate of cells": {"shared": ("pi",)},
    "w lies in the plate genes too": {"model": in_a_plate, "guide": in_a_plate},
    "the guide has the observed site loss": {
        "guide": lambda cells: pyro.factor("loss", torch.zeros(()))
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_weighed_is_named(message):
    kind = with_sites(**REFUSED[message])
    model = as_they_are(small_model(simulated(30), module_class=kind))
    for ask in (model.get_marginal_ll, lambda: model.predict(method="bayes")):
        with pytest.raises(InputError, match=message):
            ask()


def test_auxiliary_draws_and_shared_sites_are_weighed_rightly():
    """A guide that draws w by a change of variables, and a shared site at its posterior."""

    class Auxiliary(Measured):
        def p_shared(self):
            return {"shift": dist.Normal(torch.zeros(()).double(), 1.0)}

        def q_shared(self):
            return {"shift": dist.Normal(torch.ones(()).double(), 1e-9)}

        def p_x(self, z, library, y, cells):
            p = super().p_x(z, library, y, cells).base_dist
            shift = cells.shared["shift"].unsqueeze(-1) - 1.0
            return dist.Normal(p.loc + shift, p.scale).to_event(1)

        def more_of_guide(self, cells):
            half = dist.Normal(0.2 * cells.x[:, 0], 0.45)
            v = pyro.sample("half_w", half, infer={"is_auxiliary": True})
            log_density = torch.full_like(v, -np.log(2.0))
            pyro.sample("w", dist.Delta(2 * v, log_density=log_density))

    vae = Auxiliary()
    assert_unbiased(vae, vae.exact_log_joint(normal_cells(3).x.numpy()))
    assert TraceWeights(vae, True).numbers_per_draw(normal_cells(1)) == 3 * 5
