"""Files that users keep, written by earlier code, still open and mean what they meant."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_scanvi import ELBO, SCANVI
from tests.saved import make

FOLDER = Path(make.__file__).parent
ROUNDING = 1e-4  # of other processors; a step of training moves the answers by more
# Dropout draws other units than it did then, which moves the ELBO by a few tenths of a nat.
ROUNDING_OF_A_RUN = 0.02


@pytest.fixture(autouse=True)
def one_thread():
    """As when the files were made; a checkpoint goes on with no other number."""
    torch.set_num_threads(1)


def assert_as_noted(model: SCANVI, name: str, rtol: float = ROUNDING) -> None:
    noted = np.load(FOLDER / f"{name}.npz")
    found = make.answers(model)
    assert found.keys() == set(noted)
    for key, values in found.items():
        np.testing.assert_allclose(values, noted[key], rtol=rtol, atol=rtol, err_msg=key)


@pytest.mark.parametrize("name", ["model", "query"])
def test_a_saved_model_opens_and_answers_as_it_did(name):
    model = SCANVI.load(FOLDER / name)
    assert model.is_trained
    assert_as_noted(model, name)


def test_a_saved_query_model_is_still_frozen():
    """It trains on, and of its reference only statistics and the prior move, no weight."""
    query, reference = SCANVI.load(FOLDER / "query"), SCANVI.load(FOLDER / "model")
    assert list(query.fields.classes) == ["a", "b", "c"]
    after = query.train(1, **make.RUN).state_diff(reference)
    moved = after.loc[after["changed"] > after["trainable"], "name"]
    assert after["trainable"].any() and "y_prior" in set(moved)
    assert not set(moved) & set(dict(query.module.named_parameters()))


def test_a_query_maps_on_a_saved_model():
    query = SCANVI.load_query_data(make.new_cells(), FOLDER / "model", extend_labels=["c"])
    assert query.predict(soft=True).shape == (20, 3)


def test_a_checkpoint_is_resumed_and_ends_as_the_whole_run():
    model = make.untrained(make.cells())
    model.train(make.EPOCHS, ckpt_path=FOLDER / "run.ckpt", objective=ELBO(), **make.RUN)
    assert model.history["epoch"].max() == make.EPOCHS
    assert_as_noted(model, "resumed", ROUNDING_OF_A_RUN)
