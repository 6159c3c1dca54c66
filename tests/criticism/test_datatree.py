"""The DataTree against sums by hand, and leave-one-out against its closed form."""

import warnings

import numpy as np
import pytest
import torch
from pyro.distributions import Gamma, Normal, OneHotCategorical, Poisson
from scipy.special import gammaln
from scipy.stats import binom, poisson
from torch import nn

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.criticism.datatree import leave_one_out, to_datatree
from pyro_scanvi.criticism.optional import arviz_plots, arviz_stats
from tests.criticism.test_held_out import Linear, exact, linear
from tests.examples import as_they_are, simulated

N, G = 30, 20
RUN = {"seed": 0, "progress_bar": False}


class Rate(SCANVAE):
    """lambda ~ Gamma(1, 1) for all cells and genes, x ~ Poisson(lambda); states are of no use."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counts = nn.Parameter(torch.ones(2))  # shape and rate of q

    def p_shared(self):
        return {"rate": Gamma(torch.ones(()), torch.ones(()))}

    def q_shared(self):
        return {"rate": Gamma(self.counts[0], self.counts[1])}

    def p_z(self, u, y, cells):
        return Normal(torch.zeros_like(u), 1.0).to_event(1)

    def p_x(self, z, library, y, cells):
        rate = cells.shared["rate"].unsqueeze(-1) + torch.zeros_like(z[..., :1])
        return Poisson(rate.expand(*rate.shape[:-1], self.n_input)).to_event(1)

    def q_z(self, cells):
        return Normal(torch.zeros(len(cells), self.n_latent), 1.0).to_event(1)

    def q_y(self, z, cells):
        return OneHotCategorical(self.y_prior.expand(*z.shape[:-1], -1))

    def q_u(self, z, y, cells):
        return Normal(torch.zeros_like(z), 1.0).to_event(1)


def rates() -> SCANVI:
    """With the exact posterior of its rate."""
    adata = simulated(N)
    adata.X = np.random.default_rng(1).poisson(2.0, size=(N, G)).astype(np.float32)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    model = as_they_are(SCANVI(adata, module_class=Rate, n_hidden=4, n_latent=2))
    with torch.no_grad():
        model.module.counts.copy_(torch.tensor([1.0 + adata.X.sum(), 1.0 + N * G]))
    return model


@pytest.fixture(scope="module")
def model():
    return rates()


@pytest.fixture(scope="module")
def tree(model):
    run = RUN | {"n_draws": 100, "n_chains": 2, "n_integration": 3, "batch_size": 7}
    return to_datatree(model, **run)


def test_all_is_named(model, tree):
    assert dict(tree["posterior"].sizes) == {
        **{"chain": 2, "draw": 100, "cell": N},
        **{"latent": 2, "label": 3},
    }
    assert list(tree["posterior"]["cell"].values) == list(model.adata.obs_names)
    assert list(tree["posterior"]["label"].values) == list(model.fields.classes)
    assert list(tree["observed_data"]["gene"].values) == list(model.adata.var_names)
    assert tree["posterior"]["rate"].dims == ("chain", "draw")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "cell", "gene")
    np.testing.assert_array_equal(tree["observed_data"]["x"], model.adata.X)
    np.testing.assert_array_equal(tree["constant_data"]["counts"], model.adata.X.sum(1))
    shown = tree["constant_data"]["given_label"].values
    assert list(np.where(shown == "", "Unknown", shown)) == list(model.adata.obs["cell_type"])


def test_known_labels_are_certain(model, tree):
    y = tree["posterior"]["y"]
    known = (tree["constant_data"]["given_label"] != "").values
    drawn = y.isel(cell=known).argmax("label")
    assert (y["label"].values[drawn.values] == model.adata.obs["cell_type"].values[known]).all()
    assert (y.sum("label") == 1).all()


def test_the_log_likelihood_is_that_of_each_draw_of_what_is_shared(model, tree):
    rate = tree["posterior"]["rate"].values[..., None, None]
    expected = poisson.logpmf(model.adata.X, rate).sum(-1)
    found = tree["log_likelihood"]["cells"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(tree["log_likelihood_given_states"]["x"], expected, rtol=1e-4)


def test_leave_one_out_is_its_closed_form(model, tree):
    """log p(x_i | x of the others), where the posterior of the rate is a Gamma."""
    x = model.adata.X.astype(np.float64)
    total, s = x.sum(), x.sum(1)
    shape, rate = 1 + total - s, 1 + (N - 1) * G
    expected = gammaln(shape + s) - gammaln(shape) + shape * np.log(rate)
    expected += -(shape + s) * np.log(rate + G) - gammaln(x + 1).sum(1)
    found = leave_one_out(tree, pointwise=True)
    np.testing.assert_allclose(found.elpd_i, expected, atol=0.1)
    assert found.elpd == pytest.approx(expected.sum(), abs=0.3)
    by_arviz = arviz_stats().loo(tree)
    assert by_arviz.elpd == pytest.approx(found.elpd, abs=0.05)
    assert 0.2 < found.p < 3  # of one parameter


def test_a_better_model_wins(model, tree):
    worse = rates()
    with torch.no_grad():
        worse.module.counts.mul_(torch.tensor([1.3, 1.0]))
    run = RUN | {"n_draws": 200, "n_integration": 1, "prior": False, "posterior_predictive": False}
    table = arviz_stats().compare({"worse": to_datatree(worse, **run), "right": tree})
    assert list(table.index) == ["right", "worse"]


def test_states_are_integrated_and_nothing_shared_leaves_nothing_out():
    """Log likelihoods of 40 cells by 5,000 draws each, against the closed form."""
    model = linear()
    tree = to_datatree(model, n_draws=100, n_integration=50, prior=False, **RUN)
    found = tree["log_likelihood"]["cells"]
    assert (found.max("draw") == found.min("draw")).all()
    np.testing.assert_allclose(found[0, 0], exact(model), atol=0.3)
    with pytest.raises(ValueError, match="All tail values are the same"):
        arviz_stats().loo(tree)
    loo = leave_one_out(tree)
    assert loo.elpd == pytest.approx(float(found[0, 0].sum())) and abs(loo.p) < 1e-6
    assert len(arviz_stats().compare({"one": loo, "two": loo})) == 2


def test_the_likelihood_given_states_is_not_for_leave_one_out():
    """Its Pareto shapes are too large for nearly every cell, as the module says."""
    tree = to_datatree(linear(), n_draws=500, n_integration=1, prior=False, **RUN)
    tree["log_likelihood"] = tree["log_likelihood_given_states"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = arviz_stats().loo(tree, pointwise=True)
    assert (found.pareto_k > 0.7).mean() > 0.5


def test_the_prior_is_that_of_the_model(tree):
    """12,000 independent z and 6,000 labels; one seed in a thousand."""
    z = tree["prior"]["z"].values
    assert abs(z.mean()) < 3.3 / np.sqrt(z.size) and abs(z.var() - 1) < 3.3 * np.sqrt(2 / z.size)
    first = tree["prior"]["y"].values[..., 0].sum()
    low, high = binom.ppf([0.0005, 0.9995], 200 * N, 1 / 3)
    assert low <= first <= high
    rate = tree["prior"]["rate"].values
    assert 0.7 < rate.mean() < 1.3  # Gamma(1, 1), 200 draws: four standard errors
    drawn = tree["prior_predictive"]["x"].mean(("cell", "gene")).values
    assert np.corrcoef(drawn.ravel(), rate.ravel())[0, 1] > 0.99


def test_arviz_plots_it(model):
    run = RUN | {"n_draws": 10, "n_chains": 2, "n_integration": 1, "indices": [0, 1]}
    tree, az, one = to_datatree(model, **run), arviz_plots(), {"cell": ["cell0"]}
    none = {"backend": "none"}
    assert az.plot_ppc_dist(tree, num_samples=5, **none) is not None
    assert az.plot_forest(tree, var_names=["z"], coords=one, **none) is not None
    assert az.plot_rank(tree, var_names=["z", "rate"], coords=one, **none) is not None
    assert az.plot_prior_posterior(tree, var_names=["rate"], **none) is not None


class TwoModalities(Linear):
    def observed(self, z, library, y, cells):
        p = Normal(z, 1.0).to_event(1)
        return super().observed(z, library, y, cells) | {"protein": (p, cells.extra["protein"])}


def test_sites_of_ones_own_are_named_as_said():
    adata = simulated(12)
    adata.obsm["protein"] = np.ones((12, 2), dtype=np.float32)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", extra={"protein": "obsm/protein"})
    model = as_they_are(SCANVI(adata, module_class=TwoModalities, n_hidden=4, n_latent=2))
    run = RUN | {"n_draws": 3, "n_integration": 2}
    plain = to_datatree(model, **run)
    assert plain["observed_data"]["protein"].dims == ("cell", "protein_dim_0")
    given = {"dims": {"protein": ["antibody"]}, "coords": {"antibody": ["CD3", "CD19"]}}
    named = to_datatree(model, indices=[3, 1], **given, **run)
    assert named["prior_predictive"]["protein"].dims == ("chain", "draw", "cell", "antibody")
    assert list(named["posterior"]["cell"].values) == ["cell3", "cell1"]
    assert list(named["observed_data"]["antibody"].values) == ["CD3", "CD19"]
    both = named["log_likelihood_given_states"]
    assert set(both.data_vars) == {"x", "protein"} and both["protein"].dims[-1] == "cell"


def test_too_much_is_refused_before_it_is_drawn(model):
    message = r"100 draws of 30 cells are 162,000 numbers, 54 a cell and draw \(20 of them"
    with pytest.raises(InputError, match=message):
        to_datatree(model, max_numbers=100_000, **RUN)
    with pytest.raises(InputError, match="n_draws=0"):
        to_datatree(model, n_draws=0)


def test_a_latent_library_is_in_the_tree():
    adata = simulated(12)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    model = as_they_are(SCANVI(adata, use_observed_lib_size=False, n_hidden=4, n_latent=2))
    tree = to_datatree(model, n_draws=3, n_integration=2, **RUN)
    assert tree["posterior"]["l"].dims == ("chain", "draw", "cell", "size")
    assert tree["prior"]["l"].shape == (1, 3, 12, 1)
