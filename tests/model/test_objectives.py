"""Particles, importance-weighted bounds, losses of Pyro: by hand, by normal theory, by limits."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from scipy.special import logsumexp

from pyro_scanvi import ELBO, IWAE, SCANVAE, InputError, PyroLoss, Renyi, SemiSupervisedELBO
from pyro_scanvi.model.objective import ObjectiveParts
from pyro_scanvi.training.settings import Plan
from tests.examples import SIZES, random_cells
from tests.model.test_objective import MODELS, double_vae, log_normal, log_zinb, one
from tests.posterior.test_importance import (
    LATENT_LIBRARY,
    LinearGaussian,
    log_prior,
    normal_cells,
)

PLAN = Plan(classification_ratio=0.0)
SIGMAS = 5  # two-sided, 6e-7 a comparison


def table(vae, n, k, seed=3):
    """Noise for z, u of each label, and l, by number of dimensions and width."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    width = vae.n_latent
    return {
        (2, width): normal(k, n, width),
        (3, width): normal(3, k, n, width),
        (2, 1): normal(k, n, 1),
    }


@pytest.fixture
def play(monkeypatch):
    """Normals draw from a table: all particles, or the one that is told."""

    def from_table(noise, particle=None):
        def draw(shape, dtype, device):
            found = noise[len(shape) - (particle is None), shape[-1]]
            return found if particle is None else found[..., particle, :, :]

        monkeypatch.setattr(torch.distributions.normal, "_standard_normal", draw)

    return from_table


def seeded(objective, vae, cells, seed=1, plan=PLAN) -> ObjectiveParts:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return objective(vae, plan).parts(cells)


def gradients(loss, vae):
    parameters = dict(vae.named_parameters())
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    return {n: torch.zeros(1) if g is None else g for n, g in zip(parameters, found, strict=True)}


def assert_same(loss, expected, vae):
    """Value and the gradient of every parameter."""
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    found, right = gradients(loss, vae), gradients(expected, vae)
    largest = max(g.abs().max() for g in right.values())
    for name, gradient in right.items():
        assert (found[name] - gradient).abs().max() <= 1e-8 * largest, name


# ---- particles --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("closed_form", [("u", "l"), ()])
def test_particles_are_the_mean_of_single_draws(play, model, closed_form):
    vae = double_vae(**MODELS[model])
    cells = random_cells(vae, n_obs=100)
    noise = table(vae, len(cells), 3)
    plan = Plan(classification_ratio=7.0)
    play(noise)
    several = ELBO(closed_form, num_particles=3)(vae, plan)
    several.kl_weight = 0.3
    assert several.kl_weight == 0.3
    found = several.parts(cells)
    singles = []
    for k in range(3):
        play(noise, k)
        single = ELBO(closed_form)(vae, plan)
        single.kl_weight = 0.3
        singles.append(single.parts(cells))
    assert_same(found.loss, torch.stack([s.loss for s in singles]).mean(), vae)
    elbo = torch.stack([s.elbo() for s in singles]).mean(0)
    torch.testing.assert_close(found.elbo(), elbo, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.logits, singles[0].logits)


def test_particles_keep_the_mean_and_divide_the_variance():
    """2,000 copies of a cell are 2,000 estimates. False alarms in 1e-6 of the runs."""
    vae = double_vae()
    cells = random_cells(vae, "none", n=2000)
    cells = replace(cells, x=cells.x[:1].expand(2000, -1), batch=cells.batch * 0)
    with torch.no_grad():
        one, four = (seeded(ELBO((), num_particles=k), vae, cells).elbo() for k in (1, 4))
    error = ((one.var() + four.var()) / 2000) ** 0.5
    assert (one.mean() - four.mean()).abs() < SIGMAS * error
    # The logarithm of a ratio of variances has a standard deviation of about 0.05.
    assert math.log(4) - 0.3 < (one.var() / four.var()).log() < math.log(4) + 0.3


class Frequencies(SCANVAE):
    """Label frequencies with a Dirichlet prior, shared by all cells."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_concentration = torch.nn.Parameter(torch.zeros(self.n_labels))

    def p_shared(self):
        return {"pi": dist.Dirichlet(torch.full((self.n_labels,), 2.0, dtype=torch.float64))}

    def q_shared(self):
        return {"pi": dist.Dirichlet(3 * self.log_concentration.exp())}

    def p_y(self, cells):
        return dist.OneHotCategorical(cells.shared["pi"])


@pytest.mark.parametrize("objective", [ELBO(num_particles=3), IWAE(3), IWAE(3, sum_labels=False)])
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_what_cells_share_is_drawn_once_and_its_kl_stays_outside(objective, kl_weight):
    vae = Frequencies(**SIZES).double().eval()
    cells = random_cells(vae, "none", n_obs=100)
    bound = objective(vae, PLAN)
    _, guide_trace = bound.elbo.traces(vae.model, vae.guide, cells)
    assert guide_trace.nodes["pi"]["value"].shape == (3,)
    assert guide_trace.nodes["z"]["value"].shape == (3, 12, 4)
    bound.kl_weight = kl_weight
    torch.manual_seed(0)
    parts = bound.parts(cells)
    kl = torch.distributions.kl_divergence(vae.q_shared()["pi"], vae.p_shared()["pi"])
    torch.testing.assert_close(parts.kl_global, kl.detach())
    gradient = torch.autograd.grad(parts.loss, vae.log_concentration)[0]
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    if kl_weight == 1:
        torch.testing.assert_close(parts.loss.detach(), -parts.elbo().mean())
    whole = random_cells(vae, "none")  # as many cells as share it
    bound.kl_weight = 0.0
    torch.manual_seed(0)
    without = bound.parts(whole).loss
    torch.manual_seed(0)
    few = bound.parts(cells).loss
    torch.testing.assert_close(few, without)  # at weight 0 it is not there


# ---- the importance-weighted bound ------------------------------------------------------------


def log_weights(vae, cells, noise, k, kl_weight=1.0):
    """Log weight of draw k for every label, (L, N), from the networks."""
    batch = one(cells.batch, 2) if vae.n_batch == 2 else None
    zeros = torch.zeros(len(cells), vae.n_latent, dtype=torch.float64)
    loc, scale = vae.z_encoder((1 + cells.x).log(), batch)
    z = loc + scale * noise[2, vae.n_latent][k]
    library, log_l = cells.x.sum(-1, keepdim=True), 0.0
    if vae.latent_library:
        l_loc, l_scale = vae.l_encoder((1 + cells.x).log(), batch)
        m, v = vae.library_log_means[cells.batch], vae.library_log_vars[cells.batch]
        log_library = l_loc + l_scale * noise[2, 1][k]
        log_l = log_normal(log_library, m[:, None], v[:, None].sqrt())
        log_l = log_l - log_normal(log_library, l_loc, l_scale)
        library = log_library.exp()
    hidden = vae.x_decoder(z, batch)
    mu, gate = library * vae.x_decoder.expression(hidden), vae.x_decoder.gate(hidden)
    rows = []
    for y in range(3):
        label = torch.full((len(cells),), y)
        u_loc, u_scale = vae.u_encoder(z, one(label, 3))
        u = u_loc + u_scale * noise[3, vae.n_latent][y, k]
        theta = vae.dispersion.log_theta.exp()
        theta = theta[label] if theta.ndim == 2 else theta
        log_u = log_normal(u, zeros, zeros + 1) - log_normal(u, u_loc, u_scale)
        log_p = log_zinb(cells.x, mu, theta, gate) - log_normal(z, loc, scale)
        log_p = log_p + log_normal(z, *vae.z_decoder(u, one(label, 3)))
        rows.append(log_p + kl_weight * (log_u + log_l + log_prior(vae)[y]))
    return torch.stack(rows)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("n_draws", [1, 3])
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_the_weighted_bound_is_the_sum_by_hand(play, model, n_draws, kl_weight):
    """Log of the mean over draws of the sum over labels, cell by cell."""
    vae = double_vae(**MODELS[model])
    cells = random_cells(vae, "none", n_obs=100)
    noise = table(vae, len(cells), n_draws)
    play(noise, None if n_draws > 1 else 0)
    bound = IWAE(n_draws)(vae, PLAN)
    bound.kl_weight = kl_weight
    parts = bound.parts(cells)

    def by_hand(weight):
        draws = [log_weights(vae, cells, noise, k, weight) for k in range(n_draws)]
        return torch.stack(draws).logsumexp((0, 1)) - math.log(n_draws)

    assert_same(parts.loss, -by_hand(kl_weight).mean(), vae)
    torch.testing.assert_close(parts.elbo(), by_hand(1.0).detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("labels", ["all", "mixed", "none"])
@pytest.mark.parametrize("feed_labels", [True, False])
def test_one_draw_without_the_sum_is_the_sampled_elbo(labels, feed_labels):
    vae = double_vae(**MODELS["rich"])
    cells = random_cells(vae, labels, n_obs=100)
    plan = Plan(classification_ratio=7.0, feed_labels=feed_labels)
    single = IWAE(1, sum_labels=False)
    found, expected = (seeded(o, vae, cells, plan=plan) for o in (single, ELBO(())))
    assert_same(found.loss, expected.loss, vae)
    torch.testing.assert_close(found.elbo(), expected.elbo(), rtol=1e-10, atol=0)


def test_the_sum_over_labels_lies_above_and_holds_no_classifier():
    """Jensen's inequality at the same draws, cell by cell."""
    vae = double_vae()
    cells = random_cells(vae, "none")
    summed, expected = (seeded(IWAE(3, sum_labels=s), vae, cells) for s in (True, False))
    assert (summed.elbo() > expected.elbo()).all()
    of_classifier = [
        max(g.abs().max() for n, g in gradients(p.loss, vae).items() if "classifier" in n)
        for p in (summed, expected)
    ]
    assert of_classifier[0] == 0 < of_classifier[1]


def test_how_many_cells_there_are_changes_no_bound(play):
    """Renyi's, of a minibatch, would be that of its product to the power N / n."""
    vae = double_vae()
    cells = random_cells(vae, n=12)
    play(table(vae, 12, 3))
    losses = [IWAE(3)(vae, PLAN).parts(replace(cells, n_obs=n)).loss for n in (12, 1200)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_cells_count_by_their_weight(play):
    vae = double_vae()
    weight = torch.arange(1.0, 13.0).double() / 6.5  # of mean 1
    cells = replace(random_cells(vae, n=12), weight=weight)
    play(table(vae, 12, 3))
    parts = IWAE(3)(vae, PLAN).parts(cells)
    torch.testing.assert_close(parts.loss.detach(), -(weight * parts.elbo()).mean())


@pytest.mark.parametrize("changes", [{}, LATENT_LIBRARY, {"y_prior": [0.7, 0.2, 0.1]}])
def test_many_draws_approach_the_likelihood_of_a_mixture_of_normals(changes):
    """u is drawn once for each label and draw. The error is 0.03 to 0.07, the bound three times."""
    vae, cells = LinearGaussian(**changes).eval(), normal_cells(20)
    joint = vae.exact_log_joint(cells.x.numpy())
    label = torch.arange(20) % 4 - 1  # of every fourth it is not known
    with torch.no_grad():
        found = seeded(IWAE(2000), vae, replace(cells, label=label)).elbo().numpy()
    exact = np.where(label < 0, logsumexp(joint, axis=1), joint[np.arange(20), label])
    np.testing.assert_allclose(found, exact, atol=0.2)


@pytest.mark.parametrize("sum_labels", [True, False])
def test_more_draws_raise_the_bound_and_never_pass_the_truth(sum_labels):
    """Burda et al., theorem 1, over 2,000 replicates. False alarms in 3e-6 of the runs."""
    vae, cells = LinearGaussian().eval(), normal_cells(1, 2000)
    exact = logsumexp(vae.exact_log_joint(cells.x[:1].numpy()))
    with torch.no_grad():
        found = [seeded(IWAE(k, sum_labels), vae, cells).elbo() for k in (1, 4, 16)]
    mean = np.array([f.mean() for f in found])
    error = np.array([f.std() for f in found]) / 2000**0.5
    assert (np.diff(mean) > SIGMAS * np.hypot(error[1:], error[:-1])).all()
    assert (mean < exact + SIGMAS * error).all()


class ExactLabels(LinearGaussian):
    """q(u | z, y) and q(y | z) are the posteriors given z."""

    def __init__(self):
        super().__init__()
        self.wider, self.off = 1.0, 0.0

    def q_z(self, cells):
        return dist.Normal(torch.zeros(len(cells), 2).double(), 1.0).to_event(1)

    def q_y(self, z, cells):
        covariance = self.A @ self.A.T + self.noise_z**2 * torch.eye(2).double()
        log_p_z = dist.MultivariateNormal(self.m, covariance).log_prob(z.unsqueeze(-2))
        seen = self.p_x(z.unsqueeze(-2), None, torch.eye(3).double(), cells)
        log_p_x = seen.log_prob(cells.x.unsqueeze(-2))
        return dist.OneHotCategorical(logits=log_prior(self) + log_p_z + log_p_x)


def test_the_sum_is_the_expectation_where_the_classifier_is_right():
    """Then one draw of either is log p(x | z) p(z) / q(z)."""
    vae, cells = ExactLabels().eval(), normal_cells(6)
    summed, expected = (seeded(IWAE(2, sum_labels=s), vae, cells).elbo() for s in (True, False))
    torch.testing.assert_close(summed, expected, rtol=0, atol=1e-6)


class Coin(SCANVAE):
    """One more site in the plate, whose draws have no gradient."""

    @contextmanager
    def plate(self, cells):
        with super().plate(cells):
            pyro.sample("coin", dist.Bernoulli(self.y_prior[0]))
            yield


class Doubling(Messenger):
    def _pyro_sample(self, msg):
        msg["scale"] = msg["scale"] * (1 + (msg["name"] == "x"))


class Louder(SCANVAE):
    """What is seen counts twice."""

    def model(self, cells):
        with Doubling():
            super().model(cells)


@pytest.mark.parametrize(
    "kind, message",
    [(Coin, "'coin' of the guide.*no rsample"), (Louder, "'x' has a scale of its own")],
)
def test_what_the_bound_cannot_weigh_is_refused(kind, message):
    vae = kind(**SIZES).double().eval()
    with pytest.raises(InputError, match=message):
        IWAE(2)(vae, PLAN).parts(random_cells(vae))
    assert ELBO(num_particles=2)(vae, PLAN).parts(random_cells(vae)).loss.isfinite()


@pytest.mark.parametrize("make", [ELBO, IWAE, lambda **n: Renyi(0.5, **n)])
@pytest.mark.parametrize("n", [0, 2.5, "many", True])
def test_numbers_of_particles_are_checked(make, n):
    with pytest.raises(InputError, match="num_particles"):
        make(num_particles=n)


def test_flags_are_checked():
    with pytest.raises(InputError, match="sum_labels='yes', expected True or False"):
        IWAE(sum_labels="yes")


# ---- Renyi's bound ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 2.0])
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_renyis_bound_is_the_power_mean_by_hand(play, alpha, kl_weight):
    """Of the weights of three draws, summed over labels, as powers of numbers."""
    vae = double_vae(**MODELS["rich"])
    cells = random_cells(vae, "none", n_obs=100)
    noise = table(vae, len(cells), 3)
    play(noise)
    bound = Renyi(alpha, 3)(vae, PLAN)
    bound.kl_weight = kl_weight
    parts = bound.parts(cells)

    def by_hand(weight):
        log_w = torch.stack([log_weights(vae, cells, noise, k, weight) for k in range(3)])
        log_w = log_w.logsumexp(1)
        shift = log_w.mean(0)
        powers = (log_w - shift).exp() ** (1 - alpha)
        return shift + powers.mean(0).log() / (1 - alpha)

    assert_same(parts.loss, -by_hand(kl_weight).mean(), vae)
    torch.testing.assert_close(parts.elbo(), by_hand(1.0).detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("sum_labels", [True, False])
def test_renyis_bound_at_zero_is_that_of_the_weights(sum_labels):
    vae = double_vae()
    found, weighted = (
        seeded(o, vae, random_cells(vae)) for o in (Renyi(0, 3, sum_labels), IWAE(3, sum_labels))
    )
    assert found.loss == weighted.loss and torch.equal(found.elbo(), weighted.elbo())


@pytest.mark.parametrize("alpha, close", [(1, 1e-10), (1 - 1e-9, 1e-4), (1 + 1e-9, 1e-4)])
def test_renyis_bound_at_one_is_the_elbo(alpha, close):
    """Of the same draws; beside one it differs by 5e-10 of their variance, 8,000."""
    vae = double_vae(**MODELS["rich"])
    cells = random_cells(vae)
    found, elbo = (
        seeded(o, vae, cells)
        for o in (Renyi(alpha, 3, sum_labels=False), ELBO((), num_particles=3))
    )
    torch.testing.assert_close(found.elbo(), elbo.elbo(), rtol=0, atol=close)
    if alpha == 1:
        assert_same(found.loss, elbo.loss, vae)


def test_renyis_bound_falls_as_alpha_rises():
    """Power means are ordered, whatever the draws."""
    vae = double_vae()
    cells = random_cells(vae, "none")
    bounds = torch.stack([seeded(Renyi(a, 4), vae, cells).elbo() for a in (0, 0.5, 1, 2, 5)])
    assert (bounds.diff(dim=0) < 0).all()


@pytest.mark.parametrize("alpha", [-1, math.inf, math.nan, "half", True])
def test_alpha_is_checked(alpha):
    with pytest.raises(InputError, match="alpha"):
        Renyi(alpha)


# ---- losses of Pyro ---------------------------------------------------------------------------


@pytest.mark.parametrize("feed_labels", [True, False])
def test_a_loss_of_pyro_is_taken_as_it_is(float64, feed_labels):
    """The same draws, KLs by Monte Carlo and no classification: our ELBO, value and gradient."""
    vae = double_vae(**MODELS["rich"])
    cells = random_cells(vae, n_obs=100)
    plan = Plan(classification_ratio=0.0, feed_labels=feed_labels)
    pyros = PyroLoss(TraceEnum_ELBO(max_plate_nesting=1))
    found, expected = (seeded(o, vae, cells, plan=plan) for o in (pyros, ELBO(())))
    assert_same(found.loss, expected.loss, vae)
    torch.testing.assert_close(found.elbo(), -expected.loss.detach())
    with torch.no_grad():
        scored = seeded(pyros, vae, cells, plan=plan)
    torch.testing.assert_close(scored.loss, found.loss.detach())
    assert pyros(vae, plan).kl_weight is None


def test_a_loss_that_is_no_tensor_is_refused():
    with pytest.raises(InputError, match="RenyiELBO has no differentiable_loss"):
        PyroLoss(RenyiELBO())


# ---- one of one's own -------------------------------------------------------------------------


def test_a_subclass_is_handed_in_by_its_class(play):
    class Tempered(SemiSupervisedELBO):
        def bound(self, model_trace, guide_trace):
            return 0.5 * super().bound(model_trace, guide_trace)

    vae = double_vae()
    cells = random_cells(vae)
    found, plain = (seeded(o, vae, cells) for o in (ELBO(kind=Tempered), ELBO()))
    torch.testing.assert_close(found.loss, 0.5 * plain.loss)


def test_without_a_classifier_nothing_is_classified():
    vae = double_vae()
    bound = SemiSupervisedELBO(None, num_particles=2)(vae.model, vae.guide)
    parts = bound.parts(random_cells(vae, "all"))
    assert parts.logits is None and not parts.classification.any()


def test_a_loss_alone_is_enough():
    parts = ObjectiveParts(torch.tensor(3.0, requires_grad=True))
    assert parts.elbo() == -3.0 and not parts.elbo().requires_grad
    assert parts.kl_global == 0 and parts.logits is None
