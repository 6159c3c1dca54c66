r"""Posteriors of a cell's state, q(z | x), with correlations between its dimensions.

They start at, or near, the diagonal posterior of :class:`~pyro_scanvi.SCANVAE`: what is added to
its variance reads the same hidden units by a linear head.
"""

from typing import Any

import torch
from pyro.distributions import (
    LowRankMultivariateNormal,
    MultivariateNormal,
    TorchDistribution,
)
from torch import nn

from pyro_scanvi import validation
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.growth import ByCovariates, grows
from pyro_scanvi.model.networks import Head
from pyro_scanvi.model.scanvae import SCANVAE

SMALL_FACTOR = 0.1  # not 0, where nothing tells the factors apart


class FullCovariancePosterior(SCANVAE):
    r"""q(z | x) = N(m, L L'), a full covariance by its Cholesky factor.

    .. math:: L = \mathrm{diag}(s(x))\,(I + T(x))

    with T strictly lower triangular, linear in the encoder's hidden units and 0 at the start, so
    that a new model is the default one. s is the default's scale.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        For one latent dimension, which has nothing to covary with.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        validation.check_at_least(2, n_latent=self.n_latent)
        n_below = self.n_latent * (self.n_latent - 1) // 2
        self.z_below = Head(self.z_encoder.hidden.n_out, n_below)
        for parameter in self.z_below.parameters():
            nn.init.zeros_(parameter)
        grows(self, z_below=ByCovariates(dim=1))  # which it reads where there is no hidden layer

    def q_z(self, cells: Cells) -> TorchDistribution:
        """The multivariate normal; batch (N,) event (K,)."""
        hidden = self.z_encoder.hidden(*self.encoder_input(cells))
        loc, scale = self.z_encoder.heads(hidden)
        factor = torch.eye(self.n_latent, dtype=loc.dtype, device=loc.device)
        factor = factor.repeat(*loc.shape[:-1], 1, 1)
        row, column = torch.tril_indices(self.n_latent, self.n_latent, -1)
        factor[..., row, column] = self.z_below(hidden)
        return MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * factor)


class LowRankPosterior(SCANVAE):
    r"""q(z | x) = N(m, S (I + F F') S), correlations of low rank.

    S = diag(s(x)) with the default's scale s, and F(x), (K, r), linear in the encoder's hidden
    units. F starts near 0 and not at it: there all its columns are alike.

    Parameters
    ----------
    rank
        r.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        For a rank below 1.
    """

    def __init__(self, *args: Any, rank: int = 2, **kwargs: Any):
        super().__init__(*args, **kwargs)
        validation.check_at_least(1, rank=rank)
        self.z_factor = Head(self.z_encoder.hidden.n_out, self.n_latent * rank)
        nn.init.zeros_(self.z_factor.weight)
        nn.init.normal_(self.z_factor.bias, std=SMALL_FACTOR)
        grows(self, z_factor=ByCovariates(dim=1))  # which it reads where there is no hidden layer

    def q_z(self, cells: Cells) -> TorchDistribution:
        """The multivariate normal; batch (N,) event (K,)."""
        hidden = self.z_encoder.hidden(*self.encoder_input(cells))
        loc, scale = self.z_encoder.heads(hidden)
        factor = self.z_factor(hidden).unflatten(-1, (self.n_latent, -1))
        return LowRankMultivariateNormal(loc, scale.unsqueeze(-1) * factor, scale**2)
