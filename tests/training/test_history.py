"""The history: a tidy table that also answers to the names of scvi-tools' curves."""

import copy
import json
import pickle

import numpy as np
import pandas as pd
import pytest

from pyro_scanvi import SCANVI
from pyro_scanvi.training.history import History
from tests.examples import simulated, small_model

ROWS = [  # the second epoch is not scored on held-out cells
    {"epoch": 0, "split": "pretrain", "elbo": -9.0, "kl_z": 2.0},
    {"epoch": 1, "split": "validation", "elbo": -7.0, "kl_z": 1.5, "kl_u": 0.25, "accuracy": 0.5},
    {"epoch": 1, "split": "train", "elbo": -6.0, "kl_z": 1.0, "kl_u": 0.5, "accuracy": 0.75},
    {"epoch": 2, "split": "train", "elbo": -5.0, "kl_z": 0.5, "kl_u": 0.5, "accuracy": 1.0},
]


@pytest.fixture
def history():
    return History(ROWS)


@pytest.fixture(scope="module")
def model():
    return small_model(simulated()).train(2, pretrain_epochs=1, batch_size=32, progress_bar=False)


CURVES = {
    "elbo_train": ([1, 2], [-6.0, -5.0]),
    "elbo_validation": ([1], [-7.0]),
    "elbo_pretrain": ([0], [-9.0]),
    "kl_u_train": ([1, 2], [0.5, 0.5]),
    "kl_local_train": ([1, 2], [1.5, 1.0]),
    "kl_local_pretrain": ([0], [2.0]),
    "accuracy_train": ([1, 2], [0.75, 1.0]),
    "train_accuracy": ([1, 2], [0.75, 1.0]),
    "validation_accuracy": ([1], [0.5]),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves(history, name):
    epochs, values = CURVES[name]
    expected = pd.DataFrame({name: values}, index=pd.Index(epochs, name="epoch"))
    pd.testing.assert_frame_equal(history[name], expected)
    assert name in history


def test_the_parts_of_the_elbo(model):
    """As in scvi-tools, they sum to its negative, which there has the name of the ELBO."""
    history = model.history
    for split in ("train", "validation"):
        parts = history[f"reconstruction_loss_{split}"].squeeze()
        parts = parts + history[f"kl_local_{split}"].squeeze()
        np.testing.assert_allclose(-parts, history[f"elbo_{split}"].squeeze(), rtol=1e-5)


# The names of scvi-tools 1.4.2 after training with check_val_every_n_epoch=1.
OF_SCVI_TOOLS = [
    f"{score}_{split}"
    for score in ("elbo", "reconstruction_loss", "kl_local", "kl_global")
    for split in ("train", "validation")
] + [
    f"{split}_{score}"
    for score in ("loss", "classification_loss", "accuracy", "f1_score", "calibration_error")
    for split in ("train", "validation")
]


@pytest.mark.parametrize("name", OF_SCVI_TOOLS)
def test_every_curve_of_scvi_tools_is_there_or_names_ours(model, name):
    if name in model.history:
        curve = model.history[name]
        assert list(curve) == [name] and curve.index.name == "epoch"
        assert list(curve.index) == [1, 2] and curve[name].notna().all()
        return
    with pytest.raises(KeyError) as caught:
        model.history[name]
    quoted = str(caught.value).split("history['")[1:]
    assert quoted and all(part.split("']")[0] in model.history for part in quoted)


def test_what_is_not_there():
    assert sum(name in History(ROWS) for name in OF_SCVI_TOOLS) == 6


@pytest.mark.parametrize(
    "name", ["nothing", "elbo_test", "elbo_pretrain_validation", "split_train", "_train", "train_"]
)
def test_unknown_names(history, name):
    with pytest.raises(KeyError, match="it has elbo, kl_z, kl_u, accuracy, each followed by '_pre"):
        history[name]
    assert name not in history
    assert history.get(name) is None


def test_before_training():
    with pytest.raises(KeyError, match="no epoch has been trained"):
        small_model(simulated()).history["elbo_train"]


def test_splits_that_begin_alike():
    """The warm start's held-out cells are not those of training."""
    rows = [{"epoch": 0, "split": "pretrain_validation", "elbo": 1.0}]
    rows += [{"epoch": 1, "split": "validation", "elbo": 2.0}]
    history = History(rows)
    assert history["elbo_validation"].squeeze() == 2
    assert history["elbo_pretrain_validation"].squeeze() == 1


def test_it_is_a_table(history):
    """Columns, selections and groups are those of a DataFrame, whatever was asked for before."""
    plain = pd.DataFrame(ROWS)
    history["elbo_train"]
    pd.testing.assert_frame_equal(pd.DataFrame(history), plain)
    pd.testing.assert_series_equal(history["elbo"], plain["elbo"])
    pd.testing.assert_frame_equal(pd.DataFrame(history[["elbo"]]), plain[["elbo"]])
    assert list(history.columns) == list(plain.columns)
    np.testing.assert_equal(history.to_dict("list"), plain.to_dict("list"))
    assert len(history[history["split"] == "train"]) == 2
    means = plain.groupby("split")["elbo"].mean()
    pd.testing.assert_series_equal(history.groupby("split")["elbo"].mean(), means)
    assert "elbo" in history and 3 not in history
    history["elbo_train"] = 1.0  # a column of that name would be one
    assert (history["elbo_train"] == 1).all()


MADE_OF_IT = {
    "tail": lambda h: h.tail(3),
    "query": lambda h: h.query("epoch > 0"),
    "copy": copy.deepcopy,
    "pickle": lambda h: pickle.loads(pickle.dumps(h)),
    "record": lambda h: History(json.loads(json.dumps(h.to_dict(orient="list")))),
}


@pytest.mark.parametrize("make", MADE_OF_IT.values(), ids=MADE_OF_IT)
def test_what_is_made_of_it_answers_too(history, make):
    made = make(history)
    pd.testing.assert_frame_equal(made["elbo_train"], history["elbo_train"])


def test_a_saved_model_has_it(model, tmp_path):
    model.save(tmp_path / "model")
    again = SCANVI.load(tmp_path / "model", simulated())
    pd.testing.assert_frame_equal(again.history["elbo_train"], model.history["elbo_train"])
    assert again.train(1, batch_size=32, progress_bar=False).history["elbo_train"].shape == (3, 1)
