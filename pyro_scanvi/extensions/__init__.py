"""Models that change a factor or two of SCANVAE: priors, guides, likelihoods, modalities.

Two of them are one by multiple inheritance: ``class Mine(MixturePrior, LowRankPosterior): pass``.
Those of flows, which need zuko, are in :mod:`pyro_scanvi.extensions.flows`.
"""

from pyro_scanvi.extensions.label_priors import (
    DirichletFrequencies,
    FrequenciesOfBatch,
    LearnedFrequencies,
)
from pyro_scanvi.extensions.posteriors import FullCovariancePosterior, LowRankPosterior
from pyro_scanvi.extensions.priors import MixturePrior, VampPrior
from pyro_scanvi.extensions.without_u import WithoutU

__all__ = [
    "DirichletFrequencies",
    "FrequenciesOfBatch",
    "FullCovariancePosterior",
    "LearnedFrequencies",
    "LowRankPosterior",
    "MixturePrior",
    "VampPrior",
    "WithoutU",
]
