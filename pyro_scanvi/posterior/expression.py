"""What a trained model says about the counts: expression, parameters of the likelihood, draws.

Everything here is decoded at draws from the guide; tensors in, arrays out, minibatch by minibatch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_scanvi.data.minibatches import CellData, Cells
from pyro_scanvi.model.likelihoods import CountParameters
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import (
    as_of_batch,
    count_parameters,
    decode,
    draw,
    mean_over_samples,
    over_minibatches,
    passes,
)

SCALES: dict[str, Callable[[CountParameters], Tensor]] = {"latent": lambda p: p.mu}


def normalized_expression(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    scale: Callable[[CountParameters], Tensor],
    batches: Sequence[int | None],
    genes: slice | Sequence[int],
    n_samples: int,
    mean: bool,
) -> np.ndarray:
    """Expression at draws for each cell, averaged over batches, (N, G) or (S, N, G).

    Parameters
    ----------
    scale
        From the count parameters to expression, (S, N, G).
    batches
        Codes of the batches to decode each draw as; None is the cell's own.
    genes
        Positions.
    n_samples, mean
        Number S of draws, and whether to return their mean.
    """

    def expression(cells: Cells, n: int) -> Tensor:
        latents = draw(vae, cells, n)
        return sum(scale(decode(vae, cells, latents, b))[..., genes] for b in batches) / len(
            batches
        )

    return _at_samples(vae, data, batch_size, expression, n_samples, mean)


def expression_draws(
    vae: SCANVAE,
    data: CellData,
    cells: np.ndarray,
    batches: Sequence[int | None],
    n_draws: int,
    batch_size: int,
) -> np.ndarray:
    """Expression rho of a group of cells at draws of q(z | x), (n_draws, G).

    The cells come in random order, each as often as any other, or once more. An equal share of the
    draws, one after the other, is decoded as if of each of `batches`; None is a cell's own batch.
    """
    rounds = torch.randperm(len(cells)).repeat(-(-n_draws // len(cells)))[:n_draws]
    shares = np.array_split(cells[rounds[torch.randperm(n_draws)].numpy()], len(batches))

    def decoded(share: np.ndarray, batch: int | None) -> np.ndarray:
        def rho(minibatch: Cells) -> Tensor:
            return count_parameters(vae, minibatch, 1, batch).rho[0]

        return over_minibatches(vae, data.subset(share), batch_size, rho)

    return np.concatenate([decoded(*pair) for pair in zip(shares, batches, strict=True)])


def likelihood_parameters(
    vae: SCANVAE, data: CellData, batch_size: int, n_samples: int, mean: bool
) -> dict[str, np.ndarray]:
    """mu, and theta and gate probability where the likelihood reads them, (N, G) or (S, N, G)."""
    read: dict[str, Callable[[CountParameters], Tensor]] = {"mean": lambda p: p.mu}
    if vae.likelihood.uses_theta:
        read["dispersions"] = lambda p: p.theta.expand_as(p.mu)
    if vae.likelihood.uses_gate:
        read["dropout"] = lambda p: p.gate_logits.sigmoid()

    def parameters(cells: Cells, n: int) -> Tensor:
        p = decode(vae, cells, draw(vae, cells, n))
        return torch.stack([one(p) for one in read.values()], dim=1)  # S, P, N, G

    found = _at_samples(vae, data, batch_size, parameters, n_samples, mean)
    return dict(zip(read, np.moveaxis(found, -3, 0), strict=True))


def predictive_sample(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    batch: int | None,
    genes: slice | Sequence[int],
    n_samples: int,
) -> np.ndarray:
    """Counts from p(x' | x): one draw of the likelihood at each draw of the guide, (N, G, S)."""

    def counts(cells: Cells) -> Tensor:
        drawn = [_draw_counts(vae, cells, batch, n) for n in passes(n_samples, cells.x.numel())]
        return torch.cat([x[..., genes] for x in drawn]).permute(1, 2, 0)

    return over_minibatches(vae, data, batch_size, counts)


def _draw_counts(vae: SCANVAE, cells: Cells, batch: int | None, n_samples: int) -> Tensor:
    latents = draw(vae, cells, n_samples)
    cells = as_of_batch(cells, batch)
    return vae.p_x(latents.z, latents.library, latents.y, cells).sample()


def _at_samples(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    ask: Callable[[Cells, int], Tensor],
    n_samples: int,
    mean: bool,
) -> np.ndarray:
    """What `ask` answers at S draws, (S, ..., N, G); without S for a mean or a single draw."""

    def answer(cells: Cells) -> Tensor:
        size = cells.x.numel()
        if mean or n_samples == 1:
            return mean_over_samples(n_samples, size, lambda n: ask(cells, n))
        return torch.cat([ask(cells, n) for n in passes(n_samples, size)])

    return over_minibatches(vae, data, batch_size, answer, dim=-2)
