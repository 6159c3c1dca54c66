"""Simulation-based calibration: right inference passes, and mistakes of several kinds fail.

Each test of a right model would fail for one seed in a hundred (FALSE_ALARM); seeds are fixed.
"""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.distributions import Normal, Poisson
from scipy.stats import binom, chisquare

from pyro_scanvi import InputError
from pyro_scanvi.criticism.calibration import (
    Drawn,
    FromWeights,
    from_guide,
    simulation_based_calibration,
)
from pyro_scanvi.criticism.optional import arviz_plots
from pyro_scanvi.criticism.ranks import Calibration, band, p_value
from tests.criticism.examples import (
    NOISE,
    OFF,
    Conjugate,
    Frequencies,
    Narrow,
    Prior,
    conjugate,
    counts,
)
from tests.examples import small_vae

FALSE_ALARM = 0.01
RUN = {"n_simulations": 400, "n_draws": 49, "seed": 0, "progress_bar": False, "library": 30.0}
POOL = FromWeights(100)


def failing(calibration: Calibration) -> set[str]:
    """Sites with a quantity that fails."""
    table = calibration.test(FALSE_ALARM)
    return set(table.loc[table["fails"], "site"])


# ---- the guide ----------------------------------------------------------------------------------


def test_an_exact_guide_passes():
    found = simulation_based_calibration(conjugate(), **RUN)
    assert failing(found) == set()
    assert found.effective is None
    ranks = found.ranks
    assert list(ranks.columns) == ["simulation", "site", "quantity", "rank"]
    assert ranks["rank"].between(0, 49).all() and len(ranks) == 400 * 10
    assert set(ranks["quantity"]) >= {"z[0]", "u[1]", "y[2]", "code", "log likelihood"}


def test_a_guide_with_half_the_scale_fails_where_it_is_wrong():
    found = simulation_based_calibration(conjugate(Narrow), **RUN)
    assert failing(found) == {"z", "data", "joint"}
    table = found.test().set_index("quantity")
    # Ranks of a posterior of half the scale: the variance of Phi(2 e), e ~ N(0, 1), times 12.
    e = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    expected = 12 * torch.special.ndtr(2 * e).var()
    assert abs(table.loc["z[0]", "spread"] - expected) < 0.2
    assert failing(simulation_based_calibration(conjugate(Narrow), posterior=POOL, **RUN)) == set()


def test_a_posterior_that_is_the_prior_is_seen_by_the_likelihood_alone():
    assert failing(simulation_based_calibration(conjugate(Prior), **RUN)) == {"data", "joint"}


# ---- the model ----------------------------------------------------------------------------------


MODELS = {
    "nb": {},
    "zinb": {"gene_likelihood": "zinb"},
    "poisson": {"gene_likelihood": "poisson"},
    "labels": {"dispersion": "gene-label", "y_prior": [0.7, 0.2, 0.1]},
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_passes_where_it_simulates_itself(kind):
    vae = small_vae(**({"n_latent": 2, "n_input": 6, "gene_likelihood": "nb"} | MODELS[kind]))
    found = simulation_based_calibration(vae.eval(), posterior=POOL, **RUN)
    assert failing(found) == set()
    assert found.effective.median() > 5


def test_a_latent_library_is_drawn_and_ranked():
    vae = counts(use_observed_lib_size=False, library_log_means=[3.0], library_log_vars=[0.1])
    found = simulation_based_calibration(vae, posterior=POOL, **(RUN | {"library": None}))
    assert "l" in set(found.ranks["site"]) and failing(found) == set()


class Own(Conjugate):
    """A story of its own, with a state that the guide does not draw."""

    def model(self, cells):
        with self.plate(cells):
            zeros = torch.zeros(len(cells), 1)
            w = pyro.sample("w", Normal(zeros, 1.0).to_event(1))
            z = pyro.sample("z", Normal(w + torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", Normal(z, NOISE).to_event(1), obs=cells.x)

    def guide(self, cells):
        with self.plate(cells):
            pyro.sample("z", Normal(cells.x, 2 * NOISE).to_event(1))


class TwoModalities(Conjugate):
    """A second modality, which the encoder does not see."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, n_extra={"protein": 1}, **kwargs)

    def observed(self, z, library, y, cells):
        p = Poisson((2 + 1.5 * z[..., :1]).exp()).to_event(1)
        return super().observed(z, library, y, cells) | {"protein": (p, cells.extra["protein"])}


@pytest.mark.parametrize("kind", [Own, TwoModalities])
def test_models_of_ones_own_are_told_and_weighed(kind):
    found = simulation_based_calibration(conjugate(kind), posterior=POOL, **RUN)
    assert failing(found) == set()
    by_guide = simulation_based_calibration(conjugate(kind), **RUN)
    assert "data" in failing(by_guide)  # it lacks what w, or the protein, says of z


def test_what_all_share_is_held_at_one_draw():
    found = simulation_based_calibration(conjugate(Frequencies), posterior=POOL, **RUN)
    assert failing(found) == set() and "pi" not in set(found.ranks["site"])


def test_twice_the_dispersion_is_found():
    run = RUN | {"posterior": POOL, "n_simulations": 1000}
    found = simulation_based_calibration(counts(theta=4.0), simulator=counts(theta=2.0), **run)
    assert "data" in failing(found)


def test_a_label_prior_that_is_ignored_is_found():
    skewed, flat = counts(y_prior=[0.8, 0.1, 0.1]), counts()
    found = simulation_based_calibration(flat, posterior=POOL, simulator=skewed, **RUN)
    assert "y" in failing(found)


def test_a_likelihood_whose_log_probability_is_off_is_found():
    found = simulation_based_calibration(counts(gene_likelihood=OFF), posterior=POOL, **RUN)
    assert "data" in failing(found)


def test_a_pool_of_the_truth_alone_fails_nothing_and_says_so():
    wrong = {"posterior": FromWeights(1), "simulator": counts(theta=2.0)}
    found = simulation_based_calibration(counts(theta=4.0), **wrong, **RUN)
    assert failing(found) == set() and (found.effective == 1).all()


# ---- what is asked and answered -----------------------------------------------------------------


def test_a_seed_repeats_the_ranks_and_leaves_the_generator():
    vae = counts()
    torch.manual_seed(1)
    one = simulation_based_calibration(vae, posterior=POOL, **RUN)
    after = torch.rand(())
    two = simulation_based_calibration(vae, posterior=POOL, **RUN)
    torch.manual_seed(1)
    assert torch.rand(()) == after
    pd.testing.assert_frame_equal(one.ranks, two.ranks)


def test_quantities_and_posteriors_of_ones_own():
    def at_zero(story, cells, n_draws, truth):
        return Drawn(
            {name: value.new_zeros(n_draws, *value.shape) for name, value in truth.items()}
        )

    run = RUN | {"n_simulations": 50, "posterior": at_zero}
    found = simulation_based_calibration(
        conjugate(), quantities={"sum": lambda states, cells: states["z"].sum(-1)}, **run
    )
    ranks = found.ranks[found.ranks["site"] == "own"]["rank"]
    assert set(ranks) == {0, 49}


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(InputError, match="n_draws=0"):
        simulation_based_calibration(conjugate(), n_draws=0)
    with pytest.raises(InputError, match="give library="):
        simulation_based_calibration(conjugate())
    with pytest.raises(InputError, match="no draws|shape None of the state 'u'"):
        simulation_based_calibration(conjugate(), posterior=lambda *_: Drawn({}), **RUN)
    found = simulation_based_calibration(conjugate(), **(RUN | {"n_simulations": 20}))
    with pytest.raises(InputError, match="did you mean 'z z"):
        found.plot_ranks("z", "z")
    with pytest.raises(InputError, match="a probability"):
        found.test(false_alarm=1)


def test_a_site_that_is_not_its_data_is_refused():
    class Doubled(type(conjugate())):
        def observed(self, z, library, y, cells):
            p, _ = super().observed(z, library, y, cells)["x"]
            return {"x": (p, 2 * cells.x)}

    with pytest.raises(InputError, match="Doubled: the observed site 'x' is neither"):
        simulation_based_calibration(conjugate(Doubled), **RUN)


# ---- ranks and their test -----------------------------------------------------------------------


def test_ranks_of_the_exact_posterior_are_uniform_by_another_test():
    ranks = simulation_based_calibration(conjugate(), **RUN).ranks.query("quantity == 'z[0]'")[
        "rank"
    ]
    assert chisquare(np.bincount(ranks // 5, minlength=10)).pvalue > FALSE_ALARM


def test_p_values_are_uniform_under_uniformity():
    """The share below 5 % of 1,000 of them, within the limits of one seed in a hundred."""
    rng = np.random.default_rng(0)
    p = [p_value(rng.integers(10, size=60), n_draws=9) for _ in range(1000)]
    low, high = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], 1000, 0.05)
    assert low <= np.sum(np.array(p) <= 0.05) <= high


def test_the_band_is_left_as_often_as_said():
    rng, points = np.random.default_rng(0), np.arange(1, 20)
    low, high = band(50, n_draws=19, level=0.1)
    ranks = rng.integers(20, size=(2000, 50))
    ecdf = (ranks[..., None] < points).mean(1)
    left = ((ecdf < low - 1e-9) | (ecdf > high + 1e-9)).any(1).sum()
    assert binom.cdf(left, 2000, 0.1) > FALSE_ALARM / 2
    assert left <= binom.ppf(1 - FALSE_ALARM / 2, 2000, 0.1)


def test_plots_show_what_is_tested():
    found = simulation_based_calibration(conjugate(Narrow), **(RUN | {"n_simulations": 100}))
    axes = found.plot("z")
    assert axes.shape == (2, 2)
    line = axes[0, 1].lines[0].get_ydata()
    ranks = found.ranks.query("quantity == 'z[0]'")["rank"].to_numpy()
    expected = [(ranks < k).mean() - k / 50 for k in range(1, 50)]
    np.testing.assert_allclose(line, expected, atol=1e-12)


def test_arviz_plots_them():
    found = simulation_based_calibration(conjugate(), **(RUN | {"n_simulations": 50}))
    tree = found.to_datatree()
    assert tree["prior_sbc"]["z z[0]"].shape == (1, 50)
    shown = arviz_plots().plot_ecdf_pit(tree, var_names=["z z[0]"], backend="none")
    assert shown is not None


def test_the_posterior_of_the_guide_is_the_default():
    torch.manual_seed(0)
    one = simulation_based_calibration(conjugate(), **RUN)
    two = simulation_based_calibration(conjugate(), posterior=from_guide, **RUN)
    pd.testing.assert_frame_equal(one.ranks, two.ranks)
