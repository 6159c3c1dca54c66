"""Settings and data that the tests share."""

import matplotlib
import pytest
import torch

matplotlib.use("agg")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: a second thread costs more than it brings, and more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
