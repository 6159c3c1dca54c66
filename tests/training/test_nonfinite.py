"""A loss or gradient that is not finite: said where, and the last good weights kept."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from pyro.distributions import Normal

from pyro_scanvi import SCANVAE, SCANVI
from pyro_scanvi.model.likelihoods import GeneLikelihood
from pyro_scanvi.training.nonfinite import NonFiniteError
from tests.examples import simulated, small_model

QUIET = {"batch_size": 32, "progress_bar": False}
TOO_MANY = 500.0  # counts of a gene that the broken likelihoods below cannot take


def poisoned(n_cells: int = 3):
    """Cells with an outlier in gene 7: the first few of them, by name."""
    adata = simulated()
    adata.X[:n_cells, 7] = TOO_MANY
    return adata


class BrokenGradient(torch.autograd.Function):
    """The identity, with a gradient that is NaN where it is told."""

    @staticmethod
    def forward(ctx, x, where):
        ctx.save_for_backward(where)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (where,) = ctx.saved_tensors
        return torch.where(where, torch.nan, gradient), None


class BrokenNormal(Normal):
    """Its log probability, or its gradient by the mean, fails at the outliers."""

    def __init__(self, loc, scale, gradient_only):
        super().__init__(loc, scale)
        self.gradient_only = gradient_only

    def expand(self, batch_shape, _instance=None):
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return BrokenNormal(loc, scale, self.gradient_only)

    def log_prob(self, value):
        broken = value == TOO_MANY
        normal = Normal(BrokenGradient.apply(self.loc, broken), self.scale)
        log_prob = normal.log_prob(value)
        return log_prob if self.gradient_only else log_prob.masked_fill(broken, -torch.inf)


def broken(gradient_only: bool) -> GeneLikelihood:
    def normal(p):
        return BrokenNormal(p.mu, torch.full_like(p.mu, 10.0), gradient_only)

    return GeneLikelihood(normal, uses_theta=False, uses_gate=False)


def weights(model: SCANVI) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.module.state_dict().items()}


@pytest.mark.parametrize(
    "gradient_only, quantity, what",
    [(False, "loss", "log probability"), (True, "gradient", "gradient of .* by loc")],
)
def test_site_genes_and_cells_are_named(gradient_only, quantity, what):
    """Of the minibatch that failed: each outlier among the cells to train on, or to score."""
    model = small_model(poisoned(), gene_likelihood=broken(gradient_only))
    before = weights(model)
    pattern = (
        rf"the {quantity} is not finite in epoch 1, first at site 'x', {what}, \d cells \(cell"
    )
    with pytest.raises(NonFiniteError, match=pattern) as caught:
        model.train(3, batch_size=120, progress_bar=False, train_size=1)
    error = caught.value
    assert "3 cells (cell0, cell1, cell2), 1 genes (gene7)" in str(error)
    assert error.fault.cells.tolist() == [0, 1, 2] and error.fault.columns.tolist() == [7]
    assert error.quantity == quantity
    assert ("x_decoder" in " ".join(error.parameters)) == gradient_only
    for name, value in weights(model).items():
        assert value.equal(before[name]), name
    assert not model.module.training and model.history.empty


def test_the_cell_of_a_minibatch_of_one_is_named():
    """What has one row is not what cells share there."""
    model = small_model(poisoned(), gene_likelihood=broken(gradient_only=False))
    with pytest.raises(NonFiniteError, match=r"1 cells \(cell[012]\), 1 genes \(gene7\)"):
        model.train(1, batch_size=1, progress_bar=False, train_size=1)


def test_held_out_cells_are_named():
    """All cells but those that are scored are harmless."""
    adata = simulated()
    model = small_model(adata)
    seen = []
    model.train(0, **QUIET)
    note = LambdaCallback(on_validation_batch_end=lambda *a: seen.extend(a[3].x.sum(1).tolist()))
    model.train(1, **QUIET, callbacks=[note])
    held_out = np.flatnonzero(np.isin(adata.X.sum(1), seen))
    victim = held_out[0]
    adata.X[victim, 7] = TOO_MANY
    model = small_model(adata, gene_likelihood=broken(gradient_only=False))
    with pytest.raises(NonFiniteError, match=rf"1 cells \(cell{victim}\), 1 genes \(gene7\)"):
        model.train(1, **QUIET)


def test_a_step_too_far_is_undone():
    """A learning rate of 1e30: the weights of the step before are kept, and the model answers."""
    model = small_model(simulated()).train(2, **QUIET)
    before = weights(model)
    with pytest.raises(NonFiniteError, match="not finite in epoch 3") as caught:
        model.train(5, batch_size=200, progress_bar=False, plan_kwargs={"lr": 1e30})
    assert caught.value.epoch == 2
    kept = {k: v for k, v in weights(model).items() if "num_batches" not in k}
    for name, value in kept.items():
        assert value.isfinite().all(), name
        if not name.endswith(("running_mean", "running_var")):
            assert value.equal(before[name]), name
    assert np.isfinite(model.predict(soft=True)).all(axis=None)
    assert model.n_epochs_trained == 2
    assert model.train(1, **QUIET).n_epochs_trained == 3


def test_the_last_step_is_looked_at_too():
    """No loss follows it."""
    model = small_model(simulated())
    with pytest.raises(NonFiniteError, match="not finite"):
        plan = {"lr": 1e38, "weight_decay": 1e4}
        model.train(1, batch_size=200, progress_bar=False, train_size=1, plan_kwargs=plan)
    assert all(value.isfinite().all() for value in weights(model).values())


def test_a_broken_encoder_is_named():
    """The site nearest to the cause, and the latent dimension."""

    class Broken(SCANVAE):
        def q_z(self, cells):
            loc, scale = self.z_encoder(*self.encoder_input(cells))
            loc = torch.where(torch.arange(self.n_latent) == 2, torch.nan, loc)
            return Normal(loc, scale).to_event(1)

    model = small_model(simulated())
    model.module.__class__ = Broken
    with pytest.raises(NonFiniteError, match=r"site 'z', loc, .* 1 dimensions \(2\)"):
        model.train(1, **QUIET)


def test_a_broken_prior_is_named():
    """Pyro expands it to all cells of the minibatch."""

    class Broken(SCANVAE):
        def p_u(self, cells):
            return Normal(torch.tensor([0.0, torch.inf, 0.0, 0.0]), torch.ones(4)).to_event(1)

    model = small_model(simulated())
    model.module.__class__ = Broken
    with pytest.raises(NonFiniteError, match=r"site 'u', loc, 28 cells .* 1 dimensions \(1\)"):
        model.train(1, **QUIET)
