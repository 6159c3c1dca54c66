"""Noise of gradients: known by hand for a loss, and for labels that are drawn or enumerated."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

from pyro_scanvi import ELBO, SCANVAE, Cells, InputError
from pyro_scanvi.experiments import (
    ESTIMATORS,
    DrawnLabels,
    gradient_noise,
    noise_summary,
    plot_gradient_noise,
)
from pyro_scanvi.experiments.gradients import pairs_of_gradients, parameters_by_part
from pyro_scanvi.training.settings import Plan
from tests.examples import SIZES, as_they_are, simulated, small_model
from tests.experiments.examples import SIGMAS, left_alone

PLAN = Plan(classification_ratio=0.0)
N_CELLS = 100


@pytest.fixture(scope="module")
def model():
    """As it is made; the tests only read it."""
    return as_they_are(small_model(simulated(30)))


def measured(loss, parts, n_pairs, seed=0):
    """Variance and signal of each pair, by part."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pairs = [measured for measured, _ in pairs_of_gradients(loss, parts, n_pairs)]
    return {part: np.array([p[part] for p in pairs]).T for part in parts}


def assert_mean(values, expected):
    """False alarms in 6e-7 of the comparisons of hundreds of values, in 3e-5 of those of thirty."""
    error = values.std(ddof=1) / len(values) ** 0.5
    assert abs(values.mean() - expected) < SIGMAS * error, (values.mean(), expected, error)


def test_variance_and_signal_of_a_known_gradient():
    """Of a * (mean + sd * noise) it is mean + sd * noise; what the loss does not hold has none."""
    a, b, c = (nn.Parameter(torch.ones(n)) for n in (3, 2, 1))
    mean, sd = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 1.0, 2.0])

    def loss():
        return (a * (mean + sd * torch.randn(3))).sum() + 3 * b.sum()

    found = measured(loss, {"a": [a], "b": [b], "c": [c]}, 400)
    assert_mean(found["a"][0], (sd**2).sum().item())
    assert_mean(found["a"][1], (mean**2).sum().item())
    np.testing.assert_allclose(found["b"], np.array([[0.0], [18.0]]).repeat(400, 1))
    assert not found["c"].any()


class OnlyLabels(SCANVAE):
    """q(y) is the one factor that is trained; all others are the same in model and guide."""

    def __init__(self):
        super().__init__(**SIZES)
        self.requires_grad_(False)
        self.logits = nn.Parameter(torch.tensor([0.0, 1.0, -1.0]))

    def normal(self, *shape):
        return dist.Normal(torch.zeros(*shape), 1.0).to_event(1)

    def q_z(self, cells):
        return self.normal(len(cells), self.n_latent)

    def q_u(self, z, y, cells):
        return self.normal(*torch.broadcast_shapes(z.shape[:-1], y.shape[:-1]), self.n_latent)

    def p_z(self, u, y, cells):
        return self.normal(*torch.broadcast_shapes(u.shape[:-1], y.shape[:-1]), self.n_latent)

    def p_x(self, z, library, y, cells):
        return self.normal(len(cells), self.n_input)

    def q_y(self, z, cells):
        return dist.OneHotCategorical(logits=self.logits.expand(*z.shape[:-1], 3))


def known(vae, cells):
    """Variance and squared mean of the score-function gradient of the mean over cells."""
    q = vae.logits.detach().double().softmax(0).numpy()
    log_p_x = dist.Normal(0.0, 1.0).log_prob(cells.x[0].double()).sum().item()
    cost = np.log(q) + np.log(3.0) - log_p_x  # log q(y) - log p(y) - log p(x)
    draws = cost[:, None] * (np.eye(3) - q)  # of a cell, by its label
    mean = q @ draws
    return (q @ (draws**2).sum(1) - mean @ mean) / N_CELLS, mean @ mean


def test_drawn_labels_have_the_variance_of_the_score_function():
    """All cells are alike, so that their labels are independent draws of one gradient."""
    vae, cells = OnlyLabels().eval(), Cells.from_counts(torch.ones(N_CELLS, 20))
    parts = parameters_by_part(vae)
    assert list(parts) == ["logits"]
    bound = DrawnLabels(Trace_ELBO())(vae, PLAN)
    variance, signal = measured(lambda: bound.parts(cells).loss, parts, 30)["logits"]
    expected = known(vae, cells)
    assert_mean(variance, expected[0])
    assert_mean(signal, expected[1])
    exact = ELBO()(vae, PLAN)
    variance, signal = measured(lambda: exact.parts(cells).loss, parts, 1)["logits"]
    assert abs(variance[0]) < 1e-9
    np.testing.assert_allclose(signal, expected[1], rtol=1e-3)


@pytest.mark.parametrize("feed_labels", [True, False])
def test_drawn_labels_have_the_gradient_of_enumerated_ones(model, feed_labels):
    """In expectation, of networks and labels as they are; 5e-4 false alarms a part (t of 10)."""
    found = gradient_noise(
        model,
        {"enumerated": ELBO(), "drawn": DrawnLabels(Trace_ELBO())},
        n_pairs=6,
        n_cells=20,
        feed_labels=feed_labels,
        progress_bar=False,
    )
    table = found.query("metric == 'signal'").pivot_table(
        "value", "draw", ["part", "setting"], sort=False
    )
    for part in ("z_decoder", "x_decoder"):
        one, other = table[part, "enumerated"], table[part, "drawn"]
        error = np.hypot(one.sem(), other.sem())
        assert abs(one.mean() - other.mean()) < SIGMAS * error


def test_the_table_and_its_picture(model):
    with left_alone(model):
        found = gradient_noise(
            model, ESTIMATORS, n_pairs=1, n_cells=5, seeds=(3, 4), progress_bar=False
        )
    columns = ["seed", "setting", "part", "draw", "metric", "value"]
    assert list(found) == columns and found["value"].notna().all()
    parts = {"z_encoder", "u_encoder", "classifier", "z_decoder", "x_decoder", "dispersion"}
    assert set(found["part"]) == parts | {"all"}
    assert list(dict.fromkeys(found["setting"])) == list(ESTIMATORS)
    one = found.query("setting == 'ELBO' and part == 'x_decoder'").set_index("metric")["value"]
    seconds = found.query("setting == 'ELBO' and metric == 'seconds'")["value"].mean()
    np.testing.assert_allclose(one["cost"], one["variance"] * seconds)
    table = noise_summary(found)
    assert (table["n"] == 2).all() and (table["low"] <= table["mean"]).all()
    axis = plot_gradient_noise(found)
    assert axis.get_xscale() == "log" and len(axis.get_yticklabels()) == len(ESTIMATORS)


def test_a_seed_repeats_the_numbers(model):
    def ask():
        found = gradient_noise(model, {"a": ELBO()}, n_pairs=1, n_cells=5, progress_bar=False)
        return found[found["metric"].isin(["variance", "signal"])]

    assert ask().equals(ask())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_pairs": 0}, "n_pairs=0"),
        ({"n_cells": 1000}, "n_cells=1000, expected at most 30"),
        ({"seeds": ()}, "seeds"),
        ({"feed_labels": 1}, "feed_labels=1"),
        ({"estimators": {}}, "expected objectives by name"),
        ({"estimators": {"a": "ELBO"}}, "expected objectives by name"),
        ({"estimators": {"a": lambda vae, plan: 3}}, "gives int"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, changes, message):
    with pytest.raises(InputError, match=message):
        gradient_noise(model, progress_bar=False, **changes)


def test_a_loss_without_a_gradient_is_refused():
    with pytest.raises(InputError, match="RenyiELBO has no differentiable_loss"):
        DrawnLabels(RenyiELBO())
