r"""Further likelihoods of counts, for ``gene_likelihood=``, and a covariate on the gate.

Both have the mean :math:`\mu = l \rho` and an inverse dispersion :math:`\theta > 0` that makes
Poisson as it goes to infinity, as the negative binomial has them: all dispersions go with them.
"""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.special import get_quad_rule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import one_hot

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.distributions import (
    LARGEST_POISSON_RATE,
    CountDistribution,
    Poisson,
    finite,
)
from pyro_scanvi.model.growth import ByBatch, grows
from pyro_scanvi.model.likelihoods import CountParameters, GeneLikelihood
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError

N_NODES = 16
N_NEWTON = 5
SMALLEST_MEAN = 1e-30  # where gradients of its logarithm are finite
NARROW = 0.01  # variance of the log rate from which on its mode is known better by its logarithm


class _ByMeanAndTheta(CountDistribution):
    """Counts by their mean and an inverse dispersion."""

    arg_constraints = {"mu": constraints.nonnegative, "theta": constraints.positive}
    mu: Tensor
    theta: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x] = mu."""
        return self.mu


class PoissonLogNormal(_ByMeanAndTheta):
    r"""Poisson with a LogNormal rate of mean :math:`\mu`, by its inverse dispersion.

    .. math:: x \sim \mathrm{Poisson}(\mu\, e^{\sigma t - \sigma^2 / 2}), \qquad
        t \sim \mathcal N(0, 1), \qquad \sigma^2 = \log(1 + 1/\theta)

    Aitchison and Ho (1989), Biometrika 76:643. Mean and variance are those of the negative binomial
    of :math:`\mu` and :math:`\theta`; its tail is heavier. The integral over t has no closed form:
    it is a Gauss-Hermite sum of 16 nodes that are laid about the mode of the integrand, as wide as
    its curvature there says (Liu and Pierce 1994, Biometrika 81:624); nodes of the prior of t
    would all miss the mode of a large count. The mode solves Lambert's equation, by Newton's steps.

    Parameters
    ----------
    mu
        Mean, :math:`\mu \ge 0`.
    theta
        Inverse dispersion, :math:`\theta > 0`; Poisson as it goes to infinity.
    validate_args
        Check parameters and values; None follows Pyro's setting.

    Examples
    --------
    >>> PoissonLogNormal(torch.tensor(3.0), torch.tensor(0.5)).log_prob(torch.arange(3.0)).exp()
    tensor([0.2520, 0.2200, 0.1533])
    """

    @property
    def variance(self) -> Tensor:
        """Var[x] = mu + mu^2 / theta."""
        return self.mu + self.mu * (self.mu / self.theta)

    def _log_prob(self, value: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        variance = finite(theta).reciprocal().log1p()
        log_mu, sd = mu.clamp(min=SMALLEST_MEAN).log(), variance.sqrt()
        nodes, log_weights = get_quad_rule(N_NODES, value)
        # Constants: the sum is the same for all nodes that cover the integrand.
        mode, width = _laplace(value, log_mu.detach(), variance.detach())
        rate = (log_mu + sd * mode - variance / 2).exp()
        at_mode = Poisson(rate, validate_args=False).log_prob(value) - mode * mode / 2
        # By the step from the mode, as log rate and as t, nothing of the size of x log x is left.
        step = (sd * width).unsqueeze(-1) * nodes
        slope, curvature = (mode * width).unsqueeze(-1), (1 - width * width).unsqueeze(-1) / 2
        terms = value.unsqueeze(-1) * step - rate.unsqueeze(-1) * step.expm1()
        terms = terms - slope * nodes + (curvature * nodes.square() + log_weights)
        return at_mode + width.log() + terms.logsumexp(-1)

    def _sample(self, mu: Tensor, theta: Tensor) -> Tensor:
        return torch.poisson(_lognormal_rate(mu, theta).clamp(max=LARGEST_POISSON_RATE))


class GeneralisedPoisson(_ByMeanAndTheta):
    r"""Generalised Poisson by mean and inverse dispersion, Consul and Jain (1973).

    .. math:: p(x) = \frac{a (a + \lambda x)^{x - 1} e^{-a - \lambda x}}{x!}, \qquad
        \lambda = \frac{1}{1 + \theta}, \quad a = \mu (1 - \lambda)

    Technometrics 15:791. The variance is :math:`\mu (1 + 1/\theta)^2`, in proportion to the mean,
    where that of a negative binomial is a parabola. Their negative :math:`\lambda`, for less
    variance than Poisson, do not sum to 1 and are left out. A draw is the number of all members of
    a family tree that begins with Poisson(a) of them who have Poisson(:math:`\lambda`) children
    each (Consul and Shenton 1972, SIAM J Appl Math 23:239).

    Parameters
    ----------
    mu
        Mean, :math:`\mu \ge 0`.
    theta
        Inverse dispersion, :math:`\theta > 0`; Poisson as it goes to infinity.
    validate_args
        Check parameters and values; None follows Pyro's setting.

    Examples
    --------
    >>> GeneralisedPoisson(torch.tensor(3.0), torch.tensor(1.0)).log_prob(torch.arange(3.0)).exp()
    tensor([0.2231, 0.2030, 0.1539])
    """

    @property
    def variance(self) -> Tensor:
        """Var[x] = mu (1 + 1 / theta)^2."""
        return self.mu * (1 + 1 / self.theta).square()

    def _log_prob(self, value: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
        first, rate = _first_and_children(mu.clamp(min=SMALLEST_MEAN), theta)
        total = first + rate * value
        log_share = first.log() - total.log()
        # Poisson of rate a + lambda x, times a / (a + lambda x); at 0 the second is 1.
        log_share = torch.where(value > 0, log_share, torch.zeros_like(log_share))
        return Poisson(total, validate_args=False).log_prob(value) + log_share

    def _sample(self, mu: Tensor, theta: Tensor) -> Tensor:
        first, rate = _first_and_children(mu, theta)
        total = torch.poisson(first.clamp(max=LARGEST_POISSON_RATE))
        rate, counts = rate.reshape(-1), total.clone().reshape(-1)
        alive = counts.nonzero().squeeze(-1)
        generation = counts[alive]
        while len(alive):
            generation = torch.poisson(generation * rate[alive])
            counts[alive] += generation
            alive, generation = alive[generation > 0], generation[generation > 0]
        return counts.reshape(total.shape)


def _laplace(x: Tensor, log_mu: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mode and width in t of :math:`\mathrm{Poisson}(x \mid e^{m + \sigma t}) N(t \mid 0, 1)`.

    With :math:`w = \sigma^2 e^{m + \sigma t}` the mode solves :math:`w + \log w = c`. Newton's
    steps by log w come from the right, where they cannot overshoot, and double the digits.
    """
    m = log_mu - variance / 2
    c = m + variance * x + variance.log()
    log_w = torch.minimum(c, c.clamp(min=1).log())
    for _ in range(N_NEWTON):
        w = log_w.exp()
        log_w = log_w - (log_w + w - c) / (1 + w)
    w, sd = log_w.exp(), variance.sqrt()
    by_logarithm = (log_w - variance.log() - m) / sd
    mode = torch.where(variance > NARROW, by_logarithm, sd * x - w / sd)
    return mode, (1 + w).rsqrt()


def _lognormal_rate(mu: Tensor, theta: Tensor) -> Tensor:
    """A draw of the rate."""
    variance = finite(theta).reciprocal().log1p()
    return mu * (variance.sqrt() * torch.randn_like(mu) - variance / 2).exp()


def _first_and_children(mu: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """a and lambda of a generalised Poisson."""
    rate = 1 / (1 + finite(theta))
    return mu * (finite(theta) * rate), rate


# Functions, not lambdas: a model can be pickled, and a folder names them.
def _poisson_lognormal(p: CountParameters) -> TorchDistribution:
    return PoissonLogNormal(p.mu, p.theta)


def _generalised_poisson(p: CountParameters) -> TorchDistribution:
    return GeneralisedPoisson(p.mu, p.theta)


def _parameters(p: Any) -> dict[str, Tensor]:
    return {"mean": p.mu, "dispersions": p.theta}


def _rate(p: CountParameters) -> Tensor:
    """The Poisson-lognormal without its Poisson noise."""
    return _lognormal_rate(p.mu, p.theta.expand_as(p.mu))


def _mu(p: CountParameters) -> Tensor:
    return p.mu


poisson_lognormal = GeneLikelihood(
    _poisson_lognormal, uses_gate=False, parameters=_parameters, denoised=_rate
)
generalised_poisson = GeneLikelihood(
    _generalised_poisson, uses_gate=False, parameters=_parameters, denoised=_mu
)


class CovariateGate(SCANVAE):
    r"""Batch and continuous covariates add to the log odds of a structural zero.

    .. math:: h_g(z, s, c) + \alpha_{sg} + \sum_k c_k \beta_{kg}

    The decoder's gate h, which reads the covariates by its hidden layers, keeps them; what is added
    is linear and starts at 0. A new batch of a query starts at the mean of the old ones.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        If the likelihood of the counts has no gate.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.likelihood.uses_gate:
            raise InputError(
                "CovariateGate changes the gate of gene_likelihood='zinb', and the likelihood that "
                "was given has none; leave gene_likelihood out"
            )
        n_features = self.n_continuous_cov + self.n_batch
        self.gate_effect = nn.Parameter(torch.zeros(n_features, self.n_input))
        grows(self, gate_effect=ByBatch(dim=0))

    def decode_gate(self, hidden: Tensor, cells: Cells) -> Tensor:
        """Log odds of a structural zero, (..., N, G)."""
        features = one_hot(cells.batch, self.n_batch).to(hidden.dtype)
        if cells.continuous is not None:
            features = torch.cat([cells.continuous.to(hidden.dtype), features], -1)
        return super().decode_gate(hidden, cells) + features @ self.gate_effect
