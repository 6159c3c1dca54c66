"""Lightning around the training: callbacks, loggers, precision, devices; ours are never lost."""

import csv
import datetime
import warnings
from types import SimpleNamespace

import lightning.pytorch.callbacks as lightning_callbacks
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from pyro_scanvi import InputError
from pyro_scanvi.training import callbacks
from tests.examples import simulated, small_model

QUIET = {"batch_size": 32, "progress_bar": False}
CALLBACKS = {
    "checkpoint": lambda folder: lightning_callbacks.ModelCheckpoint(folder, "best", "elbo_train"),
    "stopping": lambda _: lightning_callbacks.EarlyStopping("cross_entropy_validation"),
    "summary": lambda _: lightning_callbacks.ModelSummary(),
    "progress": lambda _: lightning_callbacks.TQDMProgressBar(),
    "rich progress": lambda _: lightning_callbacks.RichProgressBar(),
    "timer": lambda _: lightning_callbacks.Timer(),
    "averaging": lambda _: lightning_callbacks.StochasticWeightAveraging(1e-3, 1),
    "accumulation": lambda _: lightning_callbacks.GradientAccumulationScheduler({0: 2}),
}


@pytest.mark.filterwarnings("ignore:.*(ReduceLR|lr_scheduler|Swapping|swa|SWA).*")
@pytest.mark.parametrize("name", CALLBACKS)
def test_lightnings_callbacks_join_ours(name, tmp_path, capsys):
    """History, checkpoint, guard and early stopping stay. (Averaging adds an epoch of its own.)"""
    callback = CALLBACKS[name](tmp_path / "theirs")
    model = small_model(simulated())
    arguments = {"callbacks": [callback], "checkpoint_dir": tmp_path, "early_stopping": True}
    model.train(3, **QUIET, **arguments)
    assert model.history["epoch"].tolist()[:6] == [0, 0, 1, 1, 2, 2]
    assert (tmp_path / "last.ckpt").is_file()
    assert (tmp_path / "theirs" / "best.ckpt").is_file() == (name == "checkpoint")
    assert not model.module.training


def test_a_logger_gets_every_score(tmp_path):
    model = small_model(simulated()).train(2, **QUIET, logger=CSVLogger(tmp_path, name="log"))
    with open(tmp_path / "log" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["elbo_validation"]) for row in rows if row["elbo_validation"]]
    expected = model.history.query("split == 'validation'")["elbo"]
    np.testing.assert_allclose(logged, expected, rtol=1e-5)
    assert {"elbo_train", "kl_u_train", "macro_f1_validation"} <= set(rows[0])


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model(simulated()).train(1, **QUIET)
    assert not list(tmp_path.iterdir())


def test_double_precision():
    """Trained in float64, back in float32, like the run in float32 but for rounding."""
    models = [
        small_model(simulated(), dropout_rate=0.0).train(1, **QUIET, precision=precision)
        for precision in ("32-true", "64-true")
    ]
    dtypes = {p.dtype for p in models[1].module.parameters()}
    assert dtypes == {torch.float32} and models[1].module.y_prior.dtype == torch.float32
    assert len(models[1].predict()) == 120
    assert not models[0].history.equals(models[1].history)


def test_half_precision_keeps_the_likelihood_whole():
    """bfloat16 has 3 digits; counts and their log probabilities need more. ELBO within 1 %."""
    exact, half = (
        small_model(simulated(), dropout_rate=0.0).train(5, **QUIET, precision=precision).history
        for precision in ("32-true", "bf16-mixed")
    )
    assert not exact.equals(half)
    np.testing.assert_allclose(half["elbo"], exact["elbo"], rtol=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"precision": "16-mixed"}, "precision='16-mixed', expected one of 32-true, 64-true"),
        ({"devices": 2}, "devices=2, expected 'auto', 1"),
        ({"devices": [0, 1]}, r"devices=\[0, 1\]"),
        ({"devices": "2"}, "devices='2', expected 'auto', 1"),
        ({"devices": np.int64(2)}, "devices=2, expected 'auto', 1"),
        ({"accelerator": "abacus"}, "Lightning's Trainer refuses .* invalid accelerator name"),
        ({"trainer_kwargs": {"max_time": "long"}}, "Lightning's Trainer refuses .* duration"),
        ({"trainer_kwargs": {"max_steps": -7}}, "Lightning's Trainer refuses .*`max_steps`"),
        ({"trainer_kwargs": 3}, "trainer_kwargs=3, expected a dict"),
        ({"plan_kwargs": 3}, "plan_kwargs=3, expected a dict"),
        ({"callbacks": [print]}, "callbacks=.* expected a list of Lightning's Callbacks"),
        ({"callbacks": lightning_callbacks.Timer()}, "expected a list of Lightning's Callbacks"),
        ({"logger": "csv"}, "logger=.*'csv'.* expected a list of Lightning's Loggers"),
        ({"train_size": "most"}, "train_size='most', expected a share"),
        ({"train_size": None}, "train_size=None, expected a share"),
        ({"validation_size": "some"}, "validation_size='some', expected a share"),
        ({"early_stopping": True, "early_stopping_patience": -3}, "early_stopping_patience=-3"),
        ({"early_stopping": True, "early_stopping_patience": 2.5}, "early_stopping_patience=2.5"),
        ({"seed": 2**64}, "seed=18446744073709551616, expected an integer below"),
    ],
)
def test_refused(arguments, message):
    model = small_model(simulated())
    with pytest.raises(InputError, match=message):
        model.train(1, **QUIET, **arguments)
    assert model.history.empty


def test_further_arguments_of_the_trainer():
    model = small_model(simulated())
    model.train(50, **QUIET, trainer_kwargs={"max_steps": 7})
    assert model.n_epochs_trained == 2
    limit = {"max_time": datetime.timedelta(seconds=0)}
    assert small_model(simulated()).train(50, **QUIET, trainer_kwargs=limit).n_epochs_trained < 3


@pytest.mark.parametrize(
    "name, message",
    [
        ("max_stepz", "did you mean 'max_steps'"),
        ("callbacks", "'callbacks' is an argument of train()"),
        ("val_check_interval", "no argument 'val_check_interval'.*check_val_every_n_epoch="),
        ("overfit_batches", "no argument 'overfit_batches'.*model of few cells"),
    ],
)
def test_unknown_arguments_of_the_trainer(name, message):
    with pytest.raises(TypeError, match=message):
        small_model(simulated()).train(1, **QUIET, trainer_kwargs={name: 1})


@pytest.mark.parametrize("sizes", [(0.5, 0.2), (0.8, 0.0)])
def test_sizes_of_the_split(sizes):
    """What neither share takes is left out; no cell is in both."""
    train, validation = sizes
    seen = {"train": set(), "validation": set()}
    note = lightning_callbacks.LambdaCallback(
        on_train_batch_end=lambda *a: seen["train"].update(map(tuple, a[3].x.tolist())),
        on_validation_batch_end=lambda *a: seen["validation"].update(map(tuple, a[3].x.tolist())),
    )
    arguments = {"train_size": train, "validation_size": validation, "callbacks": [note]}
    small_model(simulated()).train(1, **QUIET, **arguments)
    assert abs(len(seen["train"]) - 120 * train) <= 4
    assert abs(len(seen["validation"]) - 120 * validation) <= 4
    assert not seen["train"] & seen["validation"]


@pytest.mark.parametrize("size", [-0.1, 0.2, float("nan")])
def test_bad_validation_sizes(size):
    with pytest.raises(InputError, match="validation_size"):
        small_model(simulated()).train(1, train_size=0.9, validation_size=size)


def test_scoring_less_often():
    model = small_model(simulated()).train(5, **QUIET, check_val_every_n_epoch=2)
    assert model.history.query("split == 'validation'")["epoch"].tolist() == [1, 3]
    assert model.history.query("split == 'train'")["epoch"].tolist() == [0, 1, 2, 3, 4]


# ---- a hint of a long run -----------------------------------------------------------------------

FEW, MANY = 4000, 11_533


class Hinted:
    """Epochs of given lengths before a TimeHint, and what it says after each."""

    def __init__(self, n_genes, later_epochs=0):
        self.now = 0.0
        later = {"pretrain": later_epochs}
        self.hint = callbacks.TimeHint(n_genes, later, clock=lambda: self.now)

    def phase(self, name, lengths, max_epochs=150, first=0, whole=True):
        module, said = SimpleNamespace(phase=SimpleNamespace(name=name)), []
        trainer = SimpleNamespace(max_epochs=max_epochs, is_last_batch=whole)
        self.hint.on_train_start(trainer, module)
        for trainer.current_epoch, seconds in enumerate(lengths, start=first):
            self.hint.on_train_epoch_start(trainer, module)
            self.now += seconds
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.hint.on_train_epoch_end(trainer, module)
            said += [(trainer.current_epoch, str(w.message)) for w in caught]
        return said


def test_the_hint_of_a_long_run():
    """9.6 s an epoch, as was measured: 149 more are 23.84 minutes."""
    ((epoch, said),) = Hinted(MANY).phase("train", [9.6, 9.6, 99.0])
    assert epoch == 0
    for words in ("took 9.6 s", "149 that follow", "about 24 minutes", "11533 genes"):
        assert words in said
    assert "n_top_genes=2000" in said


@pytest.mark.parametrize(
    "n_genes, seconds, more",
    [
        (FEW, 100.0, {}),
        (MANY, 0.8, {}),  # 149 of them are just under two minutes
        (MANY, 100.0, {"max_epochs": 1}),
        (MANY, 100.0, {"first": 149}),  # resumed before its last epoch
        (MANY, 100.0, {"whole": False}),  # by Ctrl-C
    ],
)
def test_no_hint(n_genes, seconds, more):
    assert Hinted(n_genes).phase("train", [seconds], **more) == []


def test_the_hint_of_a_resumed_run():
    """Of the first epoch that is run, and those that are left; a slow one later says nothing."""
    ((epoch, said),) = Hinted(MANY).phase("train", [60.0] * 3, first=140)
    assert Hinted(MANY).phase("train", [0.1, 600.0, 600.0]) == []
    assert epoch == 140 and "9 that follow" in said and "9 minutes" in said


def test_the_hint_of_a_warm_start():
    """All epochs that follow count; what was said once is not said again."""
    run = Hinted(MANY, later_epochs=150)
    ((_, said),) = run.phase("pretrain", [6.0] * 10, max_epochs=10)
    assert "159 that follow" in said
    assert run.phase("train", [60.0]) == []
    run = Hinted(MANY, later_epochs=3)  # short so far
    assert run.phase("pretrain", [6.0] * 2, max_epochs=2) == []
    assert len(run.phase("train", [90.0] * 3, max_epochs=3)) == 1


@pytest.mark.parametrize("pretrain_epochs, left", [(0, 2), (1, 3)])
def test_a_run_gives_the_hint(monkeypatch, capsys, pretrain_epochs, left):
    """Beside the progress bar, for the genes of the model and the epochs that it was asked for."""
    monkeypatch.setattr(callbacks, "MANY_GENES", 19)
    monkeypatch.setattr(callbacks, "LONG_RUN", 0.0)
    with pytest.warns(UserWarning, match=f"{left} that follow .* 20 genes") as caught:
        small_model(simulated()).train(3, batch_size=32, pretrain_epochs=pretrain_epochs)
    assert len(caught) == 1
    assert "3/3" in capsys.readouterr().out
