"""Settings and data that the tests share."""

import multiprocessing
from collections.abc import Callable

import matplotlib
import pytest
import torch

from pyro_scanvi import ELBO, SCANVI
from tests.examples import simulated, small_model

matplotlib.use("agg")
# The search for examples would import scvi-tools.
collect_ignore = ["reference/make.py", "reference/versions/make.py"]
THREADS = torch.get_num_threads()  # see tests/__init__.py


@pytest.fixture(autouse=True)
def same_threads():
    """Numba changes torch's number of threads where it first runs; the next test has it back."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def trained() -> SCANVI:
    """A model that knows the types of the simulated cells; the tests only read it.

    It labels them all rightly, and so do those of seven other seeds, but for one cell in fifty.
    """
    plan = {"lr": 1e-2}
    return small_model(simulated()).train(
        25,
        batch_size=32,
        check_val_every_n_epoch=5,
        plan_kwargs=plan,
        objective=ELBO(),
        progress_bar=False,
    )


@pytest.fixture(scope="session")
def new_process() -> Callable[..., int]:
    """Call a function of a module in a process of its own; the exit code, -9 if it was killed.

    The package takes seconds to import: a server imports it once, and each process starts there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_scanvi"])

    def call(function: Callable, *arguments) -> int:
        process = context.Process(target=function, args=arguments)
        process.start()
        process.join(timeout=120)
        assert process.exitcode is not None, "it takes more than two minutes"
        return process.exitcode

    return call
