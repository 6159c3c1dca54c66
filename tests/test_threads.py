"""Threads: those that torch was told, whoever raised them, and what was found comes back."""

import json
import os
import subprocess
import sys

import pytest
import torch
from threadpoolctl import threadpool_limits

from pyro_scanvi.app.plotting import umap_of
from pyro_scanvi.posterior.draws import evaluating
from pyro_scanvi.threads import as_told, told
from tests.examples import simulated, small_model, small_vae

RAISED = 3

# numba as scanpy calls it, on two threads; large enough tensors to be shared among threads.
BEFORE_AND_AFTER = """
import hashlib, json, sys
import anndata, numpy, scanpy, scipy.sparse, torch
from lightning.pytorch.callbacks import LambdaCallback
from tests.examples import simulated, small_model

exec(sys.argv[1])
inside = []
adata = simulated(150, 600)

def bits():
    model = small_model(adata.copy(), n_hidden=128)
    note = LambdaCallback(on_train_epoch_end=lambda *_: inside.append(torch.get_num_threads()))
    model.train(2, progress_bar=False, callbacks=[note])
    arrays = [t.numpy() for t in model.module.state_dict().values()]
    arrays += [model.history.drop(columns="split").to_numpy(), model.predict(soft=True).to_numpy()]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()

def found():
    inside.clear()
    return bits(), *inside, torch.get_num_threads()

before = found()
scanpy.pp.normalize_total(anndata.AnnData(scipy.sparse.csr_matrix(adata.X)))
raised = torch.get_num_threads()
after = found()
torch.set_num_threads(2)
told = found()
json.dump([before, raised, after, told], sys.stdout)
"""


@pytest.mark.parametrize(
    "settings, statement",
    [
        ({"OMP_NUM_THREADS": "1"}, ""),
        ({}, "torch.set_num_threads(1)"),
    ],
)
@pytest.mark.slow
def test_scanpy_before_training_changes_no_bit(settings, statement):
    """In a process of its own; the number that torch is told then is used, and left."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"NUMBA_NUM_THREADS": "2"} | settings
    command = [sys.executable, "-c", BEFORE_AND_AFTER, statement]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, raised, after, told = json.loads(found.stdout)
    assert before[1:] == [1, 1, 1]
    assert raised == 2  # or numba has mended its ways, and this module may go
    assert after == [before[0], 1, 1, 2]  # the same bits; the number found is there again
    assert told[1:] == [2, 2, 2]


@pytest.fixture
def raised():
    """OpenMP's threads as numba sets them, for this thread and past torch."""
    torch.set_num_threads(1)
    assert told() == 1
    with threadpool_limits(RAISED, user_api="openmp"):
        assert torch.get_num_threads() == RAISED
        yield
        assert (torch.get_num_threads(), told()) == (RAISED, 1)


def test_as_told(raised):
    with as_told():
        assert torch.get_num_threads() == 1
        with as_told():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1


def test_after_an_error(raised):
    with pytest.raises(ZeroDivisionError), as_told():
        raise ZeroDivisionError


def test_what_the_user_tells_later_is_obeyed():
    for number in (2, 1):
        torch.set_num_threads(number)
        with threadpool_limits(RAISED, user_api="openmp"):
            for _ in range(2):  # the first leaves no trace
                with as_told():
                    assert torch.get_num_threads() == number
            assert torch.get_num_threads() == RAISED
        assert (torch.get_num_threads(), told()) == (number, number)


@pytest.mark.slow
def test_questions_and_pictures(raised):
    with evaluating(small_vae()):
        assert torch.get_num_threads() == 1
    umap_of(simulated(12).X)


def test_training_and_its_errors(raised):
    seen = []

    class Note(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.get_num_threads())
            return super().step(closure)

    model = small_model(simulated(24))
    plan = {"optimizer": lambda parameters: Note(parameters, lr=0.0)}
    model.train(1, progress_bar=False, plan_kwargs=plan)
    with pytest.raises(ZeroDivisionError):
        model.train(1, progress_bar=False, plan_kwargs={"optimizer": lambda parameters: 1 / 0})
    assert set(seen) == {1}
