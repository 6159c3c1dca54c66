"""scANVI as an open Pyro program: every cell labelled, every factor of the model exchangeable."""

from pyro_scanvi.checks import InputError
from pyro_scanvi.counts import drop_empty_cells
from pyro_scanvi.data import Cells
from pyro_scanvi.objective import SemiSupervisedELBO
from pyro_scanvi.scanvae import SCANVAE
from pyro_scanvi.scanvi import SCANVI

__all__ = ["SCANVAE", "SCANVI", "Cells", "InputError", "SemiSupervisedELBO", "drop_empty_cells"]
