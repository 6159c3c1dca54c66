"""Models that change a factor or two of SCANVAE: priors, guides, likelihoods, modalities.

Two of them are one by multiple inheritance: ``class Mine(MixturePrior, LowRankPosterior): pass``.
Those of flows, which need zuko, are in :mod:`pyro_scanvi.extensions.flows`.
"""

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
from pyro_scanvi.extensions.label_priors import (
    DirichletFrequencies,
    FrequenciesOfBatch,
    LearnedFrequencies,
)
from pyro_scanvi.extensions.markers import marker_labels
from pyro_scanvi.extensions.modalities import Proteins
from pyro_scanvi.extensions.posteriors import FullCovariancePosterior, LowRankPosterior
from pyro_scanvi.extensions.priors import MixturePrior, VampPrior
from pyro_scanvi.extensions.without_u import WithoutU

__all__ = [
    "BatchEffect",
    "CovariateGate",
    "DirichletFrequencies",
    "FrequenciesOfBatch",
    "FullCovariancePosterior",
    "GeneralisedPoisson",
    "GlobalTheta",
    "HorseshoeWeights",
    "LearnedFrequencies",
    "LowRankPosterior",
    "MixturePrior",
    "NormalWeights",
    "PoissonLogNormal",
    "Proteins",
    "VampPrior",
    "WithoutU",
    "generalised_poisson",
    "marker_labels",
    "poisson_lognormal",
]
