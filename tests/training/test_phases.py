"""Phases: what a run does is what they say, of one of one's own too."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from pyro_scanvi import InputError
from pyro_scanvi.training import runs
from pyro_scanvi.training.module import LightningObjective
from pyro_scanvi.training.phases import PHASES, TRAINING, WARM_START, Phase
from tests.examples import simulated, small_model

BETWEEN = Phase("between", "held_out_between", lambda settings: 2, TRAINING.bind)
SETTINGS = {"pretrain_epochs": 1, "batch_size": 50, "progress_bar": False}  # 3 minibatches


class Stop(Exception):
    """In place of a kill."""


def train(phases=(WARM_START, BETWEEN, TRAINING), epochs=2, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "PHASES", phases)
        return small_model(simulated()).train(epochs, **(SETTINGS | more))


def test_the_names_of_old_checkpoints_and_histories():
    names = [(phase.name, phase.held_out) for phase in PHASES]
    assert names == [("pretrain", "pretrain_validation"), ("train", "validation")]


def test_one_more_in_between():
    """It is one Phase: its epochs, its splits and its objective."""
    model = train()
    splits = model.history.groupby("split", sort=False)["epoch"].apply(list).to_dict()
    assert splits == {
        "pretrain_validation": [0],
        "pretrain": [0],
        "held_out_between": [1, 2],
        "between": [1, 2],
        "validation": [3, 4],
        "train": [3, 4],
    }
    classified = model.history.dropna(subset="cross_entropy")["split"].unique()
    assert list(classified) == ["held_out_between", "between", "validation", "train"]


@pytest.mark.parametrize("epoch", range(1, 5))
def test_it_is_resumed_in_its_turn(tmp_path, epoch):
    """Stopped in an epoch of either phase, in the first of each too; no epoch is trained twice."""

    def stop(module, outputs, cells, i):
        if module.epoch == epoch and i == 1:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(LightningObjective, "on_train_batch_end", stop)
        train(checkpoint_dir=tmp_path)
    whole, trained = train(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LightningObjective, "on_train_batch_end", lambda m, *_: trained.append(m.epoch)
        )
        resumed = train(ckpt_path=tmp_path / "last.ckpt")
    assert sorted(set(trained)) == list(range(epoch, 5))
    pd.testing.assert_frame_equal(resumed.history, whole.history, check_exact=True)
    for name, tensor in resumed.module.state_dict().items():
        assert torch.equal(tensor, whole.module.state_dict()[name]), name


@pytest.mark.parametrize("watched", [True, False])
def test_whether_early_stopping_counts(watched):
    """Without learning, no epoch is better than that before it by the threshold."""
    still = {"plan_kwargs": {"lr": 0.0}, "early_stopping": True, "early_stopping_patience": 0}
    long = replace(BETWEEN, n_epochs=lambda settings: 12, watched=watched)
    splits = train((long,), **still).history["split"]
    assert (splits.value_counts()["between"] < 12) == watched


@pytest.mark.parametrize("learns", [True, False])
def test_whether_the_model_answers_after_it(learns):
    model = train((WARM_START, replace(BETWEEN, learns_labels=learns), TRAINING), epochs=0)
    assert model.n_epochs_trained == 3 and model.is_trained == learns


def test_a_checkpoint_of_a_phase_that_there_is_not(tmp_path):
    train(epochs=0, checkpoint_dir=tmp_path)
    with pytest.raises(InputError, match="last.ckpt: phase='between', expected one of 'pretrain'"):
        train(PHASES, epochs=0, ckpt_path=tmp_path / "last.ckpt")
