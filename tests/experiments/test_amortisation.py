"""Gaps of a model whose posterior is Normal, against normal theory."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pyro_scanvi import InputError
from pyro_scanvi.experiments import (
    FAMILIES,
    Diagonal,
    Fit,
    amortisation_gaps,
    plot_amortisation_gaps,
)
from pyro_scanvi.experiments.amortisation import FullCovariance, PerCell, _gaps, with_guide
from tests.examples import as_they_are, simulated, small_model
from tests.experiments.examples import SIGMAS, Conjugate, left_alone
from tests.posterior.test_importance import normal_cells

N_CELLS = 4


def independent_loss(covariance):
    """Least KL from Normals of independent dimensions: their precisions are those of the truth."""
    precision = covariance.inverse()
    return 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()


def put(spread, scale):
    """Scales, or a triangle, into the parameters of a family."""
    if scale.ndim == 1:
        spread.log_scale.copy_(scale.log())
    else:
        spread.log_diagonal.copy_(scale.diagonal().log())
        spread.below.copy_(scale)


def at_the_optimum(vae, cells, family):
    """The best of a family, by hand: means are exact, and the scales what normal theory says."""
    guide = PerCell(vae, cells, FAMILIES[family])
    scales = {
        "diagonal": lambda cov: cov.inverse().diagonal() ** -0.5,
        "full covariance": torch.linalg.cholesky,
    }
    (gain_u, of_u), (gain_z, of_z) = vae.given_z(), vae.given_x()
    mean = vae.m[0] + (cells.x - vae.m[0] @ vae.B.T - vae.d[0]) @ gain_z.T
    with torch.no_grad():
        guide.z_loc.copy_(mean)
        guide.y_logit.zero_()
        guide.u_loc.copy_(((mean - vae.m[0]) @ gain_u.T).unsqueeze(1))
        guide.u_slope.copy_(gain_u)
        for spread, covariance in ((guide.z_spread, of_z), (guide.u_spread, of_u)):
            put(spread, scales[family](covariance))
    return with_guide(vae, guide)


@pytest.fixture(scope="module")
def toy():
    vae, cells = Conjugate().eval(), normal_cells(N_CELLS)
    return vae, cells, logsumexp(vae.exact_log_joint(cells.x.numpy()), axis=1)


@pytest.fixture(autouse=True)
def one_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_a_family_that_holds_the_posterior_has_no_gap(toy):
    """At the posterior every draw has one weight."""
    vae, cells, exact = toy
    free = at_the_optimum(vae, cells, "full covariance")
    np.testing.assert_allclose(Fit(n_draws=3).elbos(free, cells), exact, atol=1e-5)
    found = Fit(n_draws=3).log_likelihood([free], cells)
    np.testing.assert_allclose(found, exact, atol=1e-5)


def test_independent_dimensions_lose_what_normal_theory_says(toy):
    """Of z, and of u given z. The bound of S draws has a variance of about 2 * gap / S."""
    vae, cells, exact = toy
    loss = independent_loss(vae.given_z()[1]) + independent_loss(vae.given_x()[1])
    free, n_draws = at_the_optimum(vae, cells, "diagonal"), 1000
    mean = (exact - Fit(n_draws=n_draws).elbos(free, cells).numpy()).mean()
    assert abs(mean - loss) < SIGMAS * (2 * loss / n_draws / N_CELLS) ** 0.5 < 0.2 * loss


def test_steps_come_near_and_gaps_add_up(toy):
    """The start is as wrong as the guide, and has no covariances; 40 steps are few."""
    vae, cells, exact = toy
    one, left = {"full": FullCovariance}, []
    for n_steps in (1, 40):
        fit = Fit(n_steps=n_steps, lr=0.1, num_particles=5, n_draws=100)
        found = {(s, m): v.numpy() for s, m, v in _gaps(vae, cells, one, fit)}
        left.append(found["full", "approximation_gap"])
        whole = found["amortised", "approximation_gap"]
        np.testing.assert_allclose(left[-1] + found["full", "amortisation_gap"], whole)
        np.testing.assert_allclose(found["importance", "log_likelihood"], exact, atol=0.3)
    assert left[1].mean() < 0.5 * left[0].mean()


def test_scales_of_a_family():
    scale = torch.tensor([[0.5, 2.0]])
    for family in (Diagonal, FullCovariance):
        q = family(scale)(torch.zeros(1, 2), lambda scales: scales)
        torch.testing.assert_close(q.variance, scale**2)
        assert q.event_shape == (2,)


def test_the_table_and_its_picture():
    model = as_they_are(small_model(simulated(30)))
    fit = Fit(n_steps=2, num_particles=2, n_draws=3)
    with left_alone(model):
        found = amortisation_gaps(
            model, positions=[4, 2], seeds=(0, 1), fit=fit, progress_bar=False
        )
    assert list(found) == ["seed", "setting", "cell", "metric", "value"]
    assert list(dict.fromkeys(found["cell"])) == ["cell4", "cell2"]
    assert found["value"].notna().all() and len(found) == 2 * 2 * (1 + 3 * 2 + 2 * 2)
    axis = plot_amortisation_gaps(found)
    assert [t.get_text() for t in axis.get_yticklabels()] == ["amortised", *FAMILIES]


class Shared(Conjugate):
    def p_shared(self):
        return {"pi": None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_cells": 0}, "n_cells=0"),
        ({"n_cells": 31}, "n_cells=31, expected at most 30"),
        ({"positions": []}, "selects no cell"),
        ({"families": {}}, "expected callables"),
        ({"families": {"amortised": Diagonal}}, "the guide's own name"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_what_has_no_gap_is_refused(changes, message):
    model = as_they_are(small_model(simulated(30)))
    with pytest.raises(InputError, match=message):
        amortisation_gaps(model, progress_bar=False, **changes)
    model.module = Shared()
    with pytest.raises(InputError, match="cells of this model share pi"):
        amortisation_gaps(model, progress_bar=False)


@pytest.mark.parametrize("wrong", [{"n_steps": 0}, {"lr": 0.0}, {"n_draws": 0}])
def test_settings_of_a_fit_are_checked(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Fit(**wrong)
