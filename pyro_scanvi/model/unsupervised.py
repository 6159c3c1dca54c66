r"""Unsupervised warm start: the networks of a SCANVAE under the generative story of scVI.

.. math:: z \sim \mathcal N(0, I), \quad l \mid s \sim \mathrm{LogNormal}(m_s, v_s), \quad
    x \mid z, l, s, c \sim p(x \mid z, l, s, c)

with the guide q(z | x, s, c) q(l | x, s, c): M1 of Kingma et al. (2014); Lopez et al. (2018). It
trains the encoder and the decoder of the counts, and leaves the classifier and the networks of u
as they are.
"""

import pyro
from pyro.distributions import Normal, TorchDistribution

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.objective import SemiSupervisedELBO
from pyro_scanvi.model.scanvae import SCANVAE, sample_shared

SITES = ("z", "l")


class Unsupervised:
    """Model and guide over the factors of a SCANVAE, without types."""

    def __init__(self, vae: SCANVAE):
        self.vae = vae

    def model(self, cells: Cells) -> None:
        """Counts from a cell state that has a standard Normal prior."""
        vae = self.vae
        cells = sample_shared(vae.p_shared(), cells)
        with vae.plate(cells):
            z = pyro.sample("z", self.p_z())  # N | K
            library = vae.observed_library(cells)
            if library is None:
                library = pyro.sample("l", vae.p_l(cells))  # N | 1
            # A dispersion that belongs to a type is averaged over the types.
            y = vae.p_y(cells).mean.expand(len(cells), -1)
            for name, (p, value) in vae.observed(z, library, y, cells).items():
                pyro.sample(name, p, obs=value)  # N | G

    def p_z(self) -> TorchDistribution:
        """p(z) = N(0, I), whatever the prior of u is; batch () event (K,)."""
        zero = self.vae.y_prior.new_zeros(self.vae.n_latent)
        return Normal(zero, zero + 1).to_event(1)

    def guide(self, cells: Cells) -> None:
        """Cell state and library of each cell."""
        vae = self.vae
        cells = sample_shared(vae.q_shared(), cells)
        with vae.plate(cells):
            pyro.sample("z", vae.q_z(cells))  # N | K
            if vae.latent_library:
                pyro.sample("l", vae.q_l(cells))  # N | 1

    def objective(self) -> SemiSupervisedELBO:
        """The ELBO, without a classification term: the batch norms of the classifier stay."""
        elbo = SemiSupervisedELBO(None, closed_form=SITES, weighted=SITES)
        elbo.strict_enumeration_warning = False  # there are no types to enumerate
        return elbo
