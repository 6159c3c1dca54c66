"""The compiled kernels say what the formulas say; those are checked in test_distributions.py."""

import pytest
import torch
from torch.testing import assert_close

from pyro_scanvi.model import count_kernels, distributions
from pyro_scanvi.model.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial

BOTH = {
    NegativeBinomial: (count_kernels.negative_binomial, distributions._negative_binomial),
    ZeroInflatedNegativeBinomial: (count_kernels.zero_inflated, distributions._zero_inflated),
}
each_family = pytest.mark.parametrize("family", BOTH, ids=lambda f: f.__name__)


def arguments(family, n_cells=6, n_genes=50, dtype=torch.float32) -> list[torch.Tensor]:
    """Counts, most of them zero, and parameters; a theta for each gene."""
    draw = torch.Generator().manual_seed(0)
    shape = n_cells, n_genes
    x = torch.poisson(torch.rand(shape, generator=draw), draw) * 3
    mean = torch.rand(shape, generator=draw).exp() - 1
    theta = (3 * torch.randn(n_genes, generator=draw)).exp()
    gate = 3 * torch.randn(shape, generator=draw)
    parameters = [x, mean, theta.expand(shape), gate][: 1 + len(family.arg_constraints)]
    return [t.to(dtype) for t in parameters]


def leaves(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


@each_family
def test_values_and_slopes_are_those_of_the_formulas_in_float64(family):
    kernel, plain = BOTH[family]
    x, *parameters = arguments(family)
    value, *slopes = kernel(x, *parameters)
    exact = leaves([t.double() for t in parameters])
    truth = plain(x.double(), *exact)
    truth.sum().backward()
    assert_close(value.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    for slope, parameter in zip(slopes, exact, strict=True):
        assert_close(slope.double(), parameter.grad, rtol=1e-4, atol=1e-5)


@each_family
def test_rows_that_are_one_and_the_same_are_not_copied(family):
    """Labels that are enumerated, over the same counts, and a theta for each gene."""
    kernel, _ = BOTH[family]
    of_cells = arguments(family)
    expanded = [t.expand(4, *t.shape) for t in of_cells]
    for one, four in zip(kernel(*of_cells), kernel(*expanded), strict=True):
        assert torch.equal(one.expand(4, -1, -1), four)


@each_family
def test_threads_change_no_bit(family, monkeypatch):
    kernel, _ = BOTH[family]
    alone = kernel(*arguments(family, 7))
    monkeypatch.setattr(count_kernels, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, three in zip(alone, kernel(*arguments(family, 7)), strict=True):
        assert torch.equal(one, three)


@each_family
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -2.0, 0.0, 1e-30])
def test_what_is_not_finite_is_not_hidden(family, bad):
    """For zeros and counts, in each parameter: it is finite nowhere where the formulas are not."""
    kernel, plain = BOTH[family]
    counts = torch.tensor([0.0, 0, 1, 3, 100])
    fine = [torch.full((5,), value) for value in (2.0, 1.5, 0.3)][: len(family.arg_constraints)]
    for k in range(len(fine)):
        parameters = [*fine[:k], torch.full((5,), bad), *fine[k + 1 :]]
        value, truth = kernel(counts, *parameters)[0], plain(counts, *parameters)
        assert not value[~truth.isfinite()].isfinite().any()
        both = value.isfinite() & truth.isfinite()
        assert_close(value[both], truth[both], rtol=1e-4, atol=1e-4)
        assert bad < 0 or torch.equal(both, truth.isfinite())


@each_family
def test_second_derivatives_go_through_the_formulas(family):
    of_gradient = []
    for dtype in (torch.float32, torch.float64):
        x, *parameters = arguments(family, 2, 9, dtype)
        parameters = leaves(parameters)
        log_prob = family(*parameters, validate_args=False).log_prob(x).sum()
        slopes = torch.autograd.grad(log_prob, parameters, create_graph=True)
        sum((slope**2).sum() for slope in slopes).backward()
        of_gradient.append([p.grad.double() for p in parameters])
    for quick, exact in zip(*of_gradient, strict=True):
        assert_close(quick, exact, rtol=2e-3, atol=1e-3)


@each_family
def test_a_parameter_without_a_gradient(family):
    x, mean, *others = arguments(family)
    mean = mean.requires_grad_()
    family(mean, *others, validate_args=False).log_prob(x).sum().backward()
    assert mean.grad.isfinite().all()


@each_family
def test_the_type_of_the_results_is_that_of_the_arguments(family):
    """Whatever type torch gives to new tensors."""
    kernel, _ = BOTH[family]
    given = arguments(family)
    expected = kernel(*given)
    torch.set_default_dtype(torch.float64)
    try:
        found = kernel(*given)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
