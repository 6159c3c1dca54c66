"""Dispersions say of themselves what they read."""

import pytest
import torch
from torch import nn

from pyro_scanvi.model.likelihoods import DISPERSIONS, Sizes, reads_label


@pytest.mark.parametrize("name", DISPERSIONS)
def test_a_dispersion_says_whether_it_reads_the_label(name):
    """It does if theta differs between two labels of the same cell."""
    dispersion = DISPERSIONS[name](Sizes(n_genes=5, n_batch=2, n_labels=3, n_hidden=4))
    hidden, batch = torch.ones(1, 4), torch.zeros(1, dtype=torch.long)
    of_labels = [dispersion(hidden, y.unsqueeze(0), batch) for y in torch.eye(3)]
    assert reads_label(dispersion) == (not torch.equal(of_labels[0], of_labels[1]))


def test_one_that_says_nothing_is_taken_to_read_it():
    assert reads_label(nn.Linear(2, 2))
    assert not reads_label(None)
