"""Models whose posterior is known, and models that are broken on purpose."""

import torch
from pyro.distributions import Dirichlet, Normal, OneHotCategorical
from torch import Tensor, nn

from pyro_scanvi import SCANVAE
from pyro_scanvi.model.distributions import NegativeBinomial
from pyro_scanvi.model.likelihoods import GeneLikelihood
from tests.examples import small_vae

NOISE = 0.5  # standard deviation of what is seen of z


class Conjugate(SCANVAE):
    """z ~ N(0, 1), x ~ N(z, 1/4), u and y told by nothing; the guide is the exact posterior."""

    scale = 1.0  # of the guide, relative to the right one

    def p_z(self, u, y, cells):
        return Normal(torch.zeros_like(u), 1.0).to_event(1)

    def observed(self, z, library, y, cells):
        return {"x": (Normal(z, NOISE).to_event(1), cells.x)}

    def q_z(self, cells):
        gain = 1 / (1 + NOISE**2)
        return Normal(gain * cells.x, self.scale * NOISE * gain**0.5).to_event(1)

    def q_y(self, z, cells):
        return OneHotCategorical(self.y_prior.expand(*z.shape[:-1], -1))

    def q_u(self, z, y, cells):
        return Normal(torch.zeros_like(z), 1.0).to_event(1)


class Narrow(Conjugate):
    """A guide with half the scale."""

    scale = 0.5


class Prior(Conjugate):
    """A guide that has not seen the data."""

    def q_z(self, cells):
        return Normal(torch.zeros_like(cells.x), 1.0).to_event(1)


class Frequencies(Conjugate):
    """pi ~ Dirichlet(2, 2, 2); the posterior given all labels is Dirichlet(2 + their numbers)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_concentration = nn.Parameter(torch.full((self.n_labels,), 2.0).log())

    def p_shared(self):
        return {"pi": Dirichlet(torch.full((self.n_labels,), 2.0))}

    def q_shared(self):
        return {"pi": Dirichlet(self.log_concentration.exp())}

    def p_y(self, cells):
        return OneHotCategorical(cells.shared["pi"])


class WrongDensity(NegativeBinomial):
    """Draws that are right, and a log probability that knows nothing of the dispersion."""

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.mu.log() - self.mu - torch.lgamma(value + 1)


def wrong_density(p):
    return WrongDensity(p.mu, p.theta)


OFF = GeneLikelihood(wrong_density, uses_gate=False)


def conjugate(kind: type[Conjugate] = Conjugate) -> SCANVAE:
    return kind(n_input=2, n_labels=3, n_latent=2, n_hidden=4, y_prior=[0.6, 0.3, 0.1]).eval()


def counts(theta: float = 1.0, **changes) -> SCANVAE:
    """A model of six genes, whose guide proposes well enough."""
    sizes = {"n_input": 6, "n_latent": 2, "n_hidden": 4, "gene_likelihood": "nb"}
    vae = small_vae(**(sizes | changes)).eval()
    with torch.no_grad():
        vae.dispersion.log_theta.fill_(torch.tensor(theta).log())
    return vae
