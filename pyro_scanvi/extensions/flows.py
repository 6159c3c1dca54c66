r"""Normalizing flows of zuko as the prior of u, or as the posterior of z.

By Pyro's bridge to zuko, :class:`pyro.contrib.zuko.ZukoToPyro`. Both flows start as the identity:
a new model is the default one. KLs are taken at draws. Needs ``pip install "pyro-scanvi[flows]"``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import TorchDistribution, TransformedDistribution
from torch import Tensor, nn
from torch.distributions import AffineTransform

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.scanvae import SCANVAE

try:
    from zuko.flows import NSF, Flow
except ImportError as error:
    raise ImportError(
        'flows are those of zuko, which is not installed: pip install "pyro-scanvi[flows]"'
    ) from error

MakeFlow = Callable[[int, int], Flow]


class FlowDistribution(ZukoToPyro):
    """Pyro's bridge, which draws outside of a sample statement too."""

    dist: Any  # a NormalizingFlow of zuko

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterised draws, ``(*sample_shape, ..., K)``."""
        return self.dist.rsample(torch.Size(sample_shape))

    @property
    def centre(self) -> Tensor:
        """Where the mean of the base comes to lie, (..., K)."""
        return self.dist.transform.inv(self.dist.base.mean)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        """Of another batch shape."""
        return type(self)(self.dist.expand(torch.Size(batch_shape)))


class FlowPrior(SCANVAE):
    r"""p(u) by a flow: :math:`f(u) \sim \mathcal N(0, I)`.

    .. math:: \log p(u) = \log \mathcal N(f(u) \mid 0, I) + \log |\det f'(u)|

    Parameters
    ----------
    prior_flow
        From numbers of features and of context features to a flow of zuko, such as
        ``zuko.flows.MAF``; None is a neural spline flow (Durkan et al. 2019, NeurIPS, arXiv
        1906.04032), which is the identity beyond 5 in each dimension. Its last layers are set to 0.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.
    """

    def __init__(self, *args: Any, prior_flow: MakeFlow | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prior_flow = identity(prior_flow or NSF, self.n_latent)

    def p_u(self, cells: Cells) -> TorchDistribution:
        """The flow; batch () event (K,)."""
        return FlowDistribution(self.prior_flow())


class FlowPosterior(SCANVAE):
    r"""q(z | x) by a flow, in units of the default's posterior N(m(x), s(x)^2).

    .. math:: z = m(x) + s(x)\, g(\epsilon; h(x)), \quad \epsilon \sim \mathcal N(0, I)

    with h the hidden units of the encoder. It has no mean in closed form: cells are classified and
    shown at the z of :math:`\epsilon = 0`. (At a mean of 100 draws a step takes six times as long.)

    Parameters
    ----------
    posterior_flow
        From numbers of features and of context features to a flow of zuko; None is a neural spline
        flow of three coupling layers, fast both to draw from and to evaluate. (An autoregressive
        one takes a pass for each of the K dimensions to draw.) Its last layers are set to 0.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.
    """

    def __init__(self, *args: Any, posterior_flow: MakeFlow | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        coupled: MakeFlow = partial(NSF, passes=2)
        self.posterior_flow = identity(
            posterior_flow or coupled, self.n_latent, self.z_encoder.hidden.n_out
        )

    def q_z(self, cells: Cells) -> TorchDistribution:
        """The flow; batch (N,) event (K,)."""
        hidden = self.z_encoder.hidden(*self.encoder_input(cells))
        loc, scale = self.z_encoder.heads(hidden)
        standard = FlowDistribution(self.posterior_flow(hidden))
        return TransformedDistribution(standard, [AffineTransform(loc, scale, event_dim=1)])

    def latent_point(self, q_z: TorchDistribution) -> Tensor:
        """The z of epsilon = 0, where the default's mean is, (N, K)."""
        (units,) = q_z.transforms
        return units(q_z.base_dist.centre)


def identity(make: MakeFlow, n_features: int, n_context: int = 0) -> Flow:
    """A flow whose last layers are 0: of splines and of affine transforms the identity."""
    flow = make(n_features, n_context)
    for transform in flow.transform.transforms:
        for parameter in last_layer(transform).parameters():
            nn.init.zeros_(parameter)
    return flow


def last_layer(transform: nn.Module) -> nn.Module:
    """The last linear layer inside."""
    return [m for m in transform.modules() if isinstance(m, nn.Linear)][-1]
