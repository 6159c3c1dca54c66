"""Normals of vectors by kernels: against scipy, float64, and the operations of torch."""

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro.distributions import Normal as PyroNormal
from torch import nn
from torch.distributions import kl_divergence
from torch.testing import assert_close

from pyro_scanvi.model import elementary, normal_kernels, scanvae
from pyro_scanvi.model.kernels import compiled
from pyro_scanvi.model.networks import HiddenLayers, NormalNetwork
from pyro_scanvi.model.normals import Normal, NormalVector

# Of value, loc and scale.
SHAPES = {
    "vector": ((3,), (3,), (3,)),
    "cells": ((6, 3), (6, 3), (6, 3)),
    "cells, one prior": ((6, 3), (3,), (3,)),
    "cells in labels": ((6, 3), (5, 6, 3), (5, 6, 3)),
    "draws of cells": ((4, 5, 6, 3), (6, 3), (6, 3)),
    "many cells": ((150, 7), (150, 7), (150, 7)),
    "no multiple of four": ((2, 70, 13), (70, 13), (70, 13)),
}
PAIRS = {
    "cells": ((6, 3), (6, 3)),
    "one prior": ((6, 3), (3,)),
    "labels, one prior": ((5, 70, 13), (13,)),
    "labels, one prior a cell": ((5, 6, 3), (6, 3)),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[str]:
    """Kernels, also for few numbers; grows with each call of one."""
    found: list[str] = []
    asked = normal_kernels.over_rows

    def counted(kernel, *given):
        found.append(kernel.__name__)
        return asked(kernel, *given)

    monkeypatch.setattr(normal_kernels, "WORTH_A_CALL", 0)
    monkeypatch.setattr(normal_kernels, "over_rows", counted)
    return found


def drawn(shapes, dtype=torch.float32) -> list[torch.Tensor]:
    """Numbers, of which every second is positive."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=draw) for s in shapes]
    return [
        (t.exp() if i % 3 == 2 else 2 * t).to(dtype).requires_grad_() for i, t in enumerate(made)
    ]


def told(answer, given) -> list[torch.Tensor]:
    """The answer and its slopes."""
    slope = torch.linspace(-1, 3, answer.numel(), dtype=answer.dtype).reshape(answer.shape)
    return [answer.detach(), *torch.autograd.grad(answer, given, slope)]


def exactly(quick, exact) -> None:
    for one, other in zip(quick, exact, strict=True):
        assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_log_probabilities_and_slopes(shapes, calls):
    """Those of torch in float64, for which there is no kernel; values by scipy."""
    quick, exact = drawn(shapes), drawn(shapes, torch.float64)
    found = told(Normal(*quick[1:]).to_event(1).log_prob(quick[0]), quick)
    assert calls == ["log_probs", "log_prob_slopes"]
    exactly(found, told(Normal(*exact[1:]).to_event(1).log_prob(exact[0]), exact))
    assert len(calls) == 2
    by_scipy = scipy.stats.norm.logpdf(*(t.detach().numpy() for t in exact)).sum(-1)
    np.testing.assert_allclose(found[0], by_scipy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", PAIRS.values(), ids=PAIRS)
def test_divergences_and_slopes(shapes, calls):
    """Against torch's Normals in float64; of a prior without a gradient."""

    def asked(kind, dtype):
        loc, scale = (drawn([shapes[0]] * 3, dtype)[i] for i in (1, 2))
        p_loc, p_scale = (drawn([shapes[1]] * 6, dtype)[i].detach() for i in (4, 5))
        p = kind(p_loc, p_scale).expand(loc.shape[-len(shapes[1]) :])
        return told(kl_divergence(kind(loc, scale).to_event(1), p.to_event(1)), [loc, scale])

    found = asked(Normal, torch.float32)
    assert calls == ["kls", "kl_slopes"]
    exactly(found, asked(PyroNormal, torch.float64))


def test_a_prior_that_is_learned_has_its_gradient(calls):
    loc, scale, p_loc, p_scale = (drawn([(6, 3)] * 6)[i] for i in (1, 2, 4, 5))
    found = []
    for kind in (Normal, PyroNormal):
        kl = kl_divergence(kind(loc, scale).to_event(1), kind(p_loc, p_scale).to_event(1))
        found.append(told(kl, [loc, scale, p_loc, p_scale]))
    assert not calls
    exactly(found[0], [t.double() for t in found[1]])


def test_divergence_from_another_kind_is_pyros(calls):
    """From a Normal of matrices, and from one of Pyro."""
    _, loc, scale = drawn([(6, 3)] * 3)
    matrices = Normal(loc, scale).to_event(2)
    assert not isinstance(matrices, NormalVector) and matrices.event_shape == (6, 3)
    of_matrices = kl_divergence(matrices, Normal(2 * loc, scale).to_event(2))
    of_pyro = kl_divergence(
        Normal(loc, scale).to_event(1), PyroNormal(2 * loc, scale).to_event(1)
    ).sum()
    assert_close(of_matrices, of_pyro)
    assert not calls


def test_what_was_expanded_keeps_its_gradient(calls):
    """Of a row that all cells share, the sum over cells; from torch's operations."""
    value, loc, scale = drawn([(6, 3), (3,), (3,)])
    p = Normal(loc, scale).expand((6, 3)).to_event(1)
    found = told(p.log_prob(value), [loc, scale])
    assert not calls and found[1].shape == (3,)
    exactly(
        found,
        [t.double() for t in told(Normal(loc, scale).to_event(1).log_prob(value), [loc, scale])],
    )
    assert calls


def test_second_derivatives_go_through_the_operations():
    """The Hessian of a log probability by its scale, and of a KL by both, in float64 by hand."""
    value, loc, scale = drawn([(6, 3)] * 3)
    p = Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    first = torch.autograd.grad(
        Normal(loc, scale).to_event(1).log_prob(value).sum(), scale, create_graph=True
    )[0]
    (second,) = torch.autograd.grad(first.sum(), scale)
    difference = (value - loc).detach()
    assert_close(second, 1 / scale.detach() ** 2 - 3 * difference**2 / scale.detach() ** 4)
    kl = kl_divergence(Normal(loc, scale).to_event(1), p).sum()
    firsts = torch.autograd.grad(kl, [loc, scale], create_graph=True)
    seconds = torch.autograd.grad(sum(f.sum() for f in firsts), [loc, scale])
    assert_close(seconds, (torch.ones(6, 3), 1 + 1 / scale.detach() ** 2))


def test_what_is_not_finite_passes():
    """NaN and infinity in one cell are told of that cell, and of no other."""
    value, loc, scale = (t.detach() for t in drawn([(6, 3)] * 3))
    value[1, 0], loc[2, 1], scale[3, 2], scale[4, 0] = torch.nan, torch.inf, torch.nan, torch.inf
    found = Normal(loc, scale, validate_args=False).to_event(1).log_prob(value)
    assert found.isfinite().tolist() == [True, False, False, False, False, True]
    kl = kl_divergence(
        Normal(loc, scale, validate_args=False).to_event(1),
        Normal(torch.zeros(3), torch.ones(3)).to_event(1),
    )
    assert kl.isfinite().tolist() == [True, True, False, False, False, True]


def test_values_are_validated_where_pyro_validates():
    q = Normal(torch.zeros(4, 3), torch.ones(4, 3), validate_args=True).to_event(1)
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="within the support"):
        q.log_prob(torch.full((4, 3), torch.nan))


def test_few_numbers_are_left_to_torch(monkeypatch, calls):
    monkeypatch.setattr(normal_kernels, "WORTH_A_CALL", 19)
    value, loc, scale = drawn([(6, 3)] * 3)
    told(Normal(loc, scale).to_event(1).log_prob(value), [value, loc, scale])
    assert not calls


def test_threads_share_rows(monkeypatch):
    """Each row is some thread's; rows that come again are summed once."""
    monkeypatch.setattr(normal_kernels, "WORTH_A_THREAD", 64)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        given = drawn([(70, 13), (5, 70, 13), (5, 70, 13)])
        found.append(told(Normal(*given[1:]).to_event(1).log_prob(given[0]), given))
        network = NormalNetwork(HiddenLayers(4, 3, 0), 13)
        torch.manual_seed(0)
        nn.init.normal_(network.variance.weight)
        found[-1] += network(torch.ones(70, 4))
    exactly(found[0][:4], [t.double() for t in found[1][:4]])


@pytest.mark.parametrize("shape", [(6, 4), (5, 6, 4), (150, 4)])
def test_location_and_scale_of_a_network(shape, calls):
    """Both heads and their slopes, against float64; variances from 1e-15 to 1e15."""
    torch.manual_seed(0)
    quick = NormalNetwork(HiddenLayers(4, 3, 0), 13, var_eps=1e-4)
    nn.init.normal_(quick.variance.weight, std=5)
    exact = NormalNetwork(HiddenLayers(4, 3, 0), 13, var_eps=1e-4).double()
    exact.load_state_dict(quick.state_dict())
    x = torch.randn(shape)
    answers = []
    for network, given in ((quick, x), (exact, x.double())):
        loc, scale = network(given)
        leaves = [*network.parameters()]
        slopes = torch.autograd.grad(loc.sum() + (scale * scale.detach() ** -1).sum(), leaves)
        answers.append([loc, scale, *slopes])
    assert calls == ["_parted", "_joined"]
    for one, other in zip(*answers, strict=True):
        assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_a_network():
    network = NormalNetwork(HiddenLayers(2, 3, 0), 3)
    raw = network.variance.bias
    with torch.no_grad():
        network.variance.weight.zero_()
    scale = network(torch.ones(5, 2))[1]
    (first,) = torch.autograd.grad(scale.sum(), raw, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), raw)
    assert_close(second, 5 * (raw / 2).exp().detach() / 4)


def test_the_model_and_its_guide_have_them():
    assert scanvae.Normal is Normal


@compiled
def _exponentials(x, result):
    for j in range(len(x)):
        result[j] = elementary.exp(x[j])


def test_exponentials():
    """To 1.3e-7 where float32 has them; 0 and infinity beyond, and NaN of NaN."""
    x = np.append(np.linspace(-100, 100, 20001), [np.nan, np.inf, -np.inf]).astype(np.float32)
    found = np.empty_like(x)
    _exponentials(x, found)
    inside = (x > -87) & (x <= 88)
    expected = np.exp(x.astype(float))
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1.3e-7)
    assert (found[x <= -87] == 0).all() and np.isinf(found[x > 88]).all() and np.isnan(found[-3])
