"""The parts of p(x | z, l, y, s) that can be swapped: the gene likelihood and its dispersion.

``GENE_LIKELIHOODS`` and ``DISPERSIONS`` are the only tables from names to such parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, Gamma

from pyro_scanvi.model.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyro_scanvi.model.growth import ByBatch, ByCovariates, ByLabel, grows
from pyro_scanvi.model.networks import Head
from pyro_scanvi.model.pyro_internals import elements


class CountParameters:
    """What a gene likelihood may read; computed when read, so that unused ones cost nothing.

    Attributes
    ----------
    rho
        Expression of each gene, (..., N, G).
    mu
        Mean count, l * rho, (..., N, G).
    theta
        Inverse dispersion, broadcastable to `mu`.
    gate_logits
        Log odds of a structural zero, (..., N, G).
    """

    def __init__(
        self,
        library: Tensor,
        expression: Callable[[], Tensor],
        log_theta: Callable[[], Tensor],
        gate_logits: Callable[[], Tensor],
    ):
        self._library = library
        self._expression = expression
        self._log_theta = log_theta
        self._gate_logits = gate_logits

    @cached_property
    def rho(self) -> Tensor:
        return self._expression()

    @cached_property
    def mu(self) -> Tensor:
        return self._library * self.rho

    @cached_property
    def theta(self) -> Tensor:
        return self._log_theta().exp()

    @cached_property
    def gate_logits(self) -> Tensor:
        return self._gate_logits()


def _mean(p: Distribution) -> dict[str, Tensor]:
    return {"mean": p.mean}


@dataclass(frozen=True)
class GeneLikelihood:
    """A likelihood of counts, and which parameters it reads beside the mean.

    Parameters
    ----------
    distribution
        From :class:`CountParameters` to a Distribution of batch shape (..., N, G).
    uses_theta, uses_gate
        Whether the model owns a dispersion, and a gate, for it.
    parameters
        From that Distribution to what is told of it by name, (..., N, G) each; its mean.
    denoised
        A draw of expression without the noise of counting, (..., N, G), for correlations of genes;
        where there is no such thing a draw of the counts themselves.
    """

    distribution: Callable[[CountParameters], TorchDistribution]
    uses_theta: bool = True
    uses_gate: bool = True
    parameters: Callable[[Distribution], dict[str, Tensor]] = _mean
    denoised: Callable[[CountParameters], Tensor] | None = None

    def expression_draw(self, p: CountParameters) -> Tensor:
        """A draw of what genes are correlated over, (..., N, G)."""
        return self.distribution(p).sample() if self.denoised is None else self.denoised(p)


def elementwise(distribution: Distribution) -> Distribution:
    """The distribution of each gene or dimension, where they are independent."""
    return elements(distribution)[0]


# Functions, not lambdas: a model can be pickled.
def _zinb(p: CountParameters) -> TorchDistribution:
    return ZeroInflatedNegativeBinomial(p.mu, p.theta, p.gate_logits)


def _nb(p: CountParameters) -> TorchDistribution:
    return NegativeBinomial(p.mu, p.theta)


def _poisson(p: CountParameters) -> TorchDistribution:
    return Poisson(p.mu)


def _nb_parameters(p: Any) -> dict[str, Tensor]:
    return {"mean": p.mu, "dispersions": p.theta}


def _zinb_parameters(p: Any) -> dict[str, Tensor]:
    """The mean is that of the negative binomial, before any structural zeros."""
    return _nb_parameters(p) | {"dropout": p.gate_logits.sigmoid()}


def _gamma(p: CountParameters) -> Tensor:
    """The negative binomial without its Poisson noise: Gamma of mean mu and shape theta."""
    theta = p.theta.expand_as(p.mu)
    return p.mu * Gamma(theta, theta).sample()


def _mu(p: CountParameters) -> Tensor:
    return p.mu


GENE_LIKELIHOODS = {
    "zinb": GeneLikelihood(_zinb, parameters=_zinb_parameters, denoised=_gamma),
    "nb": GeneLikelihood(_nb, uses_gate=False, parameters=_nb_parameters, denoised=_gamma),
    "poisson": GeneLikelihood(_poisson, uses_theta=False, uses_gate=False, denoised=_mu),
}


def reads_label(dispersion: nn.Module | None) -> bool:
    """Whether log theta depends on the label; None is a model without theta.

    A dispersion says so itself, by an attribute ``reads_label``. One that says nothing is taken to
    read it: asking for labels in vain is better than decoding with wrong ones.
    """
    return dispersion is not None and bool(getattr(dispersion, "reads_label", True))


class GeneDispersion(nn.Module):
    """One log theta for each gene."""

    reads_label = False

    def __init__(self, n_genes: int):
        super().__init__()
        self.log_theta = nn.Parameter(torch.randn(n_genes))

    def forward(self, hidden: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        """Log theta of shape (G,)."""
        return self.log_theta


class GeneBatchDispersion(nn.Module):
    """One log theta for each gene and biological batch."""

    reads_label = False

    def __init__(self, n_genes: int, n_batch: int):
        super().__init__()
        self.log_theta = nn.Parameter(torch.randn(n_batch, n_genes))
        grows(self, log_theta=ByBatch(dim=0))

    def forward(self, hidden: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        """Log theta of the batch of each cell, (N, G)."""
        return self.log_theta[batch]


class GeneLabelDispersion(nn.Module):
    """One log theta for each gene and label; enumerated with the label of unlabelled cells."""

    reads_label = True

    def __init__(self, n_genes: int, n_labels: int):
        super().__init__()
        self.log_theta = nn.Parameter(torch.randn(n_labels, n_genes))
        grows(self, log_theta=ByLabel(dim=0))

    def forward(self, hidden: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        """Log theta of the label of each cell, (..., N, G)."""
        return y @ self.log_theta


class GeneCellDispersion(nn.Module):
    """One log theta for each gene and cell, decoded from the cell's state."""

    reads_label = False

    def __init__(self, n_hidden: int, n_genes: int):
        super().__init__()
        self.head = Head(n_hidden, n_genes)
        grows(self.head, weight=ByCovariates(dim=1))  # which it reads without hidden layers

    def forward(self, hidden: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        """Log theta decoded from the hidden units, (..., N, G)."""
        return self.head(hidden)


@dataclass(frozen=True)
class Sizes:
    """The dimensions that the dispersions are made from."""

    n_genes: int
    n_batch: int
    n_labels: int
    n_hidden: int


DISPERSIONS: dict[str, Callable[[Sizes], nn.Module]] = {
    "gene": lambda n: GeneDispersion(n.n_genes),
    "gene-batch": lambda n: GeneBatchDispersion(n.n_genes, n.n_batch),
    "gene-label": lambda n: GeneLabelDispersion(n.n_genes, n.n_labels),
    "gene-cell": lambda n: GeneCellDispersion(n.n_hidden, n.n_genes),
}
