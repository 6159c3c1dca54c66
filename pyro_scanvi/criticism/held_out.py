r"""Held-out likelihood of each cell, by importance sampling, with what it may be trusted for.

With S draws h of the guide, y summed out,

.. math:: \log \hat p(x) = \log \frac1S \sum_s w_s, \qquad w_s = p(x, h_s) / q(h_s \mid x).

The mean of weights is unbiased for p(x), its logarithm lies below :math:`\log p(x)` on average.
Where few weights carry the sum, it lies far below: `effective` and the Pareto shape `khat` of the
largest weights say so (Vehtari et al. 2024, JMLR 25(72)). What all cells share is drawn from its
posterior: the density is :math:`p(x \mid \text{training data})`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from pyro_scanvi.criticism.optional import arviz_stats
from pyro_scanvi.data.minibatches import Cells, ordered_loader
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.posterior.draws import at_once, evaluating, minibatch_size, parts, seeded
from pyro_scanvi.posterior.importance import PASS_ELEMENTS
from pyro_scanvi.posterior.traces import TraceWeights
from pyro_scanvi.validation import InputError, check_at_least, plain_arguments

FEWEST_DRAWS = 25  # a shape needs five of the largest weights, which are a fifth


@dataclass(frozen=True)
class HeldOut:
    """Log likelihood of cells.

    Attributes
    ----------
    cells
        One row for each cell: log_likelihood, in nats; standard_error, of its Monte Carlo noise;
        effective, the effective number of draws; khat; reliable, whether khat is below
        ``min(1 - 1 / log10(S), 0.7)``.
    mean, standard_error
        Of log_likelihood over cells; the error is that of cells drawn at random.
    """

    cells: pd.DataFrame

    @property
    def mean(self) -> float:
        """Nats per cell."""
        return float(self.cells["log_likelihood"].mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over cells."""
        return float(self.cells["log_likelihood"].std() / math.sqrt(len(self.cells)))

    @property
    def reliable(self) -> float:
        """Share of cells whose estimate is reliable."""
        return float(self.cells["reliable"].mean())

    def __repr__(self) -> str:
        return (
            f"HeldOut: {self.mean:.2f} +- {self.standard_error:.2f} nats per cell, "
            f"{len(self.cells)} cells, {self.reliable:.0%} of them reliable"
        )


@plain_arguments
def held_out_likelihood(
    model: SCANVI,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    n_draws: int = 1000,
    batch_size: int | None = None,
    seed: int | None = None,
    progress_bar: bool = True,
) -> HeldOut:
    r"""Log likelihood :math:`\log p(x)` of cells that the model was not trained on.

    Parameters
    ----------
    model
        Trained.
    adata
        Cells with the genes and columns that the model was set up with; None is its own data.
    indices
        Positions of the cells; None is all of `adata`, or the validation cells of the training.
        Cells that were trained on are answered too: theirs is no held-out likelihood; nor is that
        of validation cells quite, where they chose the epoch to stop at.
    n_draws
        Draws S of the guide for each cell, at least 25.
    batch_size
        Cells in a minibatch at most.
    seed
        Of the draws; None draws on from torch's generator.
    progress_bar
        Whether to show one.

    Returns
    -------
    HeldOut

    Raises
    ------
    InputError
        If the training held no cell out and none is named; for cells that do not fit the model, or
        a site that cannot be weighed.
    ImportError
        Without ArviZ.
    """
    check_at_least(FEWEST_DRAWS, n_draws=n_draws)
    psislw = arviz_stats().base.array_stats.psislw
    chosen = _held_out(model) if adata is None and indices is None else indices
    data, names = model.encoded(adata, chosen, labels=False)
    weights = TraceWeights(model.module, by_label=False)
    tables = []
    with seeded(seed), evaluating(model.module, data):
        numbers = weights.numbers_per_draw(data[np.arange(1)].to(model.device))
        size = min(minibatch_size(batch_size), at_once(numbers, PASS_ELEMENTS))
        for cells in track(ordered_loader(data, size), "weighing", disable=not progress_bar):
            drawn = drawn_weights(weights, cells.to(model.device), n_draws, numbers).cpu().numpy()
            tables.append(_table(drawn, psislw(-drawn, axis=0)[1]))
    return HeldOut(pd.concat(tables).set_index(names))


def _held_out(model: SCANVI) -> Any:
    """Positions of the cells that the training held out."""
    found = model.validation_indices
    if not len(found):
        raise InputError(
            "the training held no cell out; give adata= or indices=, or train with train_size="
        )
    return found


def drawn_weights(weights: TraceWeights, cells: Cells, n_draws: int, numbers: int) -> Tensor:
    """Log weights (S, N), a few draws at a time; `numbers` is those of one draw of one cell."""
    sizes = parts(n_draws, at_once(numbers * len(cells), PASS_ELEMENTS))
    return torch.cat([weights.of_draws(cells, n) for n in sizes])


def _table(log_weight: np.ndarray, khat: np.ndarray) -> pd.DataFrame:
    n = len(log_weight)
    largest = log_weight.max(0)
    weight = np.exp(log_weight - largest)
    mean = weight.mean(0)
    same = weight.min(0) == 1  # of all draws, as of the exact posterior: their tail has no shape
    khat = np.where(same, -np.inf, khat)
    columns = {
        "log_likelihood": np.log(mean) + largest,
        "standard_error": weight.std(0, ddof=1) / mean / math.sqrt(n),
        "effective": weight.sum(0) ** 2 / (weight**2).sum(0),
        "khat": khat,
        "reliable": khat < min(1 - 1 / math.log10(n), 0.7),
    }
    return pd.DataFrame(columns)
