"""The distribution of labels: Pyro's own, value and gradient, whatever the shapes."""

import pytest
import torch
from pyro.distributions import OneHotCategorical

from pyro_scanvi.model.labels import LabelCategorical, at_label, same_for_all_cells
from pyro_scanvi.model.networks import HiddenLayers, JoinedLinear

L, N, P = 4, 5, 3
ENUMERATED = torch.eye(L).unsqueeze(1)
SHAPES = {  # of labels and of what is looked up at them
    "enumerated": (ENUMERATED, (N, L)),
    "enumerated, particles": (ENUMERATED.unsqueeze(1), (P, N, L)),
    "enumerated, particles of the label alone": (ENUMERATED.unsqueeze(1), (N, L)),
    "a label for each cell": (torch.eye(L)[[0, 3, 1, 1, 2]], (N, L)),
    "draws": (torch.eye(L)[torch.arange(P * N).reshape(P, N) % L], (N, L)),
    "one distribution": (ENUMERATED, (L,)),
    "one cell": (torch.eye(L)[[2]], (1, L)),
}


@pytest.mark.parametrize(("y", "shape"), SHAPES.values(), ids=SHAPES)
def test_it_is_pyros_in_value_and_gradient(y, shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for kind in (LabelCategorical, OneHotCategorical):
        leaf = logits.clone().requires_grad_()
        log_prob = kind(logits=leaf, validate_args=True).log_prob(y.double())
        weight = torch.arange(log_prob.numel(), dtype=torch.float64).reshape(log_prob.shape)
        (weight * log_prob).sum().backward()
        found.append((log_prob, leaf.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    expected = (y.double() * logits).sum(-1)
    torch.testing.assert_close(at_label(y.double(), logits), expected)


def test_what_is_impossible_stays_so():
    """Minus infinity, which a product with 0 would make NaN."""
    logits = torch.tensor([[0.0, -torch.inf]])
    assert LabelCategorical(logits=logits).log_prob(torch.eye(2).unsqueeze(1)).tolist() == [
        [0.0],
        [-torch.inf],
    ]


def test_labels_are_checked_where_it_is_asked_for():
    p = LabelCategorical(logits=torch.zeros(N, L), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.full((L, 1, L), 0.5))


def test_only_labels_of_all_cells_alike_are_looked_up_at_once():
    values = torch.zeros(N, L)
    assert same_for_all_cells(ENUMERATED, values)
    assert not same_for_all_cells(ENUMERATED.expand(L, N, L), values)
    assert not same_for_all_cells(torch.eye(L)[[0]], torch.zeros(1, L)), "one cell, not enumerated"


@pytest.mark.parametrize("deep", [True, False])
def test_joined_covariates_are_those_of_one_concatenated_input(deep):
    """Values and gradients of enumerated labels, in float64."""
    torch.manual_seed(0)
    layers = HiddenLayers(3, 6, 2, n_covariates=L, deep=deep, batch_norm=False).double()
    x = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)

    def joined(x, linear):
        if linear.in_features == x.shape[-1]:
            return torch.nn.functional.linear(x, linear.weight, linear.bias)
        both = torch.cat([x.expand(L, N, -1), ENUMERATED.double().expand(L, N, L)], -1)
        return torch.nn.functional.linear(both, linear.weight, linear.bias)

    def expected(x):
        for block in layers.layers:
            x = joined(x, block.get_submodule("linear")).relu()
        return x

    found = []
    for function in (lambda x: layers(x, ENUMERATED), expected):
        value = function(x)
        found.append([value, *torch.autograd.grad(value.square().sum(), [x, *layers.parameters()])])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_no_copy_of_labels_is_made_for_each_cell():
    """Of 300 labels that would be 300 x 40 x 300 numbers; the result has 300 x 40 x 2."""
    layer, largest = JoinedLinear(303, 2), []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Sizes():
        found = layer(torch.ones(40, 3), torch.eye(300).unsqueeze(1))
    assert found.shape == (300, 40, 2)
    assert max(largest) == 300 * 300, "the labels themselves"
