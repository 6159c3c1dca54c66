"""The leak in the history: it is that of the space, and looking moves nothing."""

import numpy as np
import pytest
import torch

from pyro_scanvi import ELBO, InputError
from pyro_scanvi.experiments.islands import LeakHistory
from pyro_scanvi.metrics import within_type_leak
from tests.examples import simulated, small_model

TRAINING = {"max_epochs": 4, "batch_size": 32, "progress_bar": False, "objective": ELBO()}


def test_it_is_that_of_the_space_after_the_epoch():
    """Of the cells that it was trained on, whatever their order."""
    adata = simulated()
    model = small_model(adata)
    watch = LeakHistory(adata.obs["truth"], every_n_epochs=2)
    model.train(train_size=0.8, callbacks=[watch], **TRAINING)
    trained = model.history[model.history.split == "train"]
    np.testing.assert_array_equal(trained.leak.isna(), [True, False, True, False])
    assert model.history[model.history.split != "train"].leak.isna().all()
    cells = model.train_indices
    labelled = (adata.obs["cell_type"] != "Unknown").to_numpy()[cells]
    space, types = model.get_latent_representation()[cells], adata.obs["truth"].to_numpy()[cells]
    assert trained.leak.iloc[-1] == within_type_leak(space, types, labelled).mean()


def test_looking_moves_nothing():
    watch = LeakHistory(simulated().obs["truth"], every_n_epochs=1)
    looked_at = small_model(simulated()).train(callbacks=[watch], **TRAINING)
    other = small_model(simulated()).train(**TRAINING)
    found, expected = looked_at.module.state_dict(), other.module.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_types_are_of_all_cells():
    watch = LeakHistory(["T"] * 119, every_n_epochs=1)
    with pytest.raises(InputError, match="there are 119 types"):
        small_model(simulated()).train(callbacks=[watch], **TRAINING)
    with pytest.raises(InputError, match="every_n_epochs=0"):
        LeakHistory(["T"], every_n_epochs=0)
