"""The evidence lower bound and its parts for each cell of a trained model."""

import numpy as np

from pyro_scanvi.data.minibatches import CellData
from pyro_scanvi.model.objective import SemiSupervisedELBO
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import over_minibatches


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
