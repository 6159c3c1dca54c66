"""What all questions share: passes of samples, minibatches joined."""

import numpy as np
import pytest

from pyro_scanvi import SCANVAE
from pyro_scanvi.posterior import draws
from tests.posterior.examples import G, N


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
