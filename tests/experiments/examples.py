"""What the tests of experiments share."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch

from pyro_scanvi import SCANVI
from tests.posterior.test_importance import N_LABELS, LinearGaussian

SIGMAS = 5  # two-sided, 6e-7 a comparison


class Conjugate(LinearGaussian):
    """The label changes nothing, so that u and z have one Normal posterior; the guide is wrong."""

    def __init__(self):
        super().__init__()
        self.m, self.d = (t[:1].expand(N_LABELS, -1).clone() for t in (self.m, self.d))


@contextmanager
def left_alone(model: SCANVI) -> Iterator[None]:
    """Weights, modes, gradients, random state, threads and Pyro's store are those of before."""

    def state():
        weights = {name: t.clone() for name, t in model.module.state_dict().items()}
        modes = [m.training for m in model.module.modules()]
        gradients = [(p.grad is None, p.requires_grad) for p in model.module.parameters()]
        store = sorted(pyro.get_param_store().keys())
        return weights, (modes, gradients, store, torch.get_num_threads()), torch.get_rng_state()

    pyro.param("of the user", torch.ones(()))
    before = state()
    try:
        yield
        after = state()
    finally:
        pyro.clear_param_store()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2])
