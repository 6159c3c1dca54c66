"""What all questions share: passes of samples, minibatches joined."""

import copy

import numpy as np
import pytest
import torch
from pyro.distributions import Normal

from pyro_scanvi import SCANVAE, InputError
from pyro_scanvi.criticism import held_out_likelihood, posterior_predictive_checks, to_datatree
from pyro_scanvi.posterior import draws
from tests.posterior.examples import G, N, batched, by_bayes, model_of


@pytest.mark.parametrize("method", ["expression", "parameters", "predictive"])
def test_many_samples_pass_in_parts(model, method, monkeypatch):
    """No tensor of samples is larger than a pass, and all the samples are there."""
    ask = {
        "expression": lambda n: model.get_normalized_expression(n_samples=n),
        "parameters": lambda n: model.get_likelihood_parameters(n_samples=n, give_mean=True),
        "predictive": lambda n: model.posterior_predictive_sample(n_samples=n),
    }[method]
    drawn, count = [], SCANVAE.count_parameters

    def watched(self, z, *parents):
        drawn.append(z.shape[0])
        return count(self, z, *parents)

    monkeypatch.setattr(SCANVAE, "count_parameters", watched)
    monkeypatch.setattr(draws, "LARGEST_PASS", 3 * N * G + 1)
    ask(10)
    assert drawn == [3, 3, 3, 1]


@pytest.mark.parametrize("n_samples, size, expected", [(5, 10**9, [1] * 5), (5, 1, [5])])
def test_passes(n_samples, size, expected):
    assert draws.passes(n_samples, size) == expected


def test_answers_are_joined_along_any_dimension(model):
    """Against a single minibatch."""
    data, vae = model._data, model.module
    for dim, shape in ((0, (N, 2, 3)), (1, (2, N, 3)), (-1, (2, 3, N))):

        def ask(cells, dim=dim):
            return cells.index.float()[:, None, None].expand(-1, 2, 3).movedim(0, dim)

        found = draws.over_minibatches(vae, data, 7, ask, dim)
        assert found.shape == shape
        np.testing.assert_array_equal(found, draws.over_minibatches(vae, data, N, ask, dim))


# ---- answers that are no numbers ----------------------------------------------------------------


QUESTIONS = {
    "predict": lambda m: m.predict(),
    "soft": lambda m: m.predict(soft=True, method="classifier"),
    "bayes": lambda m: by_bayes(m, n_mc_samples=3),
    "latent": lambda m: m.get_latent_representation(),
    "draw of the latent": lambda m: m.get_latent_representation(give_mean=False),
    "moments": lambda m: m.get_latent_representation(return_dist=True),
    "expression": lambda m: m.get_normalized_expression(),
    "parameters": lambda m: m.get_likelihood_parameters(),
    "predictive": lambda m: m.posterior_predictive_sample(),
    "correlation": lambda m: m.get_feature_correlation_matrix(n_samples=2),
    "elbo": lambda m: m.get_elbo(),
    "reconstruction": lambda m: m.get_reconstruction_error(),
    "marginal": lambda m: m.get_marginal_ll(n_mc_samples=3),
    "predictive check": lambda m: posterior_predictive_checks(m, n_draws=2, progress_bar=False),
    "held out": lambda m: held_out_likelihood(m, indices=range(N), n_draws=100),
    "tree": lambda m: to_datatree(m, n_draws=2, log_likelihood=False, posterior_predictive=False),
}


@pytest.mark.filterwarnings("ignore:.*look like no labelled")
@pytest.mark.parametrize("question", QUESTIONS)
def test_no_answer_is_nan_without_a_word(model, question):
    """Cells 3 and 40 have a state that float32 cannot hold; the others are as they were."""
    lost = copy.deepcopy(model)
    encode = lost.module.q_z

    def far_out(cells):
        q_z = encode(cells)
        at = torch.isin(cells.position, torch.tensor([3, 40]))[:, None]
        return Normal(torch.where(at, torch.nan, q_z.mean), q_z.stddev, False).to_event(1)

    lost.module.q_z = far_out
    with pytest.raises(InputError, match=r"cells, at positions 3(, 40)?: .*smaller lr"):
        QUESTIONS[question](lost)


def test_a_state_too_large_for_its_softmax():
    """Counts of 10^37 without a logarithm; a model whose weights are all finite."""
    adata = batched()
    adata.X[5, 0] = 1e37
    model = model_of(batched(), latent_distribution="ln", log_variational=False, n_layers=1)
    model.train(1, progress_bar=False)
    assert np.isfinite(model.get_latent_representation(mc_samples=2)).all()
    with pytest.raises(InputError, match="1 of 60 cells, at positions 5:"):
        model.get_latent_representation(adata, mc_samples=2)


def test_a_log_probability_may_be_minus_infinity(model):
    """What cannot be is -inf; +inf is no answer."""
    cells = model._data[np.arange(N)]
    draws.check_finite(torch.full((N,), -torch.inf), cells, dim=0)
    with pytest.raises(InputError, match=f"{N} of {N} cells"):
        draws.check_finite(torch.full((2, N), torch.inf), cells, dim=1)
