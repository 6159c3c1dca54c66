"""Blocks of hidden layers by kernels are what torch's modules give, in float64 too."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_scanvi.model import hidden_kernels
from pyro_scanvi.model.networks import Block, HiddenLayers, NormalNetwork

# Cells and covariates: none, of cells, of labels, of labels for cells in each, and more dimensions.
SHAPES = {
    "cells": ((6, 4), None),
    "cells and batch": ((6, 4), (6, 3)),
    "cells in labels": ((6, 4), (5, 1, 5)),
    "states in labels": ((5, 6, 4), (5, 1, 5)),
    "states and batch": ((5, 6, 4), (6, 3)),
    "draws of states in labels": ((2, 5, 6, 4), (2, 5, 1, 3)),
    "draws, which are not joined": ((2, 1, 6, 4), (5, 1, 3)),
    "one cell in labels": ((1, 4), (5, 1, 5)),
}
each_shape = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)


def layers_for(shapes, n_hidden=7, dropout_rate=0.0, **how) -> HiddenLayers:
    """One block in training, with weights that are not those of the start."""
    torch.manual_seed(0)
    n_covariates = shapes[1][-1] if shapes[1] else 0
    layers = HiddenLayers(4, n_hidden, 1, n_covariates, dropout_rate=dropout_rate, **how)
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    return layers.train()


def inputs(shapes, dtype=torch.float32) -> list[torch.Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    drawn = [None if s is None else 2 * torch.randn(s, generator=draw) + 1 for s in shapes]
    return [None if t is None else t.to(dtype).requires_grad_() for t in drawn]


def told(layers, given, dropped=None) -> list[torch.Tensor]:
    """Units, slopes by inputs and by parameters, and running moments."""
    units = layers(*given)
    seen = units if dropped is None else units * dropped
    slope = torch.linspace(-1, 3, seen.numel(), dtype=seen.dtype).view(seen.shape)
    leaves = [t for t in given if t is not None] + list(layers.parameters())
    return [seen.detach(), *torch.autograd.grad(seen, leaves, slope), *layers.buffers()]


@pytest.fixture
def by_kernels(monkeypatch) -> list[int]:
    """Grows with each block that they compute."""
    calls: list[int] = []

    def counted(self, *given):
        calls.append(1)
        return whole(self, *given)

    whole = Block._by_kernels
    monkeypatch.setattr(Block, "_by_kernels", counted)
    return calls


@each_shape
@pytest.mark.parametrize("bias", [True, False])
def test_units_slopes_and_running_moments_are_those_of_torch(shapes, bias, by_kernels):
    layers = layers_for(shapes, bias=bias)
    exact = told(copy.deepcopy(layers).double(), inputs(shapes, torch.float64))
    assert not by_kernels
    quick = told(layers, inputs(shapes))
    assert len(by_kernels) == (shapes != SHAPES["draws, which are not joined"])
    for one, other in zip(quick, exact, strict=True):
        assert one.shape == other.shape
        assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


@each_shape
def test_what_dropout_leaves_is_that_of_torch(shapes, by_kernels):
    layers = layers_for(shapes, dropout_rate=0.25)
    without = layers_for(shapes).double()
    torch.manual_seed(3)
    units = copy.deepcopy(layers)(*inputs(shapes))
    torch.manual_seed(3)
    quick = told(layers, inputs(shapes))
    assert torch.equal(units, quick[0])
    exact = told(without, inputs(shapes, torch.float64), (units > 0) / 0.75)
    for one, other in zip(quick, exact, strict=True):
        assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("width", [8, 7])
def test_units_stay_at_the_rate_and_apart_from_their_neighbours(rate, width):
    """By column, and correlations of neighbours in a row; false alarm 1e-6 each (4.9 errors)."""
    n = 50_000
    block = layers_for(((n, 4), None), width, rate).layers[0]
    nn.init.zeros_(block.batch_norm.weight)
    nn.init.ones_(block.batch_norm.bias)
    units = block(torch.randn(n, 4))
    dropped = (units == 0).double()
    error = (rate * (1 - rate) / n) ** 0.5
    assert ((dropped.mean(0) - rate).abs() < 4.9 * error + 1 / hidden_kernels.STEPS).all()
    assert units[units > 0].unique().item() == pytest.approx(1 / (1 - rate), abs=1e-4)
    correlation = torch.corrcoef(dropped.T) - torch.eye(width)
    assert correlation.abs().max() < 4.9 / n**0.5
    of_next_cell = torch.corrcoef(torch.cat([dropped[1:], dropped[:-1]], 1).T)[:width, width:]
    assert of_next_cell.abs().max() < 4.9 / n**0.5


@each_shape
def test_threads_share_the_rows(shapes, monkeypatch):
    """They draw what one draws."""
    found = []
    for n_threads in (1, 3):
        monkeypatch.setattr(hidden_kernels, "WORTH_A_THREAD", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        torch.manual_seed(3)
        found.append(told(layers_for(shapes, dropout_rate=0.5), inputs(shapes)))
    for one, three in zip(*found, strict=True):
        assert_close(one, three, rtol=1e-5, atol=1e-5)


@each_shape
def test_second_derivatives_go_through_the_operations(shapes):
    of_gradient = []
    for dtype in (torch.float32, torch.float64):
        given = [t for t in inputs(shapes, dtype) if t is not None]
        layers = layers_for(shapes).to(dtype)
        slopes = torch.autograd.grad((layers(*given) ** 2).sum(), given, create_graph=True)
        sum((slope**2).sum() for slope in slopes).backward()
        of_gradient.append([t.grad.double() for t in given])
    for quick, exact in zip(*of_gradient, strict=True):
        assert_close(quick, exact, rtol=1e-3, atol=1e-3 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    """In its column all are not finite, as by torch."""
    layers = layers_for(SHAPES["cells"])
    x = torch.randn(6, 4)
    x[2, 1] = bad
    assert not layers(x).isfinite().any()
    units = torch.tensor([[1.0, bad], [2.0, 1.0], [0.0, 3.0]])
    given = units, torch.zeros(1, 2), units.shape, torch.ones(2), torch.zeros(2), 0.001, 1 << 15
    result = hidden_kernels.activated(*given)[0]
    assert result[:, 0].isfinite().all() and not result[:, 1].isfinite().any()


def test_a_parameter_without_a_gradient():
    layers = layers_for(SHAPES["cells"])
    layers.layers[0].batch_norm.weight.requires_grad_(False)
    layers(*inputs(SHAPES["cells"])).sum().backward()
    assert layers.layers[0].batch_norm.weight.grad is None
    assert layers.layers[0].linear.weight.grad.isfinite().all()


def test_kernels_stand_aside(by_kernels):
    """For other modules, in evaluation, for one row, and where somebody listens."""
    x = torch.randn(6, 4)
    layers_for(SHAPES["cells"], activation=nn.ELU)(x)
    layers_for(SHAPES["cells"], layer_norm=True)(x)
    layers_for(SHAPES["cells"], batch_norm=False)(x)
    layers_for(SHAPES["cells"]).eval()(x)
    layers_for(SHAPES["cells"])(x[:1])
    layers_for(SHAPES["cells"], dropout_rate=1.0)(x)
    frozen = layers_for(SHAPES["cells"])
    frozen.layers[0].batch_norm.eval()
    frozen(x)
    heard, listening = [], layers_for(SHAPES["cells"])
    listening.layers[0].activation.register_forward_hook(lambda *_: heard.append(1))
    listening(x)
    assert heard and not by_kernels
    with nn.modules.module.register_module_forward_hook(lambda *_: heard.append(1)):
        layers_for(SHAPES["cells"])(x)
    assert len(heard) > 2 and not by_kernels
    layers_for(SHAPES["cells"])(x)
    assert by_kernels


def test_the_bias_of_a_layer_does_not_matter_before_a_batch_norm():
    """But it has its slope, which is zero but for rounding."""
    layers = layers_for(SHAPES["cells in labels"])
    layers(*inputs(SHAPES["cells in labels"])).square().sum().backward()
    assert layers.layers[0].linear.bias.grad.abs().max() < 1e-3


def test_a_head_that_somebody_listens_to_is_called():
    """And gives what it gives where both are one product."""
    network = NormalNetwork(HiddenLayers(4, 7), 3).eval()
    x, heard = torch.randn(6, 4), []
    expected = network(x)
    network.variance.register_forward_hook(lambda *_: heard.append(1))
    for one, other in zip(network(x), expected, strict=True):
        assert_close(one, other)
    assert heard
