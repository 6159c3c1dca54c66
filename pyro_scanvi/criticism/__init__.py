"""Is the posterior any good? Simulation-based calibration, predictive checks, ArviZ."""

from pyro_scanvi.criticism.calibration import (
    Drawn,
    FromWeights,
    from_guide,
    simulation_based_calibration,
)
from pyro_scanvi.criticism.chain import FromChain
from pyro_scanvi.criticism.datatree import leave_one_out, to_datatree
from pyro_scanvi.criticism.fitted import FitGuide, calibration_of_fits
from pyro_scanvi.criticism.held_out import HeldOut, held_out_likelihood
from pyro_scanvi.criticism.optional import arviz_plots
from pyro_scanvi.criticism.predictive import PredictiveChecks, posterior_predictive_checks
from pyro_scanvi.criticism.ranks import Calibration

__all__ = [
    "Calibration",
    "Drawn",
    "FitGuide",
    "FromChain",
    "FromWeights",
    "HeldOut",
    "PredictiveChecks",
    "arviz_plots",
    "calibration_of_fits",
    "from_guide",
    "held_out_likelihood",
    "leave_one_out",
    "posterior_predictive_checks",
    "simulation_based_calibration",
    "to_datatree",
]
