r"""The model without a state within the type: a type is one Gaussian of states."""

from typing import Any

from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.networks import HiddenLayers, NormalNetwork
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError


class WithoutU(SCANVAE):
    r"""p(z | y) = N(mu_y, sigma_y^2): the model without u.

    .. math:: z \mid y \sim \mathcal N(\mu_y, \mathrm{diag}(\sigma_y^2))

    The prior of z is then a mixture of Gaussians with a component for each type, of which p(z | y)
    is known exactly, in Bayes' rule too; the default's is an integral over u. The story stays as it
    is: u has no dimension. So u has neither networks nor a KL; ``kl_u`` is 0.

    The means and log variances of the types are a linear layer of the label. Kingma et al. (2014),
    arXiv 1406.5298 have u; Jiang et al. (2017), IJCAI, arXiv 1611.05148 (VaDE) have not.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.u_encoder = nn.Identity()  # type: ignore[assignment]  # nothing asks it
        self.z_decoder = NormalNetwork(HiddenLayers(0, 0, 0, self.n_labels), self.n_latent)

    def p_u(self, cells: Cells) -> TorchDistribution:
        """No state within the type; batch () event (0,)."""
        nothing = self.y_prior.new_zeros(0)
        return Normal(nothing, nothing + 1).to_event(1)

    def q_u(self, z: Tensor, y: Tensor, cells: Cells) -> TorchDistribution:
        """The same; batch () event (0,)."""
        return self.p_u(cells)

    def to_scvi_tools(self) -> dict[str, Tensor]:
        """Refused by InputError: the SCANVAE of scvi-tools has a u."""
        raise InputError("SCANVAE of scvi-tools has networks of u, which a model without u has not")
