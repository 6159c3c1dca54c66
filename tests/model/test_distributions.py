"""Laws of the count distributions, held against scipy, sums from first principles and a table."""

from typing import NamedTuple

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import TorchDistribution
from scipy import stats
from scipy.special import expit, gammaln, hyp2f1, log_expit, xlogy
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from pyro_scanvi.model.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

INF = float("inf")
FALSE_ALARM = 1e-6  # of each statistical test; the seeds are fixed, so none is ever repeated
NAMES = ("mu", "theta", "gate_logits")


# ---- What is true -------------------------------------------------------------------------------


def poisson_log_prob(x, mu):
    """Poisson, by scipy."""
    return stats.poisson.logpmf(x, mu)


def negative_binomial_log_prob(x, mu, theta):
    """Negative binomial by mean and inverse dispersion, by scipy."""
    return stats.nbinom.logpmf(x, theta, theta / (theta + mu))


def inflate(x, log_prob, gate_logits):
    """Log probability once a gate closes with the given log odds."""
    still_open = log_expit(-gate_logits) + log_prob
    return np.where(x == 0, np.logaddexp(log_expit(gate_logits), still_open), still_open)


def zero_inflated_log_prob(x, mu, theta, gate_logits):
    """Zero-inflated negative binomial, from scipy's negative binomial."""
    return inflate(x, negative_binomial_log_prob(x, mu, theta), gate_logits)


FAMILIES = {
    Poisson: poisson_log_prob,
    NegativeBinomial: negative_binomial_log_prob,
    ZeroInflatedNegativeBinomial: zero_inflated_log_prob,
}


class Law(NamedTuple):
    """A family, and scalar parameters at which its laws are checked."""

    family: type[TorchDistribution]
    parameters: tuple[float, ...]

    def tensors(self, shape=(), dtype=torch.float64, requires_grad=False) -> list[torch.Tensor]:
        """The parameters, each repeated over `shape`."""
        options = {"dtype": dtype, "requires_grad": requires_grad}
        return [torch.full(shape, value, **options) for value in self.parameters]

    def make(self, shape=(), dtype=torch.float64, **options) -> TorchDistribution:
        """The distribution, of batch shape `shape`."""
        return self.family(*self.tensors(shape, dtype), **options)

    def log_prob(self, x) -> np.ndarray:
        """The true log probability."""
        return FAMILIES[self.family](np.asarray(x), *self.parameters)

    def __str__(self) -> str:
        return f"{self.family.__name__}{self.parameters}"


LAWS = [
    Law(Poisson, (0.3,)),
    Law(Poisson, (12.0,)),
    Law(NegativeBinomial, (2.5, 0.7)),
    Law(NegativeBinomial, (20.0, 40.0)),
    Law(ZeroInflatedNegativeBinomial, (2.5, 0.7, -0.4)),
    Law(ZeroInflatedNegativeBinomial, (20.0, 40.0, 1.0)),
]
SUPPORT = np.arange(3000)  # what lies beyond has probability below 1e-300 under each of LAWS

each_law = pytest.mark.parametrize("law", LAWS, ids=str)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Truth(NamedTuple):
    """Negative binomial on a grid of (theta, mu, x); see `exact_negative_binomial`."""

    mu: np.ndarray
    theta: np.ndarray
    x: np.ndarray
    log_prob: np.ndarray
    d_mu: np.ndarray
    d_theta: np.ndarray
    d_theta_terms: np.ndarray


def log1p_minus(t):
    """log(1 + t) - t; nothing cancels in the hypergeometric function."""
    return -t * t / 2 * hyp2f1(1, 2, 3, -t)


def sums_to(x, terms):
    """Sum of the first x terms, for each of x."""
    return np.concatenate([[0.0], np.cumsum(terms)])[x]


def exact_negative_binomial(mu, theta, x) -> Truth:
    r"""Value and gradient without gamma functions, which cancel: these are sums over k < x.

    .. math::
        \log\Gamma(x+\theta) - \log\Gamma(\theta) &= \textstyle\sum_k \log(\theta+k), \\
        \psi(x+\theta) - \psi(\theta) - \log(1+x/\theta)
            &= \textstyle\sum_k [1/(\theta+k) - \log(1 + 1/(\theta+k))].

    The gradient by theta is a difference of two positive terms that nearly meet where theta is
    large or x is one of the two most telling counts; `d_theta_terms` is their sum.
    """
    k = np.arange(x.max())
    rising = np.stack([sums_to(x, np.log1p(k / r)) for r in theta])[:, None, :]
    excess = np.stack([sums_to(x, -log1p_minus(1 / (r + k))) for r in theta])[:, None, :]
    theta, mu, x = np.broadcast_arrays(theta[:, None, None], mu[:, None], x)
    log_prob = rising - gammaln(x + 1) + xlogy(x, mu) - (x + theta) * np.log1p(mu / theta)
    surprise = -log1p_minus((x - mu) / (theta + mu))
    d_mu = theta * (x - mu) / (mu * (theta + mu))
    return Truth(mu, theta, x, log_prob, d_mu, excess - surprise, excess + surprise)


@pytest.fixture(scope="module")
def wide() -> Truth:
    """A grid far beyond what cells show, of parameters that a float32 can hold."""
    theta = np.union1d(np.geomspace(1e-2, 1e8, 31), [7.99, 8.0, 8.01, 1e6])
    mu = np.union1d(np.geomspace(1e-3, 1e5, 33), [5.0, 9.0, 101.0])
    x = np.union1d(np.arange(33), np.geomspace(33, 1e5, 50).round()).astype(int)
    x = np.union1d(x, [99, 101, 999, 1001])
    in_float32 = (axis.astype(np.float32).astype(np.float64) for axis in (mu, theta))
    return exact_negative_binomial(*in_float32, x)


# Columns: mu, theta, x; of the negative binomial the log probability and its gradient by mu and
# theta; of the zero-inflated one with gate logit 0 the log probability and its gradient by that
# logit. By mpmath 1.3.0 with 60 digits: loggamma for the values, digamma for the gradients.
# fmt: off
HARD_POINTS = np.array([
    (10, 1e8, 10, -2.07856169314, 0.0, 4.99999951667e-16, -2.7717088737, -0.5),
    (10, 1e8, 0, -9.9999995, -0.9999999, -4.99999933333e-15, -0.693101781638, 0.499954602109),
    (10, 1e8, 14, -2.95502987082, 0.39999996, -9.99999143334e-17, -3.64817705138, -0.5),
    (1e5, 1e6, 1e5, -6.7230571965, 0.0, 4.54545599174e-8, -7.41620437706, -0.5),
    (1e5, 1e6, 100500, -7.86008089374, 0.00454545454545, -5.76134133303e-8, -8.5532280743, -0.5),
    (2**-10, 1e8, 1, -6.93244836811, 1022.99999999, 9.76085662832e-20, -7.62559554867, -0.5),
    (1e5, 2**-6, 3, -5.47908152481, -1.56245288087e-7, 50.8089005548, -6.17222870537, -0.5),
    (1e5, 2**-6, 0, -0.244872011009, -1.56249975586e-7, -14.6718088608, -0.114959369709,
     0.0609139282268),
    (20, 8, 25, -3.40471679142, 0.0714285714286, 0.0343036555126, -4.09786397198, -0.5),
    (2, 3, 0, -1.5324768713, -0.6, -0.110825623766, -0.497580397016, 0.322368421053),
])
# fmt: on


# ---- Helpers ------------------------------------------------------------------------------------


def tensors(*arrays, dtype=torch.float64, requires_grad=False) -> list[torch.Tensor]:
    """Copies of arrays as tensors."""
    return [torch.tensor(a, dtype=dtype).requires_grad_(requires_grad) for a in arrays]


def value_and_gradients(family, x, *parameters, dtype=torch.float32) -> list[np.ndarray]:
    """Log probability, and its gradient by each parameter, computed in `dtype`."""
    x, *parameters = np.broadcast_arrays(x, *parameters)
    leaves = tensors(*parameters, dtype=dtype, requires_grad=True)
    log_prob = family(*leaves).log_prob(torch.tensor(x, dtype=dtype))
    log_prob.sum().backward()
    return [t.detach().double().numpy() for t in (log_prob, *(leaf.grad for leaf in leaves))]


def assert_right(actual, truth, scale, tolerance):
    """The error is at most `tolerance` times `scale`, everywhere."""
    error = np.abs(actual - truth)
    assert np.isfinite(error).all()
    assert (error <= tolerance * scale).all(), np.max(error / np.maximum(scale, 1e-300))


def log_prob_scale(truth):
    """A log probability has an absolute error below one nat, and a relative one above."""
    return np.maximum(1, np.abs(truth))


def axes(family) -> list[np.ndarray]:
    """A moderate grid of each parameter, broadcast against each other and a last axis of counts."""
    grids = [0.05, 0.7, 8.0, 60.0], [0.1, 2.0, 9.0, 300.0], [-30.0, -3.0, 0.0, 2.5, 30.0]
    n_parameters = len(family.arg_constraints)
    return np.meshgrid(*grids[:n_parameters], [0.0], indexing="ij", sparse=True)[:-1]


# ---- Values -------------------------------------------------------------------------------------


def test_oracle_agrees_with_table():
    """The sums from first principles are right where cancellation is worst."""
    for mu, theta, x, log_prob, d_mu, d_theta, *_ in HARD_POINTS:
        truth = exact_negative_binomial(np.array([mu]), np.array([theta]), np.array([int(x)]))
        np.testing.assert_allclose(truth.log_prob.item(), log_prob, rtol=1e-9)
        np.testing.assert_allclose(truth.d_mu.item(), d_mu, rtol=1e-9)
        np.testing.assert_allclose(truth.d_theta.item(), d_theta, rtol=1e-6)


@each_family
def test_log_prob_is_scipys(family):
    """In float64, on a grid that reaches every branch."""
    x = np.arange(300)
    truth = FAMILIES[family](x, *axes(family))
    log_prob = family(*tensors(*axes(family))).log_prob(torch.arange(300))
    assert_right(log_prob.numpy(), truth, log_prob_scale(truth), 5e-12)


def test_float32_poisson(wide):
    """Over eight orders of the mean."""
    truth = poisson_log_prob(wide.x[0], wide.mu[0])
    log_prob, d_mu = value_and_gradients(Poisson, wide.x[0], wide.mu[0])
    slope = (wide.x[0] - wide.mu[0]) / wide.mu[0]
    assert_right(log_prob, truth, log_prob_scale(truth), 2e-5)
    assert_right(d_mu, slope, np.abs(slope), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "of_value", "of_d_mu", "of_d_theta"),
    [(torch.float32, 2e-5, 1e-6, 1e-4), (torch.float64, 1e-8, 1e-14, 2e-9)],
    ids=["float32", "float64"],
)
def test_negative_binomial(wide, dtype, of_value, of_d_mu, of_d_theta):
    """Over eight orders of the mean and ten of theta.

    An error of the gradient by theta is measured against the sum of the two terms whose difference
    it is. Elsewhere that is a relative error; at the roots of the gradient no relative error is
    defined, and an absolute one would allow anything where theta is large.
    """
    log_prob, d_mu, d_theta = value_and_gradients(
        NegativeBinomial, wide.x, wide.mu, wide.theta, dtype=dtype
    )
    assert_right(log_prob, wide.log_prob, log_prob_scale(wide.log_prob), of_value)
    assert_right(d_mu, wide.d_mu, np.abs(wide.d_mu), of_d_mu)
    assert_right(d_theta, wide.d_theta, wide.d_theta_terms, of_d_theta)


@pytest.mark.parametrize("gate", [-20.0, -2.0, 0.0, 3.0, 20.0])
def test_float32_zero_inflated(wide, gate):
    """As above, with w the probability that an observed zero is structural.

    The gradients are 1 - w times those of the negative binomial, and w - pi by the gate. Here, too,
    an error is measured against the terms before they are subtracted.
    """
    truth = inflate(wide.x, wide.log_prob, gate)
    structural = np.exp(np.where(wide.x == 0, log_expit(gate) - truth, -INF))
    kept = np.exp(log_expit(-gate) + wide.log_prob - truth)
    family = ZeroInflatedNegativeBinomial
    log_prob, *slopes = value_and_gradients(family, wide.x, wide.mu, wide.theta, gate)
    assert_right(log_prob, truth, log_prob_scale(truth), 2e-5)
    assert_right(slopes[0], kept * wide.d_mu, np.abs(wide.d_mu), 1e-6)
    assert_right(slopes[1], kept * wide.d_theta, wide.d_theta_terms, 1e-4)
    assert_right(slopes[2], structural - expit(gate), structural + expit(gate), 1e-5)


@each_dtype
def test_hard_points(dtype):
    """Plain relative errors where the textbook form has lost every digit of a float32."""
    mu, theta, x, nb, d_mu, d_theta, zinb, d_gate = HARD_POINTS.T
    actual = value_and_gradients(NegativeBinomial, x, mu, theta, dtype=dtype)
    for number, truth in zip(actual, (nb, d_mu, d_theta), strict=True):
        assert_right(number, truth, np.abs(truth), 1e-4)
    family = ZeroInflatedNegativeBinomial
    log_prob, *_, gate = value_and_gradients(family, x, mu, theta, 0.0, dtype=dtype)
    assert_right(log_prob, zinb, np.abs(zinb), 1e-5)
    assert_right(gate, d_gate, np.abs(d_gate), 1e-5)


@each_law
@each_dtype
@pytest.mark.parametrize("value_dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_counts_of_any_dtype(law, dtype, value_dtype):
    """Counts take the dtype, and the precision, of the parameters."""
    counts = [0, 1, 7, 8, 9, 1000]
    log_prob = law.make(dtype=dtype).log_prob(torch.tensor(counts, dtype=value_dtype))
    assert log_prob.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(log_prob, law.log_prob(counts), rtol=tolerance)


# ---- Gradients ----------------------------------------------------------------------------------


def random_inputs(family) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Counts, half of them zeros, and parameters in double precision."""
    torch.manual_seed(0)
    x = torch.tensor([0, 0, 0, 0, 1, 2, 7, 30.0], dtype=torch.float64)
    drawn = torch.rand(3, 8, dtype=torch.float64)
    mu, theta, gate = 0.2 + 20 * drawn[0], 0.3 + 20 * drawn[1], 4 * drawn[2] - 2
    parameters = [p.requires_grad_() for p in (mu, theta, gate)]
    return x, parameters[: len(family.arg_constraints)]


@each_family
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_are_those_of_the_value(family, check):
    """Against finite differences, first and second order."""
    x, parameters = random_inputs(family)
    assert check(lambda *p: family(*p).log_prob(x), parameters)


@each_law
def test_gradients_of_broadcast_parameters(law):
    """A parameter shared by many counts gathers the gradients of all of them."""
    x = torch.tensor([[0, 1, 4], [2, 0, 0.0]], dtype=torch.float64)
    shared, own = law.tensors(requires_grad=True), law.tensors((2, 3), requires_grad=True)
    law.family(*shared).log_prob(x).sum().backward()
    law.family(*own).log_prob(x).sum().backward()
    for one, many in zip(shared, own, strict=True):
        assert_close(one.grad, many.grad.sum())


@each_law
def test_expected_score_is_zero(law):
    """Sum of p(x) times the gradient; zeros and non-zeros both have a share, of opposite sign."""
    leaves = law.tensors(SUPPORT.shape, requires_grad=True)
    law.family(*leaves).log_prob(torch.tensor(SUPPORT)).sum().backward()
    probability = np.exp(law.log_prob(SUPPORT))
    for leaf in leaves:
        shares = probability * leaf.grad.numpy()
        assert abs(shares.sum()) < 1e-9
        assert abs(shares[0]) > 1e-10 and shares[0] * shares[1:].sum() < 0


@each_family
def test_a_count_knows_only_its_own_parameters(family):
    """Value and gradients of a mixed batch, in any memory layout, are those of single counts."""
    x, parameters = random_inputs(family)
    columns = [t.detach().reshape(4, 2).t() for t in (x, *parameters)]
    x, leaves = columns[0], [t.clone().requires_grad_() for t in columns[1:]]
    assert not leaves[0].is_contiguous()
    log_prob = family(*leaves).log_prob(x)
    log_prob.sum().backward()
    for at in np.ndindex(x.shape):
        single = value_and_gradients(family, *(t[at].item() for t in columns), dtype=torch.float64)
        mixed = [t[at].item() for t in (log_prob, *(leaf.grad for leaf in leaves))]
        np.testing.assert_allclose(mixed, single, rtol=1e-12)


@each_law
def test_deterministic_algorithms(law):
    """A trainer that asks PyTorch for determinism gets it."""
    torch.use_deterministic_algorithms(True)
    try:
        leaves = law.tensors((2,), requires_grad=True)
        law.family(*leaves).log_prob(torch.tensor([0, 3])).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


# ---- Limits -------------------------------------------------------------------------------------

COUNTS = np.array([0, 1, 5, 40])


@each_dtype
@pytest.mark.parametrize("gate", [-1e4, -INF])
def test_open_gate_is_negative_binomial(dtype, gate):
    """As the gate's log odds go to minus infinity."""
    actual = value_and_gradients(ZeroInflatedNegativeBinomial, COUNTS, 3.0, 2.0, gate, dtype=dtype)
    np.testing.assert_allclose(actual[0], negative_binomial_log_prob(COUNTS, 3.0, 2.0), rtol=1e-6)
    np.testing.assert_allclose(actual[1], 2 * (COUNTS - 3) / (3 * (2 + 3)), rtol=1e-6)
    np.testing.assert_array_equal(actual[3], 0)


@each_dtype
@pytest.mark.parametrize("gate", [1e4, INF])
def test_closed_gate_gives_zeros(dtype, gate):
    """As the gate's log odds go to plus infinity."""
    family = ZeroInflatedNegativeBinomial
    log_prob, d_mu, _, d_gate = value_and_gradients(family, COUNTS, 3.0, 2.0, gate, dtype=dtype)
    assert log_prob[0] == 0 and d_mu[0] == 0 and d_gate[0] == 0
    truth = negative_binomial_log_prob(COUNTS, 3.0, 2.0) - gate
    np.testing.assert_allclose(log_prob[1:], truth[1:], rtol=1e-6)
    np.testing.assert_array_equal(d_gate[1:], -1)
    closed = family(*tensors(3.0, 2.0, gate, dtype=dtype))
    assert not closed.sample((1000,)).any() and closed.mean == 0 and closed.variance == 0


@each_dtype
@pytest.mark.parametrize("theta", [1e12, INF])
def test_large_theta_is_poisson(dtype, theta):
    """Values, gradients, moments and samples of both negative binomials."""
    nb = value_and_gradients(NegativeBinomial, COUNTS, 3.0, theta, dtype=dtype)
    np.testing.assert_allclose(nb[0], poisson_log_prob(COUNTS, 3.0), rtol=1e-6)
    np.testing.assert_allclose(nb[1], (COUNTS - 3) / 3, rtol=1e-6)
    assert np.abs(nb[2]).max() < 1e-20
    distribution = NegativeBinomial(*tensors(3.0, theta, dtype=dtype))
    assert_close(distribution.variance, distribution.mean)
    assert distribution.sample((1000,)).isfinite().all()
    zinb = value_and_gradients(ZeroInflatedNegativeBinomial, COUNTS, 3.0, theta, 0.5, dtype=dtype)
    truth = inflate(COUNTS, poisson_log_prob(COUNTS, 3.0), 0.5)
    np.testing.assert_allclose(zinb[0], truth, rtol=1e-6)
    assert all(np.isfinite(slope).all() for slope in zinb[1:])


@each_law
@each_dtype
def test_mean_of_zero(law, dtype):
    """All mass lies on zero; a zero there still pulls the mean with a finite gradient."""
    leaves = tensors(0.0, *law.parameters[1:], dtype=dtype, requires_grad=True)
    distribution = law.family(*leaves)
    log_prob = distribution.log_prob(torch.tensor([0, 1, 50])).tolist()
    assert log_prob == pytest.approx([0, -INF, -INF], abs=1e-6)
    distribution.log_prob(torch.tensor(0)).backward()
    open_probability = expit(-law.parameters[2]) if len(leaves) == 3 else 1.0
    assert leaves[0].grad.item() == pytest.approx(-open_probability)
    assert all(leaf.grad == 0 for leaf in leaves[1:])
    assert not distribution.sample((100,)).any()


# ---- Laws of probability ------------------------------------------------------------------------


@each_law
def test_probabilities_sum_to_one(law):
    """Over a long support."""
    assert law.make().log_prob(torch.tensor(SUPPORT)).exp().sum().item() == pytest.approx(1)


def moments(law) -> tuple[float, float, float]:
    """Mean, variance and fourth central moment, summed over scipy's probabilities."""
    probability = np.exp(law.log_prob(SUPPORT))
    mean = probability @ SUPPORT
    return mean, probability @ (SUPPORT - mean) ** 2, probability @ (SUPPORT - mean) ** 4


@each_law
def test_mean_and_variance(law):
    """Against sums over the support."""
    mean, variance, _ = moments(law)
    assert law.make().mean.item() == pytest.approx(mean)
    assert law.make().variance.item() == pytest.approx(variance)


# ---- Samples ------------------------------------------------------------------------------------

N_SAMPLES = 100_000


@each_law
@each_dtype
def test_samples_are_counts(law, dtype):
    """Integers from zero up, in the dtype of the parameters, without a gradient."""
    torch.manual_seed(0)
    x = law.family(*law.tensors((7,), dtype, requires_grad=True)).sample((50,))
    assert x.shape == (50, 7) and x.dtype == dtype and not x.requires_grad
    assert (x >= 0).all() and (x == x.round()).all() and x.unique().numel() > 1


@each_family
def test_samples_of_a_huge_mean_are_counts(family):
    """PyTorch's own sampler returns negative numbers there."""
    torch.manual_seed(0)
    rest = (2.0, -9.0)[: len(family.arg_constraints) - 1]
    x = family(*tensors(1e30, *rest, dtype=torch.float32)).sample((50,))
    assert x.isfinite().all() and (x >= 0).all() and x.max() > 1e6


@each_law
def test_moments_of_samples(law):
    """Mean and variance are off by no more than happens once in 1 / FALSE_ALARM times."""
    torch.manual_seed(1)
    x = law.make().sample((N_SAMPLES,)).numpy()
    mean, variance, fourth = moments(law)
    limit = stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(N_SAMPLES)
    assert abs(x.mean() - mean) < limit * np.sqrt(variance)
    assert abs(np.mean((x - mean) ** 2) - variance) < limit * np.sqrt(fourth - variance**2)


@each_law
@each_dtype
def test_goodness_of_fit(law, dtype):
    """Chi-square test over some 30 groups of counts of about equal probability."""
    torch.manual_seed(2)
    x = law.make(dtype=dtype).sample((N_SAMPLES,)).long().numpy()
    probability = np.exp(law.log_prob(SUPPORT))
    levels = np.floor(30 * np.cumsum(probability).clip(max=1 - 1e-9))
    _, group = np.unique(levels, return_inverse=True)
    expected = N_SAMPLES * np.bincount(group, probability)
    observed = np.bincount(group[x], minlength=len(expected))
    assert len(expected) > 1 and expected.min() > 10
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM


# ---- Shapes -------------------------------------------------------------------------------------


@each_law
def test_scalars(law):
    """Tensors without dimensions, and plain numbers."""
    distribution = law.make()
    assert distribution.batch_shape == distribution.event_shape == ()
    assert distribution.sample().shape == distribution.log_prob(torch.tensor(2.0)).shape == ()
    numbers = law.family(*law.parameters)
    assert numbers.log_prob(torch.tensor(2.0)).item() == pytest.approx(law.log_prob(2), rel=1e-5)


@each_law
def test_empty_tensors(law):
    """No cells give no numbers, and no error."""
    leaves = law.tensors((0, 3), requires_grad=True)
    distribution = law.family(*leaves)
    assert distribution.sample((2,)).shape == (2, 0, 3)
    log_prob = distribution.log_prob(torch.zeros(0, 3))
    log_prob.sum().backward()
    assert log_prob.shape == leaves[0].grad.shape == (0, 3)


@pytest.mark.parametrize("family", [NegativeBinomial, ZeroInflatedNegativeBinomial])
def test_parameters_broadcast(family):
    """A mean for each label, cell and gene; a theta for each gene; the gate a number."""
    mu, theta = torch.linspace(0.1, 9, 60).reshape(4, 5, 3), torch.tensor([0.1, 1, 10])
    parameters = (mu, theta, 0.5)[: len(family.arg_constraints)]
    distribution = family(*parameters)
    assert distribution.batch_shape == (4, 5, 3)
    assert all(getattr(distribution, name).shape == (4, 5, 3) for name in NAMES[: len(parameters)])
    x = torch.tensor([[0, 1, 2.0]]).expand(5, 3)
    assert distribution.log_prob(x).shape == (4, 5, 3)
    assert distribution.log_prob(x.expand(2, 1, 5, 3)).shape == (2, 4, 5, 3)
    truth = FAMILIES[family](x.numpy(), *(np.asarray(p, dtype=float) for p in parameters))
    np.testing.assert_allclose(distribution.log_prob(x).numpy(), truth, rtol=1e-5)


@each_law
def test_samples_broadcast(law):
    """Sample shapes are put before the batch shape."""
    distribution = law.make((4, 3))
    assert distribution.sample().shape == (4, 3)
    assert distribution.sample((2, 5)).shape == (2, 5, 4, 3)
    assert distribution.log_prob(distribution.sample((2, 5))).shape == (2, 5, 4, 3)


@each_law
def test_expand(law):
    """Expansion is a view of the same distribution."""
    narrow = law.make((3,))
    expanded = narrow.expand((5, 3))
    assert type(expanded) is law.family and expanded.batch_shape == (5, 3)
    assert expanded.mu.shape == (5, 3) and expanded.mu.data_ptr() == narrow.mu.data_ptr()
    assert expanded.mean.shape == expanded.variance.shape == (5, 3)
    assert expanded.sample().shape == (5, 3)
    x = np.array([0, 2, 9])
    wanted = np.broadcast_to(law.log_prob(x), (5, 3))
    np.testing.assert_allclose(expanded.log_prob(torch.tensor(x)), wanted, rtol=1e-8)


@each_law
@pytest.mark.parametrize("validate", [True, False])
def test_expand_keeps_validation(law, validate):
    """Whatever was asked for at the start."""
    expanded = law.make(validate_args=validate).expand((2,))
    if validate:
        with pytest.raises(ValueError, match="support"):
            expanded.log_prob(torch.tensor(0.5))
    else:
        expanded.log_prob(torch.tensor(0.5))


@each_law
def test_to_event(law):
    """The genes of a cell are one event, before and after expansion."""
    cells = law.make((3,)).to_event(1)
    assert cells.batch_shape == () and cells.event_shape == (3,)
    x = np.array([[0, 2, 9], [1, 0, 0]])
    truth = law.log_prob(x).sum(-1)
    np.testing.assert_allclose(cells.log_prob(torch.tensor(x)), truth, rtol=1e-8)
    expanded = cells.expand([2])
    assert expanded.batch_shape == (2,) and expanded.sample((4,)).shape == (4, 2, 3)
    np.testing.assert_allclose(expanded.log_prob(torch.tensor(x)), truth, rtol=1e-8)


@each_law
def test_inside_a_plate(law):
    """The log density of a subsampled plate is scaled to all cells; scalars are expanded."""
    x = np.array([[0, 2, 9], [1, 0, 0]])

    def model():
        with pyro.plate("cells", 10, subsample=torch.tensor([3, 7])):
            pyro.sample("unseen", law.make())
            return pyro.sample("x", law.make((3,)).to_event(1), obs=torch.tensor(x))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["unseen"]["value"].shape == (2,)
    assert trace.nodes["x"]["log_prob"].shape == (2,)
    total = trace.nodes["x"]["log_prob_sum"].item()
    assert total == pytest.approx(10 / 2 * law.log_prob(x).sum())


# ---- Bad input ----------------------------------------------------------------------------------


BAD_PARAMETERS = [
    (law, name, bad)
    for law in LAWS
    for name in law.family.arg_constraints
    for bad in (-1.0, float("nan"))
    if (name, bad) != ("gate_logits", -1.0)
]


@pytest.mark.parametrize(("law", "name", "bad"), BAD_PARAMETERS, ids=str)
def test_bad_parameter_raises(law, name, bad):
    """Means and thetas may not be negative, and nothing may be NaN."""
    parameters = {**dict(zip(NAMES, law.parameters, strict=False)), name: bad}
    arguments = {key: torch.tensor([value, value]) for key, value in parameters.items()}
    law.family(**arguments, validate_args=False)
    with pytest.raises(ValueError, match=name):
        law.family(**arguments, validate_args=True)


@pytest.mark.parametrize("family", [NegativeBinomial, ZeroInflatedNegativeBinomial])
def test_theta_of_zero_raises(family):
    """An inverse dispersion of zero is no distribution; a mean of zero is one."""
    rest = (0.0,)[: len(family.arg_constraints) - 2]
    family(0.0, 1.0, *rest, validate_args=True)
    with pytest.raises(ValueError, match="theta"):
        family(1.0, 0.0, *rest, validate_args=True)


@each_law
@pytest.mark.parametrize("bad", [-1.0, 0.5, float("nan"), INF])
def test_bad_value_raises(law, bad):
    """Counts are integers from zero up."""
    with pytest.raises(ValueError, match="support"):
        law.make(validate_args=True).log_prob(torch.tensor([1.0, bad]))


@each_law
def test_shapes_that_do_not_fit_raise(law):
    """Counts of four genes do not go with parameters of three."""
    with pytest.raises(ValueError, match="broadcast"):
        law.make((3,), validate_args=True).log_prob(torch.zeros(4))


@each_law
def test_validation_follows_pyro(law):
    """Unless told otherwise."""
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="mu"):
        law.family(torch.tensor(-1.0), *law.parameters[1:])
    with pyro.validation_enabled(False):
        law.family(torch.tensor(-1.0), *law.parameters[1:])
