"""A consensus as arrays by name, as a file holds it, and back."""

from collections.abc import Mapping

import numpy as np

from pyro_scanvi.annotation.consensus import Consensus
from pyro_scanvi.annotation.novelty import Novelty
from pyro_scanvi.annotation.readers import Reader


def to_arrays(consensus: Consensus) -> dict[str, np.ndarray]:
    """Its numbers by name."""
    counts, latent, novelty = consensus.of_counts, consensus.of_latent, consensus.novelty
    return {
        "of_counts.weight": counts.weight,
        "of_counts.bias": counts.bias,
        "of_latent.weight": latent.weight,
        "of_latent.bias": latent.bias,
        "inverse_temperature": np.array([consensus.inverse_temperature]),
        "label": consensus.label,
        "held_out": consensus.held_out,
        "novelty.mean": novelty.mean,
        "novelty.precision": novelty.precision,
        "novelty.held_out": novelty.held_out,
        "profiles": consensus.profiles,
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Consensus:
    """What :func:`to_arrays` told of."""
    of = arrays.__getitem__
    return Consensus(
        Reader(of("of_counts.weight"), of("of_counts.bias")),
        Reader(of("of_latent.weight"), of("of_latent.bias")),
        float(of("inverse_temperature")[0]),
        of("label"),
        _held_out(arrays),
        Novelty(of("novelty.mean"), of("novelty.precision"), of("novelty.held_out")),
        of("profiles"),
    )


def _held_out(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Probabilities of held-out cells; in files of before, of their own label alone, others NaN."""
    if "held_out" in arrays:
        return arrays["held_out"]
    label = arrays["label"]
    found = np.full((len(label), len(arrays["of_counts.bias"])), np.nan)
    found[np.arange(len(label)), label] = 1 - arrays["score"]
    return found
