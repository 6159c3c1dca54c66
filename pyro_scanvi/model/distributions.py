r"""Distributions of counts, as Pyro distributions.

All three are written in the form of Loader (2000), "Fast and accurate computation of binomial
probabilities": a log probability is a sum of deviances (:func:`_deviance`) and of errors of
Stirling's series (:func:`_stirling_error`), each of the size of the answer. The textbook form
subtracts log-gamma functions of the size of :math:`x \log x`, which leaves no digit of a float32
where the inverse dispersion is large. Gradients are written out for the same reason.

Most counts of a single cell are zero, so the expensive part is computed at the non-zeros only.
"""

import math
from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd import Function
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import softplus

from pyro_scanvi.model import count_kernels, kernels

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_STIRLING_FROM = 8.0  # from here on five terms of the series are exact in float64 to 1e-12
LARGEST_POISSON_RATE = 1e8  # float32 counts above 2**24 are no integers any more


def _stirling_error(z: Tensor) -> Tensor:
    r""":math:`\log\Gamma(z+1) - (z+\frac12)\log z + z - \frac12\log 2\pi`, for z > 0."""
    w = z.clamp(min=_STIRLING_FROM).reciprocal()
    w2 = w * w
    series = w * (1 / 12 - w2 * (1 / 360 - w2 * (1 / 1260 - w2 * (1 / 1680 - w2 * (1 / 1188)))))
    small = z.clamp(max=_STIRLING_FROM)
    exact = torch.lgamma(small + 1) - (small + 0.5) * small.log() + small - _HALF_LOG_2PI
    return torch.where(z < _STIRLING_FROM, exact, series)


def _deviance(x: Tensor, expected: Tensor, difference: Tensor) -> Tensor:
    r""":math:`x\log(x/m) + m - x \ge 0`, with :math:`x - m` handed in because it is known better.

    Near :math:`x = m` both terms cancel, so there the series in v = (x - m) / (x + m) is taken.
    """
    v = difference / (x + expected)
    near = v.abs() < 0.1
    v = torch.where(near, v, torch.zeros_like(v))
    v2 = v * v
    tail = v * v2 * (1 / 3 + v2 * (1 / 5 + v2 * (1 / 7 + v2 * (1 / 9 + v2 * (1 / 11 + v2 / 13)))))
    series = difference * v + 2 * x * tail
    return torch.where(near, series, x * (x / expected).log() - difference)


def _poisson_log_prob(x: Tensor, rate: Tensor) -> Tensor:
    """Poisson at counts x > 0."""
    return -_stirling_error(x) - _deviance(x, rate, x - rate) - 0.5 * x.log() - _HALF_LOG_2PI


def _negative_binomial_log_prob(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """Negative binomial at counts x > 0."""
    total = x + theta
    ratio = total / (theta + mean)
    difference = theta * ((x - mean) / (theta + mean))
    deviance = _deviance(x, mean * ratio, difference) + _deviance(theta, theta * ratio, -difference)
    stirling = _stirling_error(total) - _stirling_error(theta) - _stirling_error(x)
    return stirling - deviance - 0.5 * (x * (total / theta)).log() - _HALF_LOG_2PI


def _log_minus(ratio: Tensor, t: Tensor) -> Tensor:
    """log(ratio) - t, where ratio = 1 + t > 0, without cancellation near t = 0."""
    near = t.abs() < 0.08
    s = t.clamp(min=-0.08, max=0.08)
    series = s * (1 / 9)
    for coefficient in (-1 / 8, 1 / 7, -1 / 6, 1 / 5, -1 / 4, 1 / 3, -1 / 2):
        series = (series + coefficient) * s
    return torch.where(near, series * s, ratio.log() - t)


def _log_minus_at_zeros(u: Tensor, log1p_u: Tensor, share: Tensor) -> Tensor:
    """share - log(1 + u), where share = u / (1 + u), without cancellation near u = 0.

    It is :func:`_log_minus` at the zeros, which are most counts: in place, and by a logarithm that
    the forward pass has taken already.
    """
    edge, n_terms = (0.02, 4) if u.dtype == torch.float32 else (0.02, 10)
    s = u.clamp(max=edge)
    series = torch.zeros_like(s)
    for k in range(n_terms + 1, 1, -1):
        series.add_((-1) ** (k + 1) * (k - 1) / k).mul_(s)
    return torch.where(u < edge, series.mul_(s), share - log1p_u)


def _digamma_excess(x: Tensor, theta: Tensor) -> Tensor:
    r""":math:`\psi(x+\theta) - \psi(\theta) - \log(1 + x/\theta)`, for x > 0.

    The asymptotic series of :math:`\psi(z) - \log z` is differenced term by term where theta is
    large; each difference of powers is factored, so that nothing cancels.
    """
    small = theta.clamp(max=_STIRLING_FROM)
    exact = torch.digamma(x + small) - torch.digamma(small) - torch.log1p(x / small)
    a = theta.clamp(min=_STIRLING_FROM).reciprocal()
    b = (x + theta.clamp(min=_STIRLING_FROM)).reciprocal()
    step = x * a * b  # 1/theta - 1/(x + theta)
    a2, b2 = a * a, b * b
    by_squares = 1 / 12 - (a2 + b2) * (1 / 120) + (a2 * a2 + a2 * b2 + b2 * b2) * (1 / 252)
    by_squares = by_squares - (a2 + b2) * (a2 * a2 + b2 * b2) * (1 / 240)
    series = step * (0.5 + (a + b) * by_squares)
    return torch.where(theta < _STIRLING_FROM, exact, series)


def _nonzeros(value: Tensor) -> Tensor:
    """Flat positions of the non-zero counts, for `take` and `_put`."""
    return (value > 0).reshape(-1).nonzero().squeeze(-1)


def _put(dense: Tensor, where: Tensor, at: Tensor) -> Tensor:
    """Overwrite `dense` at flat positions; unlike `put_`, this has a deterministic algorithm."""
    return dense.reshape(-1).index_copy_(0, where, at).reshape(dense.shape)


class _PoissonLogProb(Function):
    """log Poisson(x | rate) of equal shapes; gradient (x - rate) / rate."""

    @staticmethod
    def forward(ctx, value: Tensor, rate: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(value, rate, where)
        return _put(-rate, where, _poisson_log_prob(value.take(where), rate.take(where)))

    @staticmethod
    def backward(ctx, grad: Tensor):
        value, rate, where = ctx.saved_tensors
        x, m = value.take(where), rate.take(where)
        slope = _put(torch.full_like(rate, -1.0), where, (x - m) / m)
        return None, grad * slope, None


class _NegativeBinomialLogProb(Function):
    r"""log NB(x | mean, theta) of equal shapes.

    .. math::
        \partial_\mu &= \theta (x-\mu) / (\mu(\theta+\mu)), \\
        \partial_\theta &= [\psi(x+\theta) - \psi(\theta) - \log(1 + x/\theta)]
            + \log(1+t) - t, \quad t = (x-\mu)/(\theta+\mu).
    """

    @staticmethod
    def forward(ctx, value: Tensor, mean: Tensor, theta: Tensor, where: Tensor) -> Tensor:
        log1p_ratio = torch.log1p(mean / theta)
        ctx.save_for_backward(value, mean, theta, where, log1p_ratio)
        at = _negative_binomial_log_prob(value.take(where), mean.take(where), theta.take(where))
        return _put(log1p_ratio * -theta, where, at)

    @staticmethod
    def backward(ctx, grad: Tensor):
        value, mean, theta, where, log1p_ratio = ctx.saved_tensors
        total, ratio = theta + mean, mean / theta
        if torch.is_grad_enabled():  # a second derivative goes through the logarithm too
            log1p_ratio = torch.log1p(ratio)
        d_theta = _log_minus_at_zeros(ratio, log1p_ratio, mean / total)
        x, m, r = value.take(where), mean.take(where), theta.take(where)
        t = (x - m) / (r + m)
        at = _digamma_excess(x, r) + _log_minus((x + r) / (r + m), t)
        d_mean = _put(-theta / total, where, t * (r / m))
        return None, grad * d_mean, grad * _put(d_theta, where, at), None


class _ZeroInflatedLogProb(Function):
    r"""log of :math:`\pi [x = 0] + (1-\pi) p(x)` from log p(x) and the logits of :math:`\pi`.

    With w the probability that an observed zero is a structural one, the gradient by log p is
    1 - w, and by the logits :math:`w - \pi`.
    """

    @staticmethod
    def forward(ctx, base_log_prob: Tensor, gate_logits: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(base_log_prob, gate_logits, where)
        logits = finite(gate_logits)
        at_zeros = torch.logaddexp(logits, base_log_prob) - softplus(logits)
        at = base_log_prob.take(where) - softplus(gate_logits.take(where))
        return _put(at_zeros, where, at)

    @staticmethod
    def backward(ctx, grad: Tensor):
        base_log_prob, gate_logits, where = ctx.saved_tensors
        structural = torch.sigmoid(gate_logits - base_log_prob)
        structural = structural.reshape(-1).index_fill(0, where, 0.0).reshape(grad.shape)
        d_gate = structural - torch.sigmoid(gate_logits)
        return grad * (1 - structural), grad * d_gate, None


def _negative_binomial(value: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    return _NegativeBinomialLogProb.apply(value, mean, finite(theta), _nonzeros(value))


def _zero_inflated(value: Tensor, mean: Tensor, theta: Tensor, gate_logits: Tensor) -> Tensor:
    where = _nonzeros(value)
    base = _NegativeBinomialLogProb.apply(value, mean, finite(theta), where)
    return _ZeroInflatedLogProb.apply(base, gate_logits, where)


class _InOnePass(Function):
    """A log probability by a kernel, which gives its slopes with it; `plain` are the formulas."""

    @staticmethod
    def forward(ctx, kernel: Callable, plain: Callable, value: Tensor, *parameters: Tensor):
        log_prob, *slopes = kernel(value, *parameters)
        ctx.plain = plain
        ctx.save_for_backward(value, *parameters, *slopes)
        return log_prob

    @staticmethod
    def backward(ctx, grad: Tensor):
        wanted = ctx.needs_input_grad[3:]
        value, *saved = ctx.saved_tensors
        parameters, slopes = saved[: len(wanted)], saved[len(wanted) :]
        if not torch.is_grad_enabled():
            told = [grad * d if w else None for d, w in zip(slopes, wanted, strict=True)]
            return None, None, None, *told
        # A second derivative is to come, which goes through the formulas.
        log_prob = ctx.plain(value, *parameters)
        return None, None, None, *kernels.slopes_of_plain(log_prob, parameters, wanted, grad)


def _quickest(kernel: Callable, plain: Callable, *arguments: Tensor) -> Tensor:
    """By the kernel where it serves, in a fourth of the time."""
    if kernels.serve(*arguments):
        return _InOnePass.apply(kernel, plain, *arguments)
    return plain(*arguments)


class CountDistribution(TorchDistribution):
    """What the count distributions share: parameters of one shape, counts as support."""

    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(self, *parameters: Tensor, validate_args: bool | None = None):
        shaped = broadcast_all(*parameters)
        for name, parameter in zip(self.arg_constraints, shaped, strict=True):
            setattr(self, name, parameter)
        super().__init__(shaped[0].shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        """The same distribution with its parameters expanded to `batch_shape`; copies nothing."""
        new = type(self).__new__(type(self)) if _instance is None else _instance
        batch_shape = torch.Size(batch_shape)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts; broadcasts `value` against the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        parameters = self._parameters()
        value = torch.as_tensor(value, dtype=parameters[0].dtype)
        return self._log_prob(*broadcast_all(value, *parameters))

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        """Counts of shape ``sample_shape + batch_shape``, in the dtype of the parameters."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            return self._sample(*(p.expand(shape) for p in self._parameters()))

    def _parameters(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.arg_constraints]


class Poisson(CountDistribution):
    r"""Poisson with rate :math:`\mu`.

    .. math:: p(x) = e^{-\mu} \mu^x / x!

    Parameters
    ----------
    mu
        Mean, :math:`\mu \ge 0`.
    validate_args
        Check parameters and values; None follows Pyro's setting.

    Raises
    ------
    ValueError
        If validation is on and a parameter or a value lies outside its constraint.
    """

    arg_constraints = {"mu": constraints.nonnegative}

    def __init__(self, mu: Tensor, validate_args: bool | None = None):
        super().__init__(mu, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """E[x] = mu."""
        return self.mu

    @property
    def variance(self) -> Tensor:
        """Var[x] = mu."""
        return self.mu

    def _log_prob(self, value: Tensor, mu: Tensor) -> Tensor:
        return _PoissonLogProb.apply(value, mu, _nonzeros(value))

    def _sample(self, mu: Tensor) -> Tensor:
        return torch.poisson(mu.clamp(max=LARGEST_POISSON_RATE))


class NegativeBinomial(CountDistribution):
    r"""Negative binomial by mean and inverse dispersion: a Gamma mixture of Poissons.

    .. math::
        p(x) = \frac{\Gamma(x+\theta)}{\Gamma(\theta)\, x!}
               \Big(\frac{\theta}{\theta+\mu}\Big)^{\theta}
               \Big(\frac{\mu}{\theta+\mu}\Big)^{x}

    Parameters
    ----------
    mu
        Mean, :math:`\mu \ge 0`.
    theta
        Inverse dispersion, :math:`\theta > 0`; Poisson as it goes to infinity.
    validate_args
        Check parameters and values; None follows Pyro's setting.

    Raises
    ------
    ValueError
        If validation is on and a parameter or a value lies outside its constraint.
    """

    arg_constraints = {"mu": constraints.nonnegative, "theta": constraints.positive}

    def __init__(self, mu: Tensor, theta: Tensor, validate_args: bool | None = None):
        super().__init__(mu, theta, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """E[x] = mu."""
        return self.mu

    @property
    def variance(self) -> Tensor:
        """Var[x] = mu + mu^2 / theta."""
        return self.mu + self.mu * (self.mu / self.theta)

    def _log_prob(self, value: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        return _quickest(count_kernels.negative_binomial, _negative_binomial, value, mu, theta)

    def _sample(self, mu: Tensor, theta: Tensor) -> Tensor:
        theta = finite(theta)
        rate = torch._standard_gamma(theta) * (mu / theta)
        return torch.poisson(rate.clamp(max=LARGEST_POISSON_RATE))


class ZeroInflatedNegativeBinomial(CountDistribution):
    r"""Negative binomial that a gate closes, to an exact zero, with probability :math:`\pi`.

    .. math:: p(x) = \pi\,[x=0] + (1-\pi)\,\mathrm{NB}(x;\mu,\theta), \quad
              \pi = \mathrm{sigmoid}(h)

    Lopez et al. (2018), Nat Methods 15:1053, online methods, eq. 8-13.

    Parameters
    ----------
    mu
        Mean of the negative binomial component, :math:`\mu \ge 0`.
    theta
        Inverse dispersion, :math:`\theta > 0`; a zero-inflated Poisson as it goes to infinity.
    gate_logits
        Log odds h of a structural zero; the negative binomial as it goes to minus infinity.
    validate_args
        Check parameters and values; None follows Pyro's setting.

    Raises
    ------
    ValueError
        If validation is on and a parameter or a value lies outside its constraint.

    Examples
    --------
    Without dispersion, and with a gate that is shut half of the time, p(0) = (1 + exp(-mu)) / 2.

    >>> mu, theta, gate_logits = torch.tensor([3.0, 1e10, 0.0])
    >>> zinb = ZeroInflatedNegativeBinomial(mu, theta, gate_logits)
    >>> zinb.mean
    tensor(1.5000)
    >>> zinb.log_prob(torch.tensor(0.0)).exp(), (1 + torch.exp(-mu)) / 2
    (tensor(0.5249), tensor(0.5249))
    """

    arg_constraints = {
        "mu": constraints.nonnegative,
        "theta": constraints.positive,
        "gate_logits": constraints.real,
    }

    def __init__(
        self, mu: Tensor, theta: Tensor, gate_logits: Tensor, validate_args: bool | None = None
    ):
        super().__init__(mu, theta, gate_logits, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """E[x] = (1 - pi) mu."""
        return torch.sigmoid(-self.gate_logits) * self.mu

    @property
    def variance(self) -> Tensor:
        """Var[x] = (1 - pi) mu (1 + mu / theta + pi mu)."""
        spread = 1 + self.mu / self.theta + torch.sigmoid(self.gate_logits) * self.mu
        return self.mean * spread

    def _log_prob(self, value: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor) -> Tensor:
        arguments = value, mu, theta, gate_logits
        return _quickest(count_kernels.zero_inflated, _zero_inflated, *arguments)

    def _sample(self, mu: Tensor, theta: Tensor, gate_logits: Tensor) -> Tensor:
        counts = NegativeBinomial(mu, theta, validate_args=False).sample()
        return counts * torch.bernoulli(torch.sigmoid(-gate_logits))


def finite(parameter: Tensor) -> Tensor:
    """Keep a parameter where its products are finite; its limit is reached long before."""
    return parameter.clamp(max=math.sqrt(torch.finfo(parameter.dtype).max))
