"""scANVI as an open Pyro program: every cell labelled, every factor of the model exchangeable."""

from pyro_scanvi.data.counts import drop_empty_cells
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.model.objective import ObjectiveParts, SemiSupervisedELBO
from pyro_scanvi.model.objectives import ELBO, IWAE, Layered, PyroLoss, Renyi
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError

__all__ = [
    "ELBO",
    "IWAE",
    "SCANVAE",
    "SCANVI",
    "Cells",
    "InputError",
    "Layered",
    "ObjectiveParts",
    "PyroLoss",
    "Renyi",
    "SemiSupervisedELBO",
    "drop_empty_cells",
]
