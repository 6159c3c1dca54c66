"""ELBO and reconstruction error: by hand, by the objective, and how training moves them."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import kl_divergence, normal

from pyro_scanvi import SCANVAE, SCANVI, SemiSupervisedELBO
from pyro_scanvi.posterior import draws
from tests.posterior.examples import K, N, tensors


@pytest.fixture
def one_noise(monkeypatch):
    """Every reparametrised Normal takes the same noise in every cell: from -1 to 1 along K."""

    def noise(shape, dtype, device):
        return torch.linspace(-1, 1, shape[-1], dtype=dtype).expand(shape)

    monkeypatch.setattr(normal, "_standard_normal", noise)


def by_hand(model: SCANVI, feed_labels: bool) -> tuple[np.ndarray, np.ndarray]:
    """ELBO and reconstruction of each cell, summed over labels, in float64, at `one_noise`."""
    vae = copy.deepcopy(model.module).double()
    given = tensors(model)
    cells, label = given["cells"].to(torch.float64), given["label"]
    cells = SCANVAE.cells(vae, given["x"].double(), given["batch"], label)
    noise = torch.linspace(-1, 1, K, dtype=torch.float64)
    with torch.no_grad():
        q_z = vae.q_z(cells)
        z = q_z.mean + q_z.stddev * noise
        q_y, reconstruction, values = vae.q_y(z, cells).probs, [], []
        library, kl_l = cells.x.sum(-1, keepdim=True), 0.0
        if vae.latent_library:
            q_l, p_l = (d.base_dist.base_dist for d in (vae.q_l(cells), vae.p_l(cells)))
            library = (q_l.mean - q_l.stddev).exp()  # a single dimension has noise -1
            kl_l = kl_divergence(q_l, p_l).sum(-1)
        for code in range(3):
            y = torch.eye(3, dtype=torch.float64)[code].expand(N, 3)
            q_u = vae.q_u(z, y, cells)
            u = q_u.mean + q_u.stddev * noise
            v, m = q_u.variance, q_u.mean
            kl_u = 0.5 * (v + m**2 - 1 - v.log()).sum(-1)
            reconstruction.append(-vae.p_x(z, library, y, cells).log_prob(cells.x))
            values.append(
                -reconstruction[-1] + vae.p_z(u, y, cells).log_prob(z) - kl_u + np.log(1 / 3)
            )
        reconstruction, values = torch.stack(reconstruction, -1), torch.stack(values, -1)
        elbo = (q_y * (values - q_y.log())).sum(-1)
        if feed_labels:
            at_label = values.gather(1, label.clamp(min=0)[:, None])[:, 0]
            elbo = torch.where(label >= 0, at_label, elbo)
        return elbo - q_z.log_prob(z) - kl_l, (q_y * reconstruction).sum(-1)


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson", "labels", "library", "covariates"])
@pytest.mark.parametrize("feed_labels", [True, False])
def test_elbo_by_hand(models, kind, feed_labels, one_noise):
    """At fixed noise; for any size of minibatch. The mean is that over cells."""
    model = models[kind]
    elbo, reconstruction = by_hand(model, feed_labels)
    for batch_size in (7, None):
        found = model.get_elbo(batch_size=batch_size, return_mean=False, feed_labels=feed_labels)
        assert found.shape == (N,)
        np.testing.assert_allclose(found, elbo, rtol=1e-4)
        found = model.get_reconstruction_error(batch_size=batch_size, return_mean=False)
        np.testing.assert_allclose(found, reconstruction, rtol=1e-4)
    mean = model.get_elbo(feed_labels=feed_labels)
    assert isinstance(mean, float) and mean == pytest.approx(elbo.mean().item(), rel=1e-5)
    mean = model.get_reconstruction_error()
    assert isinstance(mean, float) and mean == pytest.approx(reconstruction.mean().item(), rel=1e-5)


def test_elbo_is_that_of_the_objective(model):
    """The figures of training, at the same draws."""
    vae, cells = model.module, tensors(model)["cells"]
    for feed_labels in (True, False):
        with draws.seeded(4), torch.no_grad():
            objective = SemiSupervisedELBO(vae.q_y, feed_labels=feed_labels)
            loss = objective.parts(vae.model, vae.guide, cells)
        expected = -(loss.loss - 50 * loss.classification[cells.labelled].mean()).item()
        assert model.get_elbo(feed_labels=feed_labels, seed=4) == pytest.approx(expected, rel=1e-4)


def test_training_raises_the_bound(models):
    """By more than the draws of z can: those of eight seeds do not overlap."""
    model = copy.deepcopy(models["nb"])
    before = [(model.get_elbo(seed=s), model.get_reconstruction_error(seed=s)) for s in range(8)]
    model.train(4, batch_size=16, plan_kwargs={"lr": 1e-2}, progress_bar=False)
    after = [(model.get_elbo(seed=s), model.get_reconstruction_error(seed=s)) for s in range(8)]
    assert min(e for e, _ in after) > max(e for e, _ in before)
    assert max(r for _, r in after) < min(r for _, r in before)
