"""Held-out likelihood against one that is known in closed form."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pyro.distributions import Normal
from torch.distributions import MultivariateNormal

from pyro_scanvi import SCANVAE, SCANVI, InputError, criticism
from pyro_scanvi.criticism.held_out import held_out_likelihood
from tests.examples import as_they_are, simulated, small_model
from tests.test_architecture import imported

RUN = {"seed": 0, "progress_bar": False}


class Linear(SCANVAE):
    """z ~ N(0, I), log1p(x) ~ N(W z, 1): the marginal is N(0, W W' + I)."""

    weights = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) / 3
    guide_scale = 1.0  # relative to the exact posterior

    def p_z(self, u, y, cells):
        return Normal(torch.zeros_like(u), 1.0).to_event(1)

    def observed(self, z, library, y, cells):
        return {"x": (Normal(z @ self.weights.T, 1.0).to_event(1), cells.x.log1p())}

    def q_z(self, cells):
        precision = self.weights.T @ self.weights + torch.eye(2)
        mean = torch.linalg.solve(precision, self.weights.T @ cells.x.log1p().T).T
        scale = precision.inverse().diagonal().sqrt() * self.guide_scale
        return Normal(mean, scale.expand_as(mean)).to_event(1)


class Narrow(Linear):
    guide_scale = 0.05


def linear(kind=Linear) -> SCANVI:
    adata = simulated(40)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    return as_they_are(SCANVI(adata, module_class=kind, n_hidden=4, n_latent=2))


def exact(model: SCANVI) -> np.ndarray:
    covariance = Linear.weights @ Linear.weights.T + torch.eye(20)
    p = MultivariateNormal(torch.zeros(20), covariance)
    return p.log_prob(torch.as_tensor(model.adata.X).log1p()).numpy()


def test_it_is_the_marginal_likelihood():
    """40 z values by their own errors; q(u | z, y) is random, so weights vary."""
    model = linear()
    found = held_out_likelihood(model, indices=range(40), n_draws=2000, **RUN)
    cells = found.cells
    assert list(cells.index) == list(model.adata.obs_names)
    z = (cells["log_likelihood"] - exact(model)) / cells["standard_error"]
    assert np.abs(z).max() < 4.5
    assert found.mean == pytest.approx(cells["log_likelihood"].mean())
    expected = cells["log_likelihood"].std() / math.sqrt(40)
    assert found.standard_error == pytest.approx(expected)
    assert "40 cells" in repr(found)


def test_an_estimate_that_cannot_be_trusted_says_so():
    good = held_out_likelihood(linear(), indices=range(20), n_draws=500, **RUN)
    bad = held_out_likelihood(linear(Narrow), indices=range(20), n_draws=500, **RUN)
    assert good.reliable > bad.reliable and bad.reliable < 0.2
    assert bad.cells["effective"].median() < good.cells["effective"].median()


def test_the_default_is_the_cells_that_training_held_out():
    model = small_model(simulated(60))
    train = {"batch_size": 30, "progress_bar": False, "train_size": 0.8}
    model.train(1, **train)
    found = held_out_likelihood(model, n_draws=25, **RUN)
    assert list(found.cells.index) == list(model.adata.obs_names[model.validation_indices])
    by_bayes = model.get_marginal_ll(
        indices=model.validation_indices, n_mc_samples=25, return_mean=False, seed=0
    )
    assert np.corrcoef(by_bayes, found.cells["log_likelihood"])[0, 1] > 0.9


def test_a_training_without_held_out_cells_is_refused():
    model = small_model(simulated(60)).train(1, train_size=1.0, progress_bar=False)
    with pytest.raises(InputError, match="held no cell out"):
        held_out_likelihood(model, **RUN)
    with pytest.raises(InputError, match="n_draws=5, expected an integer of at least 25"):
        held_out_likelihood(model, n_draws=5)


def test_without_arviz_the_extra_is_named(monkeypatch):
    def without(name):
        raise ImportError(name)

    monkeypatch.setattr("pyro_scanvi.criticism.optional.import_module", without)
    with pytest.raises(ImportError, match=r'pip install "pyro-scanvi\[arviz\]"'):
        held_out_likelihood(linear(), indices=[0], **RUN)


def test_the_package_is_imported_without_arviz():
    files = Path(criticism.__file__).parent.glob("*.py")
    imports = {name for file in files for name in imported(file)}
    assert not [name for name in imports if name.startswith("arviz")]
