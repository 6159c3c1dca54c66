"""The objective as a part of train: in the record, resumed, refused, scored."""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from pyro.infer import TraceEnum_ELBO

from pyro_scanvi import (
    ELBO,
    IWAE,
    SCANVI,
    InputError,
    Layered,
    ObjectiveParts,
    PyroLoss,
    SemiSupervisedELBO,
)
from pyro_scanvi.training.nonfinite import NonFiniteError
from pyro_scanvi.training.settings import Plan, described
from tests.examples import simulated, small_model
from tests.training.test_nonfinite import broken, poisoned

QUIET = {"batch_size": 40, "progress_bar": False}


@dataclass(frozen=True)
class Compact:
    """The ELBO, and a penalty on the length of E z: a part of one's own."""

    penalty: float = 1.0
    fails_at: float = float("inf")

    def __call__(self, vae, plan):
        return BoundCompact(self, vae, plan)


class BoundCompact:
    kl_weight = None

    def __init__(self, part, vae, plan):
        self.part, self.vae, self.elbo = part, vae, ELBO()(vae, plan)

    def parts(self, cells):
        parts = self.elbo.parts(cells)
        length = self.part.penalty * self.vae.q_z(cells).mean.square().sum(-1).mean()
        loss = parts.loss + length
        return replace(parts, loss=loss if cells.x.max() < self.part.fails_at else loss / 0)


def trained(objective=None, epochs=3, **more) -> SCANVI:
    model = small_model(simulated(), seed=2)
    return model.train(epochs, **(QUIET | {"objective": objective} | more))


def assert_equal(model, other):
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, other.module.state_dict()[name]), name
    pd.testing.assert_frame_equal(model.history, other.history, check_exact=True)


# ---- the record -------------------------------------------------------------------------------


def a_function(vae, plan):
    return ELBO()(vae, plan)


class Own(SemiSupervisedELBO):
    pass


@dataclass(frozen=True)
class WithAll:
    numbers: np.ndarray = field(default_factory=lambda: np.array([1, 2]))
    names: frozenset = frozenset({"b", "a", "c"})
    activation: object = torch.nn.functional.relu
    inner: object = None

    def method(self, vae, plan):
        return ELBO()(vae, plan)


@pytest.mark.parametrize(
    "part, text",
    [
        (a_function, "a_function"),
        (partial(a_function, 1, weight=2.0), "a_function(1, weight=2.0)"),
        (
            ELBO(("u",), ("l",), 3, Own),
            "ELBO(closed_form=('u'), weighted=('l'), num_particles=3, kind=Own)",
        ),
        (IWAE(np.int64(2), weighted=()), "IWAE(num_particles=2, sum_labels=True, weighted=())"),
        (
            WithAll(inner=Compact(2.0)),
            "WithAll(numbers=[1, 2], names={'a', 'b', 'c'}, activation=relu, "
            "inner=Compact(penalty=2.0, fails_at=inf))",
        ),
        (
            WithAll().method,
            "WithAll(numbers=[1, 2], names={'a', 'b', 'c'}, activation=relu, inner=None).method",
        ),
        (BoundCompact, "BoundCompact"),
    ],
)
def test_an_objective_is_told_as_text(part, text):
    """By names and settings, never by an address: the same in every process."""
    assert described(part) == text


def test_a_loss_of_pyro_is_told_with_its_settings():
    text = described(PyroLoss(TraceEnum_ELBO(num_particles=7, max_plate_nesting=1)))
    assert text.startswith("PyroLoss(loss=TraceEnum_ELBO(") and "num_particles=7" in text


def test_it_stands_in_the_record_and_in_what_is_saved(tmp_path):
    model = trained(IWAE(2), 1)
    assert model.training_settings["objective"] == described(IWAE(2))
    model.save(tmp_path / "model")
    opened = SCANVI.load(tmp_path / "model", model.adata)
    assert opened.training_settings == model.training_settings


def test_the_first_objective_is_left_out_of_the_record():
    """Records and checkpoints are those of before there were others."""
    assert "objective" not in Plan().record()
    assert "objective" not in trained(ELBO(), 1).training_settings
    assert trained(None, 1).training_settings["objective"] == described(Layered())


def test_the_default_is_layered_to_the_bit():
    assert_equal(trained(Layered()), trained(None))


def test_it_is_no_field_of_plan_kwargs():
    with pytest.raises(TypeError, match="'objective' is not a field of the training plan"):
        trained(plan_kwargs={"objective": ELBO()})


# ---- training, resuming -----------------------------------------------------------------------


@pytest.mark.parametrize("part", [ELBO(num_particles=3), IWAE(2), Compact(0.5)], ids=described)
def test_stopped_and_resumed(tmp_path, part):
    """Bit for bit, with dropout and a warm start; with another objective it is refused."""
    more = {"pretrain_epochs": 1}
    if part != Compact(0.5):
        more["plan_kwargs"] = {"n_epochs_kl_warmup": 2}
    whole = trained(part, 3, **more)
    trained(part, 1, checkpoint_dir=tmp_path, **more)
    path = tmp_path / "last.ckpt"
    for other in (Layered(), Compact(0.7)):
        was, now = repr(described(part)), repr(described(other))
        with pytest.raises(InputError) as caught:
            trained(other, 3, ckpt_path=path, pretrain_epochs=1)
        assert f"objective was {was}, is {now}" in str(caught.value)
    assert_equal(trained(part, 3, ckpt_path=path, **more), whole)


def test_a_penalty_of_ones_own_is_minimised():
    """More of it, shorter means of q(z | x); the history tells the ELBO and the classification."""

    def length(model):
        return np.square(model.get_latent_representation()).sum(1).mean()

    fast = {"plan_kwargs": {"lr": 0.02}}
    free, short = (trained(Compact(penalty), 5, **fast) for penalty in (0.0, 1000.0))
    assert length(short) < 0.5 * length(free)
    assert list(short.history.columns) == list(free.history.columns)
    assert {"elbo", "reconstruction", "kl_z", "accuracy"} <= set(short.history.columns)


@pytest.mark.parametrize("part, gains", [(IWAE(2), True), (ELBO(num_particles=2), False)])
def test_the_history_tells_the_bound_that_is_trained(part, gains):
    """The ELBO is minus the sum of its parts; the importance-weighted one lies above it."""
    history = trained(part, 2).history
    kl = history[[c for c in history.columns if c.startswith("kl_")]].sum(axis=1)
    gain = history["elbo"] + history["reconstruction"] + kl
    assert (gain > 0.01).all() if gains else np.abs(gain).max() < 1e-3


def test_held_out_cells_are_scored_by_it():
    """With lr 0 and all in eval mode: the held-out score is that of the objective itself."""
    seen = []
    note = LambdaCallback(on_validation_batch_end=lambda *a: seen.append(a[3]))
    more = {"callbacks": [note], "plan_kwargs": {"lr": 0.0}, "batch_size": 200}
    scores = [
        trained(part, 1, **more).history["elbo_validation"].iloc[0, 0]
        for part in (IWAE(30), ELBO(num_particles=30))
    ]
    assert scores[0] > scores[1] + 0.5


def test_a_warm_start_keeps_its_own():
    warm = [trained(part, 0, pretrain_epochs=2) for part in (None, IWAE(3))]
    assert_equal(*warm)


def test_a_loss_of_pyro_trains():
    model = trained(PyroLoss(TraceEnum_ELBO(max_plate_nesting=1)), 5)
    assert list(model.history.columns) == ["epoch", "split", "elbo"]
    curve = model.history["elbo_train"].iloc[:, 0]
    assert curve.iloc[-1] > curve.iloc[0]
    assert len(model.predict()) == 120


# ---- refused at the door ----------------------------------------------------------------------


class Bare:
    def parts(self, cells):
        return ObjectiveParts(cells.x.sum())


class Numbers:
    kl_weight = 1.0

    def parts(self, cells):
        return ObjectiveParts(3.0)


@pytest.mark.parametrize(
    "part, message",
    [
        ("elbo", "objective='elbo', expected a callable"),
        (7, "objective=7, expected a callable"),
        (lambda vae, plan: 3, r"objective=.*<lambda> gives int, which has no parts\(cells\)"),
        (lambda vae, plan: Bare(), r"gives Bare, which has no kl_weight; set it to 1.0, or to"),
        (lambda vae, plan: Numbers(), r"parts\(cells\).loss is 3.0, expected a tensor"),
    ],
)
def test_what_is_no_objective_is_refused(tmp_path, part, message):
    """Before anything is trained or written."""
    model = small_model(simulated())
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    with pytest.raises(InputError, match=message):
        model.train(2, **QUIET, objective=part, checkpoint_dir=tmp_path, pretrain_epochs=1)
    assert model.history.empty and not any(tmp_path.iterdir())
    assert all(v.equal(before[k]) for k, v in model.module.state_dict().items())


def test_a_class_that_is_not_bound_fails_before_training():
    """Its own error, with a note of where."""
    model = small_model(simulated())
    with pytest.raises(TypeError) as caught:
        model.train(1, **QUIET, objective=SemiSupervisedELBO)
    assert caught.value.__notes__ == [
        "objective=SemiSupervisedELBO raised it for 8 cells, before any training"
    ]


def test_a_kl_weight_that_there_is_not_cannot_rise():
    for plan in ({"n_epochs_kl_warmup": 2}, {"max_kl_weight": 0.5}):
        with pytest.raises(InputError, match=r"objective=Compact\(.* has no KL weight"):
            trained(Compact(), plan_kwargs=plan)


# ---- not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [IWAE(2), ELBO(num_particles=2), Compact()], ids=described)
def test_what_is_not_finite_is_named(part):
    """The site, gene and cells, as with the default."""
    model = small_model(poisoned(), gene_likelihood=broken(gradient_only=False))
    with pytest.raises(NonFiniteError, match="first at site 'x'") as caught:
        model.train(2, batch_size=120, progress_bar=False, train_size=1, objective=part)
    assert caught.value.fault.cells.tolist() == [0, 1, 2]
    assert caught.value.fault.columns.tolist() == [7]


def test_what_fails_in_the_objective_itself_names_no_site():
    with pytest.raises(NonFiniteError, match="the loss is not finite in epoch 1") as caught:
        small_model(poisoned()).train(2, **QUIET, train_size=1, objective=Compact(fails_at=400.0))
    assert caught.value.fault.site == ""
