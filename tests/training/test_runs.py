"""Training: reproducible, interruptible, scored; it touches nothing but the model."""

import random
import signal
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.nn.functional import cross_entropy

from pyro_scanvi import InputError, SemiSupervisedELBO
from pyro_scanvi.training.module import LightningObjective
from pyro_scanvi.training.scores import EpochScores
from pyro_scanvi.training.settings import Plan, default_max_epochs
from tests.examples import as_they_are, random_cells, simulated, small_model, small_vae


def train(model, max_epochs=2, **arguments):
    return model.train(max_epochs, progress_bar=False, **({"batch_size": 32} | arguments))


def state(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- reproducible -------------------------------------------------------------------------------


def test_one_seed_is_one_result():
    """Weights, history and predictions, bit for bit."""
    models = []
    for _ in range(2):
        models.append(train(small_model(simulated(), seed=3)))
        torch.rand(1)  # another global state, which must not matter
    assert not changed(*map(state, models))
    pd.testing.assert_frame_equal(models[0].history, models[1].history, check_exact=True)
    assert (models[0].predict(soft=True) == models[1].predict(soft=True)).all(axis=None)


def test_another_seed_is_another_result():
    """The seed of the model and the seed of the training."""
    one, other = (small_model(simulated(), seed=s) for s in (0, 1))
    assert "z_encoder.mean.weight" in changed(state(one), state(other))
    same = [train(small_model(simulated()), seed=s) for s in (0, 1)]
    assert "z_encoder.mean.weight" in changed(*map(state, same))
    assert not same[0].history.equals(same[1].history)


def test_global_random_states_are_left_alone():
    def states():
        return torch.get_rng_state().numpy(), np.random.get_state()[1], random.getstate()[1]

    before = states()
    train(small_model(simulated()))
    for one, other in zip(before, states(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_global_settings_are_left_alone():
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    train(small_model(simulated()))
    after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    assert before == after


# ---- what moves and what does not ---------------------------------------------------------------


def test_evaluation_moves_nothing_and_training_moves_all():
    """Batch norms included; in a second train() too."""
    model = as_they_are(small_model(simulated()))
    moving = {n for n, _ in model.module.named_parameters()}
    moving |= {n for n in state(model) if "batch_norm" in n}
    for _ in range(2):
        assert not model.module.training
        before = state(model)
        model.predict()
        model.predict(soft=True, use_posterior_mean=False)
        model.get_latent_representation()
        assert not changed(before, state(model))
        train(model, 1)
        assert changed(before, state(model)) == moving


def test_scoring_held_out_cells_moves_nothing():
    before = {}
    callback = LambdaCallback(
        on_validation_start=lambda trainer, module: before.update(state_of(module)),
        on_validation_end=lambda trainer, module: changes.append(changed(before, state_of(module))),
    )
    changes = []
    train(small_model(simulated()), callbacks=[callback])
    assert changes == [set(), set()]


def state_of(module):
    return {name: value.clone() for name, value in module.vae.state_dict().items()}


def test_dropout_is_on_while_training_only():
    modes = []
    callback = LambdaCallback(
        on_train_batch_end=lambda trainer, module, *_: modes.append(module.vae.training),
        on_validation_batch_end=lambda trainer, module, *_: modes.append(module.vae.training),
    )
    train(small_model(simulated()), 1, callbacks=[callback])
    assert modes == [True, True, True, True, False]


def test_frozen_parameters_do_not_move():
    model = small_model(simulated())
    model.module.z_encoder.requires_grad_(False)
    before = state(model)
    train(model)
    frozen = {n for n, p in model.module.named_parameters() if not p.requires_grad}
    assert frozen and not frozen & changed(before, state(model))


def test_weight_decay_and_learning_rate_are_used():
    plain = state(train(small_model(simulated()), 1))
    for changes in ({"lr": 1e-2}, {"weight_decay": 0.1}, {"eps": 1.0}):
        other = train(small_model(simulated()), 1, plan_kwargs=changes)
        assert changed(plain, state(other)), changes
    frozen = train(small_model(simulated()), 1, plan_kwargs={"lr": 0.0})
    assert not changed(dict(frozen.module.named_parameters()), state(small_model(simulated())))


def test_plan_reaches_the_objective():
    elbo = Plan(classification_ratio=7.0, feed_labels=False).bind(small_vae()).elbo
    assert isinstance(elbo, SemiSupervisedELBO)
    assert (elbo.classification_ratio, elbo.feed_labels, elbo.kl_weight) == (7.0, False, 1.0)


# ---- history ------------------------------------------------------------------------------------


def test_history_has_every_score_of_both_splits():
    model = train(small_model(simulated(), use_observed_lib_size=False), 3)
    kls = {f"kl_{site}" for site in "uyzl"}
    scores = {"cross_entropy", "accuracy", "macro_f1", "calibration_error"}
    columns = {"epoch", "split", "elbo", "reconstruction"} | kls | scores
    assert set(model.history.columns) == columns
    assert model.history["epoch"].tolist() == [0, 0, 1, 1, 2, 2]
    assert set(model.history["split"]) == {"train", "validation"}
    assert not model.history.isna().any(axis=None)
    parts = model.history["reconstruction"] + model.history[sorted(kls)].sum(axis=1)
    np.testing.assert_allclose(model.history["elbo"], -parts, rtol=1e-6)


def test_history_goes_on_in_a_second_train():
    model = train(train(small_model(simulated()), 2), 1)
    assert model.history["epoch"].tolist() == [0, 0, 1, 1, 2, 2]
    assert model.n_epochs_trained == 3
    assert train(model, 0).n_epochs_trained == 3


def test_training_on_draws_anew():
    """Dropout and samples of a second call are not those of the first; the same seed repeats."""
    seen = []
    note = LambdaCallback(on_train_start=lambda *_: seen.append(torch.get_rng_state()))
    model = small_model(simulated())
    for _ in range(2):
        train(model, 1, callbacks=[note])
    train(small_model(simulated()), 1, callbacks=[note])
    assert not seen[0].equal(seen[1])
    assert seen[0].equal(seen[2])


def test_a_tenth_of_the_cells_is_held_out():
    """Of 60 labelled and 60 unlabelled cells each class gives a tenth, rounded down."""
    adata = simulated()
    adata.obs["cell_type"] = np.where(np.arange(120) < 60, adata.obs["truth"], "Unknown")
    seen = {"train": [], "validation": []}
    callback = LambdaCallback(
        on_train_batch_end=lambda *a: seen["train"].append(len(a[3])),
        on_validation_batch_end=lambda *a: seen["validation"].append(len(a[3])),
    )
    train(small_model(adata), 1, callbacks=[callback])
    assert sum(seen["validation"]) == 3 * 2 + 6
    assert sum(seen["train"]) == 120 - 12


def test_epoch_scores_are_means_over_cells():
    """Two minibatches of different sizes, against scikit-learn and torch on all their cells."""
    vae = small_vae().eval()
    elbo = SemiSupervisedELBO(vae.q_y)
    minibatches = [random_cells(vae, n=n, seed=n) for n in (12, 6)]
    scores = EpochScores()
    parts = [elbo.parts(vae.model, vae.guide, cells) for cells in minibatches]
    for part, cells in zip(parts, minibatches, strict=True):
        scores.add(part, cells)
    found = scores.mean()
    label = torch.cat([c.label for c in minibatches])
    logits = torch.cat([p.logits for p in parts]).detach()
    known = label >= 0
    predicted = logits.argmax(1)[known]
    assert found["elbo"] == pytest.approx(torch.cat([p.elbo() for p in parts]).mean().item())
    expected = cross_entropy(logits[known], label[known]).item()
    assert found["cross_entropy"] == pytest.approx(expected)
    assert found["accuracy"] == accuracy_score(label[known], predicted)
    assert found["macro_f1"] == pytest.approx(f1_score(label[known], predicted, average="macro"))


def test_scores_without_labels():
    vae = small_vae()
    cells = random_cells(vae, "none")
    scores = EpochScores()
    scores.add(SemiSupervisedELBO(vae.q_y).parts(vae.model, vae.guide, cells), cells)
    found = scores.mean()
    assert np.isnan(found["cross_entropy"]) and np.isfinite(found["elbo"])


# ---- KL weight, epochs, early stopping ----------------------------------------------------------


def test_kl_warmup():
    plan = Plan(n_epochs_kl_warmup=4)
    assert [plan.kl_weight(epoch) for epoch in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [Plan().kl_weight(epoch) for epoch in range(3)] == [1.0, 1.0, 1.0]


def test_kl_warmup_is_applied():
    weights = []
    callback = LambdaCallback(
        on_train_batch_end=lambda trainer, module, *_: weights.append(module.bound.kl_weight)
    )
    plan = {"n_epochs_kl_warmup": 2}
    train(small_model(simulated()), 3, batch_size=200, callbacks=[callback], plan_kwargs=plan)
    assert weights == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "n_cells, expected",
    [(1, 150), (700, 150), (53_000, 150), (54_000, 148), (80_000, 100), (10**6, 8), (10**8, 1)],
)
def test_default_number_of_epochs(n_cells, expected):
    assert default_max_epochs(n_cells) == expected


def test_default_number_of_epochs_is_used(monkeypatch):
    monkeypatch.setattr(
        "pyro_scanvi.estimator.scanvi.default_max_epochs", lambda n_cells: n_cells // 60
    )
    assert train(small_model(simulated()), None).n_epochs_trained == 2


def test_early_stopping_stops():
    """Without learning, the held-out ELBO soon fails to rise; our own callbacks stay too."""
    epochs = []
    callback = LambdaCallback(on_train_epoch_end=lambda trainer, module: epochs.append(1))
    arguments = {"plan_kwargs": {"lr": 0.0}, "callbacks": [callback]}
    stopping = {"early_stopping": True, "early_stopping_patience": 2}
    model = train(small_model(simulated()), 50, **arguments, **stopping)
    elbo = model.history.query("split == 'validation'")["elbo"].to_numpy()
    assert 3 <= len(elbo) < 50
    assert elbo.argmax() == len(elbo) - 3  # two epochs without a rise
    assert len(epochs) == len(elbo)


@pytest.mark.parametrize("every, patience", [(1, 3), (2, 3), (2, 4), (3, 2)])
def test_the_patience_of_early_stopping_is_counted_in_epochs(every, patience):
    """At the first scoring that comes so many epochs, or more, after the best."""
    stopping = {"early_stopping": True, "early_stopping_patience": patience}
    stopping |= {"check_val_every_n_epoch": every, "plan_kwargs": {"lr": 0.0}}
    model = train(small_model(simulated()), 60, batch_size=200, **stopping)
    scored = model.history.query("split == 'validation'").set_index("epoch")["elbo"]
    assert model.n_epochs_trained < 60
    last, one_before = scored.index[-1], scored.index[-2]
    assert one_before - scored.idxmax() < patience <= last - scored.idxmax()
    assert last == model.n_epochs_trained - 1


WATCHING = {
    "early_stopping": {"early_stopping": True},
    "lr_scheduler_metric": {"plan_kwargs": {"reduce_lr_on_plateau": True}},
}
NEVER_SCORED = {
    "check_val_every_n_epoch=3 is more than max_epochs=2": {"check_val_every_n_epoch": 3},
    "limit_val_batches=0": {"trainer_kwargs": {"limit_val_batches": 0.0}},
    "held-out cells, and there are none": {"validation_size": 0.0},
}


@pytest.mark.parametrize("name", WATCHING)
@pytest.mark.parametrize("reason", NEVER_SCORED)
def test_what_is_never_scored_cannot_be_watched(name, reason):
    """And may be, where nothing watches it, or nothing is trained that could stop."""
    model = small_model(simulated())
    before = state(model)
    with pytest.raises(InputError, match=f"{name} needs .*{reason}"):
        train(model, **WATCHING[name], **NEVER_SCORED[reason])
    assert not changed(before, state(model)) and model.history.empty
    assert set(train(model, **NEVER_SCORED[reason]).history["split"]) == {"train"}
    on_training_cells = {"reduce_lr_on_plateau": True, "lr_scheduler_metric": "elbo_train"}
    train(model, **NEVER_SCORED[reason], plan_kwargs=on_training_cells)


def test_a_warm_start_alone_has_nothing_to_stop():
    model = train(small_model(simulated()), 0, pretrain_epochs=1, early_stopping=True)
    assert model.n_epochs_trained == 1


@pytest.mark.parametrize("n, train_size", [(120, 1.0), (12, 0.9)])
def test_early_stopping_needs_held_out_cells(n, train_size):
    """None are asked for, or the classes are too small to give any."""
    with pytest.raises(InputError, match="held-out cells"):
        train(small_model(simulated(n)), early_stopping=True, train_size=train_size)


def test_all_cells_may_be_trained_on():
    model = train(small_model(simulated()), train_size=1)
    assert set(model.history["split"]) == {"train"}


@pytest.mark.parametrize("n, batch_size", [(33, 32), (11, 10), (12, 1)])
def test_small_minibatches_train(n, batch_size):
    """No small last one; and if the user asks for minibatches of one cell, those."""
    sizes = []
    callback = LambdaCallback(on_train_batch_end=lambda *a: sizes.append(len(a[3])))
    arguments = {"batch_size": batch_size, "train_size": 1, "callbacks": [callback]}
    model = train(small_model(simulated(n)), 1, **arguments)
    assert sum(sizes) == n and max(sizes) - min(sizes) <= 1
    assert np.isfinite(model.history["elbo"]).all()


# ---- Ctrl-C, errors and threads -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def keyboard():
    """Ctrl-C as in a terminal: a process in the background starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupt(Callback):
    """Presses Ctrl-C in the second epoch, in one hook."""

    def __init__(self, hook):
        setattr(self, hook, self.press)

    def press(self, trainer, *args):
        if trainer.current_epoch == 1:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "hook, epochs",
    [("on_train_epoch_start", 1), ("on_train_batch_end", 2), ("on_validation_batch_end", 2)],
)
def test_ctrl_c_keeps_what_was_learned(hook, epochs):
    model = small_model(simulated())
    before, handler = state(model), signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="interrupted in epoch 2 of 50: what was learned is kept"):
        train(model, 50, callbacks=[Interrupt(hook)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert changed(before, state(model)) and not model.module.training
    assert model.n_epochs_trained == epochs
    assert len(model.predict()) == 120
    assert train(model, 1).n_epochs_trained == epochs + 1


def test_a_second_ctrl_c_stops_at_once():
    class Twice(Interrupt):
        def press(self, trainer, *args):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    model = small_model(simulated())
    with pytest.raises((KeyboardInterrupt, SystemExit)), pytest.warns(match="interrupted"):
        train(model, callbacks=[Twice("on_train_batch_end")])
    assert signal.getsignal(signal.SIGINT) is handler
    assert not model.module.training


def test_an_error_leaves_the_model_in_eval_mode_and_the_handler_restored():
    def fail(*args, **kwargs):
        raise RuntimeError("of the user's callback")

    handler = signal.getsignal(signal.SIGINT)
    model = small_model(simulated())
    for hook in ("setup", "on_train_batch_end"):
        with pytest.raises(RuntimeError, match="of the user's callback"):
            model.train(1, callbacks=[LambdaCallback(**{hook: fail})])
    assert not model.module.training
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_in_a_thread():
    """Signals reach the main thread only; elsewhere there is no handler to set."""
    model = small_model(simulated())
    thread = threading.Thread(target=train, args=(model,))
    thread.start()
    thread.join()
    assert model.n_epochs_trained == 2


def test_progress_bar(capsys):
    small_model(simulated()).train(2)
    shown = capsys.readouterr().out
    assert "2/2" in shown and "ELBO" in shown and "validation" in shown
    train(small_model(simulated()))
    assert capsys.readouterr() == ("", "")


def test_it_owns_the_parameters_of_the_model_once():
    vae = small_vae()
    module = LightningObjective(vae, Plan())
    assert len(list(module.parameters())) == len(list(vae.parameters()))
    assert isinstance(module.vae, nn.Module)
