"""What the tests of the model share."""

import pytest
import torch


@pytest.fixture
def float64():
    """The default dtype, which Pyro's own ELBO needs for sites that it makes itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
