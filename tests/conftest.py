"""Settings and data that the tests share."""

import matplotlib
import pytest
import torch

matplotlib.use("agg")
THREADS = torch.get_num_threads()  # see tests/__init__.py


@pytest.fixture(autouse=True)
def same_threads():
    """Numba changes torch's number of threads where it first runs; the next test has it back."""
    yield
    torch.set_num_threads(THREADS)
