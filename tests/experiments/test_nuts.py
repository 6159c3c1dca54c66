"""NUTS against an exact Normal posterior; what is made of its draws."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_scanvi import InputError
from pyro_scanvi.experiments import nuts, nuts_against_guide, plot_nuts_against_guide
from tests.examples import as_they_are, simulated, small_model
from tests.experiments.examples import SIGMAS, Conjugate, left_alone
from tests.posterior.test_importance import normal_cells


def standardised(vae, cells, drawn):
    """z, and u given z, less the exact mean and by the exact standard deviation."""
    for name, (gain, covariance), mean in (
        ("z", vae.given_x(), lambda gain: (cells.x - vae.m[0] @ vae.B.T - vae.d[0]) @ gain.T),
        ("u", vae.given_z(), lambda gain: (drawn["z"] - vae.m[0]) @ gain.T),
    ):
        centre = mean(gain) + (vae.m[0] if name == "z" else 0)
        yield (drawn[name] - centre) / covariance.diagonal().sqrt()


def test_nuts_finds_the_exact_posterior():
    """Of 20 cells, of which 30 draws are taken for 3 independent ones: 6e-7 a comparison."""
    vae, cells = Conjugate().eval(), normal_cells(20)
    drawn = nuts.states_by_nuts(vae, cells, 30, 20, max_tree_depth=2, seed=0)
    assert drawn["z"].shape == (30, 20, 2)
    for found in standardised(vae, cells, drawn):
        assert (found.mean((0, 1)).abs() < SIGMAS / 60**0.5).all()
        assert (found.var((0, 1)).log().abs() < SIGMAS * (2 / 60) ** 0.5).all()


@pytest.fixture
def model():
    return as_they_are(small_model(simulated(30)))


def test_what_is_told_of_draws(model, monkeypatch):
    """Draws of the guide itself, moved by one standard deviation and twice as wide: 6e-7 each."""
    n = 4000

    def moved(vae, cells, n_draws, n_warmup, max_tree_depth, seed):
        q = vae.q_z(cells).base_dist
        torch.manual_seed(seed)
        return {"z": dist.Normal(q.loc + 2 * q.scale, 2 * q.scale).sample((n,)).detach()}

    monkeypatch.setattr(nuts, "states_by_nuts", moved)
    found = nuts_against_guide(model, n_cells=2, seeds=(1, 2), progress_bar=False)
    assert list(found) == ["seed", "setting", "cell", "dim", "metric", "value"]
    values = {metric: rows["value"].to_numpy() for metric, rows in found.groupby("metric")}
    assert all(len(v) == 2 * 2 * model.module.n_latent for v in values.values())
    np.testing.assert_allclose(values["mean_difference"], 1.0, atol=2 * SIGMAS / n**0.5)
    np.testing.assert_allclose(values["sd_ratio"], 0.5, atol=SIGMAS * 0.5 / (2 * n) ** 0.5)
    assert (values["rhat"] < 1.01).all() and (values["ess"] > n).all()
    axis = plot_nuts_against_guide(found)
    assert len(axis.get_legend().get_texts()) == 2


@pytest.mark.parametrize("changes", [{}, {"use_observed_lib_size": False}])
def test_chains_run_and_leave_the_model_alone(changes):
    model = as_they_are(small_model(simulated(30), **changes))
    with left_alone(model):
        found = nuts_against_guide(
            model,
            positions=[3],
            n_draws=4,
            n_warmup=1,
            max_tree_depth=1,
            seeds=(0, 1),
            progress_bar=False,
        )
    assert set(found["cell"]) == {"cell3"} and set(found["dim"]) == set(range(4))


def test_a_chain_that_does_not_move_says_nothing(model, monkeypatch):
    """NaN, which a summary leaves out, and no number that looks like one."""

    def stuck(vae, cells, n_draws, *others):
        return {"z": torch.zeros(n_draws, 1, 4)}

    monkeypatch.setattr(nuts, "states_by_nuts", stuck)
    found = nuts_against_guide(model, n_cells=1, n_draws=4, seeds=(0, 1), progress_bar=False)
    values = found.set_index("metric")["value"]
    assert values[["mean_difference", "sd_ratio", "rhat"]].isna().all()


def test_what_cells_share_is_held(model):
    noisy = as_they_are(small_model(simulated(30), label_noise="dirichlet"))
    drawn = nuts.states_by_nuts(
        nuts.copy_of(noisy), nuts.some_cells(noisy, [3], 1)[1], 2, 1, max_tree_depth=1, seed=0
    )
    assert set(drawn) == {"u", "z"}


def test_moments_of_a_guide_without_a_mean():
    base = dist.Normal(torch.zeros(3, 2), 0.5).to_event(1)
    flow = dist.TransformedDistribution(base, dist.transforms.AffineTransform(1.0, 2.0))
    mean, sd = nuts.moments(flow)
    torch.testing.assert_close(mean, torch.ones(3, 2), atol=SIGMAS * 0.01, rtol=0)
    torch.testing.assert_close(sd, torch.ones(3, 2), atol=SIGMAS * 0.01, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_draws": 3}, "n_draws=3"),
        ({"seeds": (0,)}, "expected two or more: each is a chain"),
        ({"n_cells": 31}, "at most 30"),
        ({"progress_bar": "yes"}, "progress_bar"),
    ],
)
def test_what_cannot_be_sampled_is_refused(model, changes, message):
    with pytest.raises(InputError, match=message):
        nuts_against_guide(model, **changes)


def test_without_arviz_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz_stats.base", None)
    with pytest.raises(InputError, match=r"pip install 'pyro-scanvi\[arviz\]'"):
        nuts_against_guide(model)
