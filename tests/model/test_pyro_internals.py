"""What this package reads of Pyro's private side is still there, and still means the same.

Where one of these fails after an update of Pyro, pyro_internals.py is the only file to look at.
"""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Categorical, Normal
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_scanvi.model.pyro_internals import (
    RevisedELBO,
    announce,
    element_log_prob,
    enumeration_dim,
    is_plate,
    random_parameters,
    set_log_prob,
    shapes_of,
    sites,
    without_shapes,
)

P, SCALE, N = torch.tensor([0.2, 0.3, 0.5]), 7.0, 4


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def model():
    with pyro.plate("cells", N), poutine.scale(scale=SCALE):
        y = pyro.sample("y", Categorical(P.double()))
        pyro.sample("x", Normal(y.double(), 1.0), obs=torch.arange(N).double())


def guide():
    with pyro.plate("cells", N), poutine.scale(scale=SCALE):
        pyro.sample("y", Categorical(logits=torch.zeros(3)), infer={"enumerate": "parallel"})


def by_hand(extra=0.0):
    """Sum over cells and labels of q (log p(y) + log p(x | y) - log q), and `extra` at each y."""
    total = 0.0
    for x in range(N):
        for y, p in enumerate(P.double()):
            log_p_x = Normal(torch.tensor(float(y)), 1.0).log_prob(torch.tensor(float(x)))
            total += (p.log() + extra + log_p_x - torch.tensor(1 / 3).log()) / 3
    return SCALE * total


@pytest.mark.parametrize("checking", [True, False])
def test_the_bound_is_exact_and_that_of_pyro(checking):
    elbo = RevisedELBO(max_plate_nesting=1)
    with pyro.validation_enabled(checking):
        bound = elbo.bound(*elbo.traces(model, guide))
    torch.testing.assert_close(bound, by_hand())
    assert bound.item() == pytest.approx(-TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide))


def test_the_bound_of_a_draw_without_a_gradient_has_pyros_score_function():
    """What is neither enumerated nor drawn with a gradient is no weighted sum."""
    logits = torch.zeros(3, requires_grad=True)

    def drawing():
        with pyro.plate("cells", N), poutine.scale(scale=SCALE):
            pyro.sample("y", Categorical(logits=logits))

    gradients = []
    for elbo in (RevisedELBO(max_plate_nesting=1), TraceEnum_ELBO(max_plate_nesting=1)):
        pyro.set_rng_seed(0)
        with pyro.validation_enabled(False):
            traces = next(elbo._get_traces(model, drawing, (), {}))
        bound = getattr(elbo, "bound", _compute_dice_elbo)(*traces)
        gradients += torch.autograd.grad(bound, logits)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.1


def test_a_label_without_probability_may_have_no_density():
    """0 log 0 is 0 in the weighted sum."""

    def impossible():
        with pyro.plate("cells", N):
            pyro.sample("y", Categorical(torch.tensor([0.5, 0.5, 0.0]), validate_args=False))

    def sure():
        with pyro.plate("cells", N):
            q = Categorical(torch.tensor([0.5, 0.5, 0.0]), validate_args=False)
            pyro.sample("y", q, infer={"enumerate": "parallel"})

    elbo = RevisedELBO(max_plate_nesting=1)
    with pyro.validation_enabled(False):
        assert elbo.bound(*elbo.traces(impossible, sure)).item() == pytest.approx(0)


def test_a_revised_log_probability_is_summed_scaled():
    class Revised(RevisedELBO):
        def revise(self, model_trace, guide_trace):
            site = sites(model_trace)["y"]
            set_log_prob(site, site["unscaled_log_prob"] + 0.25)

    elbo = Revised(max_plate_nesting=1)
    torch.testing.assert_close(elbo.bound(*elbo.traces(model, guide)), by_hand(0.25))
    assert elbo.loss(model, guide) == pytest.approx(-by_hand(0.25).item())


def test_masked_cells_stay_out_of_a_revised_sum():
    mask = torch.tensor([True, False, True, False])

    def masked():
        with pyro.plate("cells", N), poutine.mask(mask=mask):
            pyro.sample("x", Normal(0.0, 1.0), obs=torch.zeros(N))

    class Revised(RevisedELBO):
        def revise(self, model_trace, guide_trace):
            set_log_prob(sites(model_trace)["x"], torch.arange(1.0, N + 1))

    elbo = Revised(max_plate_nesting=1, strict_enumeration_warning=False)
    assert elbo.bound(*elbo.traces(masked, lambda: None)) == 1.0 + 3.0


def test_sites_that_join_observed_and_unobserved_are_dropped():
    seen = torch.tensor([True, False, True, False])

    def joined():
        with pyro.plate("cells", N):
            pyro.sample("a", Normal(0.0, 1.0), obs=torch.ones(N), obs_mask=seen)

    def its_guide():
        with pyro.plate("cells", N):
            pyro.sample("a_unobserved", Normal(0.0, 1.0))

    assert "a" in poutine.trace(joined).get_trace().nodes
    elbo = RevisedELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    left = sites(elbo.traces(joined, its_guide)[0])
    assert {"a_observed", "a_unobserved"} <= set(left) and "a" not in left


def test_checks_are_asked_where_pyro_validates():
    asked = []

    class Checked(RevisedELBO):
        def check(self, model_trace, guide_trace):
            asked.append(enumeration_dim(sites(guide_trace)["y"]))

    elbo = Checked(max_plate_nesting=1)
    for on in (True, False, True):
        with pyro.validation_enabled(on):
            elbo.traces(model, guide)
    assert asked == [-2, -2]


def test_plates_and_observed_sites_are_told_from_draws():
    def subsampled():
        with pyro.plate("cells", 9, subsample=torch.arange(N)):
            pyro.sample("y", Categorical(P.double()))

    trace = poutine.trace(subsampled).get_trace()
    assert [n for n, s in sites(trace).items() if s["type"] == "sample" and is_plate(s)] == [
        "cells"
    ]
    assert "cells" not in shapes_of(trace, trace)
    model_trace, guide_trace = RevisedELBO(max_plate_nesting=1).traces(model, guide)
    assert enumeration_dim(sites(model_trace)["x"]) is None
    rows = [row.split() for row in shapes_of(guide_trace, model_trace).splitlines()]
    assert ["y", "dist", "4", "|"] in rows and ["value", "3", "1", "|"] in rows


def test_the_table_that_pyro_adds_to_an_error_is_cut():
    def broken():
        pyro.param("weight", torch.ones(3))
        raise ValueError("what is wrong")

    with pyro.get_param_store().scope(), pytest.raises(ValueError, match="weight") as raised:
        poutine.trace(broken).get_trace()
    assert without_shapes(str(raised.value)) == "what is wrong"
    assert without_shapes("anything") == "anything"


def test_random_parameters_are_found_in_all_modules_inside():
    class Random(PyroModule):
        def __init__(self):
            super().__init__()
            self.log_theta = PyroSample(Normal(0.0, 1.0))

    assert random_parameters(nn.Sequential(nn.Linear(1, 1), Random())) == {"log_theta": "Random"}


def test_announced_parameters_are_stepped_and_stored_nowhere():
    network = nn.Linear(1, 1)
    network.bias.requires_grad_(False)
    before = [p.detach().clone() for p in network.parameters()]

    def announced():
        announce(network, "net")
        pyro.sample("x", Normal(network(torch.ones(1)), 1.0).to_event(1), obs=torch.ones(1) * 9)

    trace = poutine.trace(announced).get_trace()
    shown = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    assert shown == {"net.weight"}
    SVI(announced, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()
    weight, bias = network.parameters()
    assert weight != before[0] and bias == before[1]
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("name", ["unscaled_log_prob", "packed", "mask", "scale", "infer"])
def test_a_site_has_what_is_read_of_it(name):
    model_trace, _ = RevisedELBO(max_plate_nesting=1).traces(model, guide)
    assert name in sites(model_trace)["y"]


MASKED = {
    "not masked": (lambda p, whole, each: p.to_event(1), False, False),
    "a row": (lambda p, whole, each: p.to_event(1).mask(whole), True, False),
    "entries": (lambda p, whole, each: p.mask(each).to_event(1), False, True),
    "both": (lambda p, whole, each: p.mask(each).to_event(1).mask(whole), True, True),
    "nothing counts": (lambda p, whole, each: p.to_event(1).mask(False), None, False),
}


@pytest.mark.parametrize(("make", "rows", "entries"), MASKED.values(), ids=MASKED)
def test_log_probability_of_each_element_under_masks(make, rows, entries):
    """Its sum is that of Pyro, and an element that is masked has none."""
    whole, each = torch.tensor([True, False, True]), torch.tensor([False, True])
    value, p = torch.arange(6.0).reshape(3, 2), Normal(torch.zeros(3, 2), 2.0)
    made = make(p, whole, each)
    found = element_log_prob(made, value)
    counts = torch.ones(3, 2, dtype=torch.bool)
    counts = counts & whole[:, None] if rows else counts
    counts = counts & each if entries else counts
    expected = p.log_prob(value) * (counts & (rows is not None))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), made.log_prob(value))
