"""Models that change a factor or two of SCANVAE: priors, guides, likelihoods, modalities."""

from pyro_scanvi.extensions.counts import (
    CovariateGate,
    GeneralisedPoisson,
    PoissonLogNormal,
    generalised_poisson,
    poisson_lognormal,
)
from pyro_scanvi.extensions.global_sites import (
    BatchEffect,
    GlobalTheta,
    HorseshoeWeights,
    NormalWeights,
)
from pyro_scanvi.extensions.modalities import Proteins

__all__ = [
    "BatchEffect",
    "CovariateGate",
    "GeneralisedPoisson",
    "GlobalTheta",
    "HorseshoeWeights",
    "NormalWeights",
    "PoissonLogNormal",
    "Proteins",
    "generalised_poisson",
    "poisson_lognormal",
]
