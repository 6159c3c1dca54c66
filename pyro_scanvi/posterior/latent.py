"""The latent variables of cells by the guide: their state z and their library size l."""

from collections.abc import Sequence

import anndata as ad
import numpy as np
import torch
from torch import Tensor, nn

from pyro_scanvi.data.minibatches import CellData, Cells
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import (
    mean_over_samples,
    minibatch_size,
    over_minibatches,
    seeded,
)
from pyro_scanvi.posterior.trained import Trained
from pyro_scanvi.validation import InputError, check_at_least, plain_arguments


class LatentSpace(Trained):
    """Questions of the latent variables of a cell."""

    @plain_arguments
    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        mc_samples: int = 5000,
        batch_size: int | None = None,
        return_dist: bool = False,
        *,
        seed: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The batch-free state of each cell by q(z | x), (N, n_latent).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`~pyro_scanvi.SCANVI.predict`.
        give_mean
            Return the mean of the state, not a draw of it.
        mc_samples
            Draws for the mean of softmax(z) with ``latent_distribution="ln"``, which has no closed
            form; not read otherwise.
        return_dist
            Return mean and variance of q(z | x), each (N, n_latent), before any softmax.
        seed
            Of the draws; None draws on from torch's generator.

        Raises
        ------
        InputError
            For cells that do not fit the model, or whose state is not finite; for `mc_samples`
            below 1.
        """
        check_at_least(1, mc_samples=mc_samples)
        covariates = self.module.encode_covariates
        data, _ = self.encoded(adata, indices, labels=False, covariates=covariates, extra=False)
        size = minibatch_size(batch_size)
        if return_dist:
            return latent_moments(self.module, data, size)
        with seeded(seed):
            if give_mean:
                return latent_mean(self.module, data, size, mc_samples)
            return latent_sample(self.module, data, size)

    @plain_arguments
    def get_latent_library_size(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        batch_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> np.ndarray:
        r"""Library size l of each cell in counts, (N, 1).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`~pyro_scanvi.SCANVI.predict`.
        give_mean
            Return the mean :math:`\exp(m + v / 2)` of :math:`q(l \mid x)`; otherwise a draw of it,
            or what the model reads where the library is not latent: the total count or the given
            size factor.
        seed
            Of the draws; None draws on from torch's generator.

        Raises
        ------
        InputError
            If a mean is asked for and the library is not latent.
        """
        if give_mean and not self.module.latent_library:
            raise InputError(
                "the library of this model is not latent, so q(l | x) has no mean; "
                "give_mean=False returns the library that the model reads"
            )
        data, _ = self.encoded(adata, indices, labels=False, extra=False)
        with seeded(seed):
            return library_size(self.module, data, minibatch_size(batch_size), give_mean)


def latent_mean(vae: SCANVAE, data: CellData, batch_size: int, mc_samples: int) -> np.ndarray:
    """E_q(z | x) of the cell's state, (N, K).

    Where the state is a transform of z (softmax), it is the mean of `mc_samples` draws.
    """

    def mean(cells: Cells) -> Tensor:
        q_z = vae.q_z(cells)
        if isinstance(vae.state, nn.Identity):
            return vae.latent_point(q_z)
        size = len(cells) * vae.n_latent
        return mean_over_samples(mc_samples, size, lambda n: vae.state(q_z.sample((n,))))

    return over_minibatches(vae, data, batch_size, mean)


def latent_sample(vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
    """The cell's state at one draw from q(z | x), (N, K)."""
    return over_minibatches(vae, data, batch_size, lambda cells: vae.state(vae.q_z(cells).sample()))


def latent_moments(vae: SCANVAE, data: CellData, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of q(z | x), (N, K) each, before any transform of z."""

    def moments(cells: Cells) -> Tensor:
        q_z = vae.q_z(cells)
        try:
            return torch.stack([q_z.mean, q_z.variance])
        except NotImplementedError:
            raise InputError(
                f"q(z | x) is a {type(q_z).__name__}, whose mean and variance are not known; leave "
                "return_dist out, or draw from it with give_mean=False"
            ) from None

    mean, variance = over_minibatches(vae, data, batch_size, moments, dim=1)
    return mean, variance


def library_size(vae: SCANVAE, data: CellData, batch_size: int, give_mean: bool) -> np.ndarray:
    """Mean of q(l | x), or a draw of it; the given or the total count where l is known; (N, 1)."""

    def size(cells: Cells) -> Tensor:
        known = vae.observed_library(cells)
        if known is not None:
            return known
        return vae.q_l(cells).mean if give_mean else vae.q_l(cells).sample()

    return over_minibatches(vae, data, batch_size, size)
