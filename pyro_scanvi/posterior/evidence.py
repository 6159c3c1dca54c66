"""Lower bounds and estimates of the likelihood of cells, log p(x) or log p(x, y)."""

from collections.abc import Callable, Sequence
from functools import partial

import anndata as ad
import numpy as np

from pyro_scanvi.data.minibatches import CellData
from pyro_scanvi.model.objective import SemiSupervisedELBO
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import minibatch_size, over_minibatches, seeded
from pyro_scanvi.posterior.importance import N_INNER_SAMPLES, marginal_log_likelihood
from pyro_scanvi.posterior.trained import Trained
from pyro_scanvi.validation import check_at_least, plain_arguments


class Evidence(Trained):
    """Questions of how well the model explains a cell, in nats."""

    @plain_arguments
    def get_elbo(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        feed_labels: bool = False,
        *,
        seed: int | None = None,
    ) -> float | np.ndarray:
        r"""Evidence lower bound in nats per cell; higher is better.

        .. math:: \mathbb E_q[\log p(x \mid z, l) + \log p(z \mid u, y) - \log q(z \mid x)]
            - \mathrm{KL}_u - \mathrm{KL}_y - \mathrm{KL}_l \le \log p(x)

        at KL weight 1, without the classification term, each further observed site and each further
        KL as well; that of a site which N cells share counts 1 / N for each of them. Exact over y,
        and at one draw of z (Xu et al. 2021, eq. 5; Kingma et al. 2014, eqs. 6 and 7).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`~pyro_scanvi.SCANVI.predict`.
        return_mean
            Return the mean over cells, a number; otherwise one number for each cell, (N,).
        feed_labels
            True: bound :math:`\log p(x, e)` with what is known of the label, e:
            :math:`\log p(x, y)` at an exact label, :math:`\log p(x)` where nothing is known.
            False: bound :math:`\log p(x)` of every cell, as scvi-tools does.
        seed
            Of the draws; None draws on from torch's generator.

        Raises
        ------
        InputError
            For cells that do not fit the model.
        """
        ask = partial(cell_elbo, feed_labels=feed_labels)
        data, _ = self.encoded(adata, indices, labels=feed_labels)
        return _of_each_cell(self.module, data, batch_size, ask, return_mean, seed)

    @plain_arguments
    def get_reconstruction_error(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        *,
        seed: int | None = None,
    ) -> float | np.ndarray:
        r""":math:`-\mathbb E_q \log p(x \mid z, l, y)` in nats per cell; lower is better.

        It is exact over y and at one draw of z. scvi-tools returns a dict whose
        "reconstruction_loss" also holds :math:`\log q(z \mid x) - \log p(z \mid u, y)`; this is
        another quantity, and a number.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`~pyro_scanvi.SCANVI.predict`.
        return_mean
            Return the mean over cells, a number; otherwise one number for each cell, (N,).
        seed
            Of the draws; None draws on from torch's generator.

        Raises
        ------
        InputError
            For cells that do not fit the model.
        """
        data, _ = self.encoded(adata, indices, labels=False)
        ask = cell_reconstruction
        return _of_each_cell(self.module, data, batch_size, ask, return_mean, seed)

    @plain_arguments
    def get_marginal_ll(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1000,
        batch_size: int | None = None,
        return_mean: bool = True,
        n_inner_samples: int = N_INNER_SAMPLES,
        feed_labels: bool = False,
        seed: int | None = None,
    ) -> float | np.ndarray:
        r"""Marginal log likelihood :math:`\log p(x)`, estimated by importance sampling.

        The estimate lies between the ELBO and :math:`\log p(x)` in expectation, and rises with
        the draws; see :mod:`pyro_scanvi.posterior.importance`.

        Parameters
        ----------
        adata
            Cells with the genes of the training data; None is the training data.
        indices
            Positions of the cells; None is all.
        n_mc_samples
            Draws of z, and of a latent library, for each cell.
        batch_size
            Cells in a minibatch at most; changes speed and memory, and which numbers are drawn.
        return_mean
            Return the mean over cells, not the value of each.
        n_inner_samples
            Draws of u for each of them and each label.
        feed_labels
            Estimate :math:`\log p(x, e)` with what is known of the label, e:
            :math:`\log p(x, y)` at an exact label, as in the ELBO that ``feed_labels`` of the
            training plan chooses.
        seed
            Of what is drawn; None draws on from torch's generator.

        Returns
        -------
        float or ndarray
            Nats per cell; without `return_mean` (N,).

        Raises
        ------
        InputError
            If the AnnData is not what the model was set up with; for a number of draws below 1, a
            negative seed, or a ``model`` or ``guide`` of one's own with a site that cannot be
            weighed (:mod:`pyro_scanvi.posterior.traces`).
        """
        check_at_least(1, n_mc_samples=n_mc_samples, n_inner_samples=n_inner_samples)
        ask = partial(
            marginal_log_likelihood,
            n_samples=n_mc_samples,
            n_inner_samples=n_inner_samples,
            feed_labels=feed_labels,
        )
        data, _ = self.encoded(adata, indices, labels=feed_labels)
        return _of_each_cell(self.module, data, batch_size, ask, return_mean, seed)


def cell_elbo(
    vae: SCANVAE, data: CellData, batch_size: int, feed_labels: bool = False
) -> np.ndarray:
    """A bound of log p(x), or with labels fed of log p(x, y), at one draw of z; nats, (N,)."""
    elbo = SemiSupervisedELBO(None, feed_labels=feed_labels)(vae.model, vae.guide)
    return over_minibatches(vae, data, batch_size, lambda cells: elbo.parts(cells).elbo())


def cell_reconstruction(vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
    """-log p(x | z, l, y, s) at one draw of z, expected over q(y | z); nats, (N,)."""
    elbo = SemiSupervisedELBO(None, feed_labels=False)(vae.model, vae.guide)
    return over_minibatches(vae, data, batch_size, lambda cells: elbo.parts(cells).reconstruction)


def _of_each_cell(
    vae: SCANVAE,
    data: CellData,
    batch_size: int | None,
    ask: Callable[[SCANVAE, CellData, int], np.ndarray],
    mean: bool,
    seed: int | None,
) -> float | np.ndarray:
    """A number for each cell, (N,), or their mean."""
    with seeded(seed):
        values = ask(vae, data, minibatch_size(batch_size))
    return float(values.mean(dtype=np.float64)) if mean else values
