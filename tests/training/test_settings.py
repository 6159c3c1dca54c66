"""The plan: what it refuses, its optimisers, its schedules."""

from functools import partial

import pytest
import torch

from pyro_scanvi import InputError
from pyro_scanvi.training.settings import Plan
from tests.examples import simulated, small_model

QUIET = {"batch_size": 32, "progress_bar": False}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": -1.0}, "lr=-1.0, expected a number"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"gradient_clip_norm": "soft"}, "gradient_clip_norm='soft'"),
        ({"optimizer": 3}, "optimizer=3, expected a name or a callable"),
        ({"lr_scheduler_metric": 3}, "lr_scheduler_metric=3, expected one of"),
        ({"lr_patience": 2.5}, "lr_patience=2.5, expected an integer"),
        ({"gradient_clip_norm": 0.0}, "gradient_clip_norm=0.0"),
        ({"n_epochs_kl_warmup": 2, "n_steps_kl_warmup": 2}, "exclude each other"),
        ({"lr_factor": 1.0}, "lr_factor=1.0"),
        ({"lr_scheduler_metric": "elbo"}, "lr_scheduler_metric='elbo'"),
        ({"lr_scheduler_metric": "loss_train"}, "expected one of elbo"),
    ],
)
def test_bad_plans(changes, message):
    with pytest.raises(InputError, match=message):
        Plan(**changes)


def test_unknown_optimizers_are_named():
    with pytest.raises(ValueError, match="optimizer='SGD', expected one of 'Adam', 'AdamW'"):
        Plan(optimizer="SGD")


def test_optimizers_step_as_torchs_do():
    """One step from the same gradient; Adam's decay is in the gradient, AdamW's beside it."""
    for name, kind in (("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)):
        steps = []
        for make in (
            Plan(optimizer=name, lr=0.1, weight_decay=0.2, eps=1e-3).make_optimizer,
            lambda p, kind=kind: kind(p, lr=0.1, weight_decay=0.2, eps=1e-3),
        ):
            parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
            optimizer = make([parameter])
            (parameter**3).sum().backward()
            optimizer.step()
            steps.append(parameter.detach())
        torch.testing.assert_close(*steps)


def test_frozen_parameters_are_left_out():
    free, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    frozen.requires_grad = False
    (group,) = Plan().make_optimizer([free, frozen]).param_groups
    assert [id(p) for p in group["params"]] == [id(free)]


def test_an_optimizer_of_ones_own():
    """It chooses its own learning rate: none, and nothing moves."""
    model = small_model(simulated())
    before = {k: v.clone() for k, v in model.module.named_parameters()}
    plan = {"optimizer": partial(torch.optim.SGD, lr=0.0), "lr": 1.0}
    model.train(1, **QUIET, plan_kwargs=plan)
    assert all(v.equal(before[k]) for k, v in model.module.named_parameters())
    assert model.training_settings["optimizer"] == "SGD(lr=0.0)"


def test_kl_weight_by_steps():
    plan = Plan(n_steps_kl_warmup=4, min_kl_weight=0.2, max_kl_weight=0.6)
    found = [plan.kl_weight(epoch=0, step=step) for step in range(6)]
    assert found == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    assert Plan(max_kl_weight=0.5).kl_weight(0) == 0.5


def test_clipped_gradients():
    """Under plain SGD the first step is as long as the learning rate times the bound."""
    lengths = []
    for clip in (None, 0.5):
        model = small_model(simulated())
        before = [p.detach().clone() for p in model.module.parameters()]
        plan = {"optimizer": partial(torch.optim.SGD, lr=0.01), "gradient_clip_norm": clip}
        model.train(1, batch_size=200, progress_bar=False, plan_kwargs=plan)
        moved = [p - b for p, b in zip(model.module.parameters(), before, strict=True)]
        lengths.append(torch.cat([m.flatten() for m in moved]).norm().item())
    assert lengths[0] > 0.01
    assert lengths[1] == pytest.approx(0.005, rel=1e-3)


def rates(**changes):
    """The learning rate of each step, one an epoch."""
    arguments = {"batch_size": 200, "progress_bar": False}
    arguments["check_val_every_n_epoch"] = changes.pop("every", 1)
    epochs = changes.pop("epochs", 4)
    seen = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    plan = {"optimizer": partial(Noted, lr=1e-6), "reduce_lr_on_plateau": True} | changes
    small_model(simulated()).train(epochs, **arguments, plan_kwargs=plan)
    return seen


def test_the_learning_rate_falls_on_a_plateau():
    """A threshold that no epoch reaches; a floor. A metric that falls is good where it should."""

    stuck = {"lr_threshold": 1e6, "lr_patience": 0, "lr_factor": 0.5}
    assert rates(**stuck) == pytest.approx([1e-6, 1e-6, 5e-7, 2.5e-7])
    assert rates(**stuck, lr_min=4e-7) == pytest.approx([1e-6, 1e-6, 5e-7, 4e-7])
    assert rates(**(stuck | {"lr_patience": 1})) == pytest.approx([1e-6, 1e-6, 1e-6, 5e-7])
    assert rates(**stuck, lr_scheduler_metric="reconstruction_train")[-1] == pytest.approx(2.5e-7)
    assert rates(lr_threshold=0.0, lr_patience=4) == [1e-6] * 4


@pytest.mark.parametrize(
    "patience, halved_after", [(0, [4, 6]), (1, [4, 6]), (2, [6]), (3, [6]), (4, []), (9, [])]
)
def test_the_patience_of_the_learning_rate_is_counted_in_epochs(patience, halved_after):
    """The first scoring, after epoch 2, sets the mark; the next are 2, 4, ... epochs behind it."""
    stuck = {"lr_threshold": 1e6, "lr_factor": 0.5, "lr_patience": patience}
    seen = rates(**stuck, every=2, epochs=7)
    halved = [i for i in range(1, 7) if seen[i] < seen[i - 1]]
    assert halved == halved_after
    on_training_cells = rates(**stuck, every=2, epochs=7, lr_scheduler_metric="elbo_train")
    assert [i for i in range(1, 7) if on_training_cells[i] < on_training_cells[i - 1]][:1] == (
        [patience + 2] if patience < 5 else []
    )


@pytest.mark.parametrize("metric, mode", [("elbo_train", "max"), ("cross_entropy_train", "min")])
def test_whether_a_metric_rises(metric, mode):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    assert Plan(lr_scheduler_metric=metric).make_scheduler(optimizer).mode == mode


def test_a_plateau_needs_held_out_cells():
    with pytest.raises(InputError, match="lr_scheduler_metric needs held-out cells"):
        plan = {"reduce_lr_on_plateau": True}
        small_model(simulated()).train(1, train_size=1, plan_kwargs=plan)
