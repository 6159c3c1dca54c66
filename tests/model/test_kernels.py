"""When kernels serve, and that what they stand in for goes on where they do not."""

import numba
import numpy as np
import torch

from pyro_scanvi.model import kernels


def test_kernels_serve_float32_on_the_cpu():
    x = torch.ones(3)
    assert kernels.serve(x, x)
    assert not kernels.serve(x, x.double())
    assert not kernels.serve(x, x.to("meta"))
    assert not kernels.serve(x[:0])


def test_without_a_place_for_a_cache_a_kernel_is_compiled_all_the_same(monkeypatch):
    def no_cache(function, cache=False, **how):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return jitted(function, **how)

    jitted = numba.njit
    monkeypatch.setattr(numba, "njit", no_cache)
    assert kernels.compiled(lambda x: x + 1)(np.float32(2)) == 3


def test_rows_are_shared_among_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    spans = kernels.over_rows(lambda start, stop: (int(start), int(stop)), 7, 5)
    assert len(spans) == 3 and spans[0][0] == 0 and spans[-1][1] == 7
    assert all(one[1] == other[0] for one, other in zip(spans, spans[1:], strict=False))
    assert kernels.over_rows(lambda start, stop: (start, stop), 7, 1) == [(0, 7)]
    assert len(kernels.over_rows(lambda start, stop: None, 2, 5)) == 2


def test_kernels_stand_aside_in_torch_func():
    """Its tensors are plain ones by their type; a kernel would not see what they stand for."""
    served = []

    def seen(x):
        served.append(kernels.serve(x))
        return x.sum()

    torch.func.grad(seen)(torch.ones(3))
    torch.func.vmap(seen)(torch.ones(2, 3))
    seen(torch.ones(3))
    assert served == [False, False, True]


def test_kernels_stand_aside_in_a_trace(monkeypatch):
    """They would be in it as the numbers that they gave."""
    x = torch.ones(3)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert not kernels.serve(x)
