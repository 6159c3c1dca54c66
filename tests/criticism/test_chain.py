"""Chains through the truth: uniform ranks where all is right, a mistake is found."""

import torch
from pyro.distributions import Normal

from pyro_scanvi.criticism.calibration import simulation_based_calibration
from pyro_scanvi.criticism.chain import FromChain, Kernel, State, tuned
from pyro_scanvi.criticism.story import Story
from pyro_scanvi.posterior.draws import evaluating
from tests.criticism.examples import NOISE, Conjugate, Prior, conjugate, counts
from tests.criticism.test_calibration import FALSE_ALARM, failing

CHAIN = FromChain(n_leapfrog=4, n_tuning=8)
RUN = {"n_simulations": 200, "n_draws": 11, "seed": 0, "progress_bar": False, "library": 30.0}


class Louder(Prior):
    """Twice the noise."""

    def observed(self, z, library, y, cells):
        return {"x": (Normal(z, 2 * NOISE).to_event(1), cells.x)}


def test_a_chain_passes_whatever_the_guide_is():
    """Of a right model one seed in a hundred would fail."""
    found = simulation_based_calibration(conjugate(Prior), posterior=CHAIN, **RUN)
    assert FALSE_ALARM == 0.01 and failing(found) == set()
    assert found.effective.median() > 2


def test_a_density_that_is_not_what_simulates_fails():
    louder = conjugate(Louder)
    found = simulation_based_calibration(conjugate(Prior), posterior=CHAIN, simulator=louder, **RUN)
    assert "data" in failing(found)


def test_a_chain_finds_the_posterior():
    """From a draw of the prior, in Gaussian models; z values of 2 x 400 means and variances."""
    vae = conjugate(Prior)
    torch.manual_seed(0)
    with evaluating(vae):
        cells = vae.unseen(400, library=1.0)
        story = Story.drawn(vae, cells)
        _, cells = story.told(cells)
        kernel = tuned(story, cells, n_leapfrog=4, n_steps=16)
        state = kernel.state({n: v[:1] for n, v in story.draws(cells, 1).items()})
        for _ in range(8):
            state, accepted = kernel.step(state)
    assert 0.6 < accepted.mean() < 0.98
    exact = Conjugate.q_z(vae, cells).base_dist
    z = ((state.free["z"][0] - exact.loc) / exact.scale).reshape(-1)
    assert abs(z.mean()) < 4 / len(z) ** 0.5 and abs(z.var() - 1) < 4 * (2 / len(z)) ** 0.5
    frequencies = state.discrete["y"][0].mean(0)
    spread = (vae.y_prior * (1 - vae.y_prior) / 400).sqrt()
    assert ((frequencies - vae.y_prior).abs() < 4 * spread).all()


def test_what_has_not_moved_is_the_truth_to_the_bit():
    """A library is positive: its logarithm and back is not the same number."""
    vae = counts(use_observed_lib_size=False, library_log_means=[3.0], library_log_vars=[0.1])
    torch.manual_seed(0)
    with evaluating(vae):
        cells = vae.unseen(50)
        story = Story.drawn(vae, cells)
        truth, cells = story.told(cells)
        kernel: Kernel = tuned(story, cells, n_leapfrog=1, n_steps=2)
        state = kernel.state({name: value[None] for name, value in truth.items()})
        again = State({name: value.clone() for name, value in state.free.items()}, state.discrete)
        for name, value in kernel.values(again, state, truth).items():
            assert torch.equal(value[0], truth[name])
