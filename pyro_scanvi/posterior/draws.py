"""What all questions share: draws from the guide, decoding, minibatches, seeds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pyro_scanvi.data.minibatches import CellData, Cells, ordered_loader
from pyro_scanvi.model.likelihoods import CountParameters
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.threads import as_told
from pyro_scanvi.validation import InputError, check_at_least, check_seed, positions_of

EVALUATION_BATCH_SIZE = 512
LARGEST_PASS = 2**22  # numbers in a tensor of samples: 16 MB, large enough to keep a core busy


@dataclass(frozen=True)
class Latents:
    """Draws from the guide: z (S, N, K), y as one-hot (S, N, L), library (S, N, 1) or (N, 1)."""

    z: Tensor
    y: Tensor
    library: Tensor


def draw(vae: SCANVAE, cells: Cells, n_samples: int) -> Latents:
    """S samples of q(z | x) q(y | z) q(l | x) for each cell; known labels stay as they are."""
    z = vae.q_z(cells).sample((n_samples,))
    known = cells.labelled.unsqueeze(-1)
    y = torch.where(known, vae.one_hot_labels(cells), vae.q_y(z).sample())
    library = vae.observed_library(cells)
    if library is None:
        library = vae.q_l(cells).sample((n_samples,))
    return Latents(z, y, library)


def batch_codes(names: str | Sequence[str] | None, batches: Iterable) -> list[int | None]:
    """Codes of the batches to decode cells as, a name or several; None is the cell's own."""
    return [None] if names is None else [*positions_of(names, batches, "transform_batch")]


def as_of_batch(cells: Cells, batch: int | None) -> Cells:
    """The same cells, all of them of one batch; None leaves each its own."""
    return cells if batch is None else replace(cells, batch=torch.full_like(cells.batch, batch))


def decode(
    vae: SCANVAE, cells: Cells, latents: Latents, batch: int | None = None
) -> CountParameters:
    """rho, mu, theta and gate logits at given draws, (S, N, G); `batch` as in `as_of_batch`."""
    cells = as_of_batch(cells, batch)
    return vae.count_parameters(latents.z, latents.library, latents.y, cells)


def count_parameters(
    vae: SCANVAE, cells: Cells, n_samples: int, batch: int | None = None
) -> CountParameters:
    """rho, mu, theta and gate logits at S draws for each cell, (S, N, G).

    With a `batch`, every cell is decoded as if it were of that batch.
    """
    return decode(vae, cells, draw(vae, cells, n_samples), batch)


def over_minibatches(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    ask: Callable[[Cells], Tensor],
    dim: int = 0,
) -> np.ndarray:
    """What `ask` answers for each minibatch, joined along the cells' dimension `dim`.

    The answers are written into their place: at no time is there a second copy of the result.
    """
    device = vae.y_prior.device
    result, start = np.empty(0), 0
    with evaluating(vae):
        for cells in ordered_loader(data, batch_size):
            answer = np.moveaxis(ask(cells.to(device)).cpu().numpy(), dim, 0)
            if start == 0:
                result = np.empty((len(data), *answer.shape[1:]), dtype=answer.dtype)
            result[start : start + len(answer)] = answer
            start += len(answer)
    return np.moveaxis(result, 0, dim)


def passes(n_samples: int, size: int) -> list[int]:
    """Numbers of samples that sum to `n_samples`, of `size` numbers each, for bounded memory."""
    return parts(n_samples, at_once(size, LARGEST_PASS))


def at_once(size: int, budget: int) -> int:
    """How many things of `size` numbers each stay within a budget of numbers; one at least."""
    return max(1, budget // size)


def parts(n: int, most: int) -> list[int]:
    """Numbers that sum to `n`, all of them `most` but the last."""
    return [min(most, n - start) for start in range(0, n, most)]


def mean_over_samples(n_samples: int, size: int, ask: Callable[[int], Tensor]) -> Tensor:
    """Mean over the first dimension of what `ask` answers, S samples of `size` numbers each."""
    return total(ask(n).sum(0) for n in passes(n_samples, size)) / n_samples


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum; of none it is 0."""
    return sum(tensors, torch.zeros(()))


def minibatch_size(batch_size: int | None) -> int:
    """The size that was asked for, or the default."""
    if batch_size is None:
        return EVALUATION_BATCH_SIZE
    check_at_least(1, batch_size=batch_size)
    return batch_size


def check_weights(weights: str | None) -> None:
    """Refuse weights of draws that are not uniform."""
    if weights not in ("uniform", None):
        raise InputError(
            f"weights={weights!r} is not supported, only 'uniform': the importance weights of "
            "scvi-tools take N(0, I) for the prior of z, which is not that of scANVI"
        )


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws of their own, the same for each seed; None draws on from torch's generator."""
    if seed is None:
        yield
        return
    check_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(vae: SCANVAE) -> Iterator[None]:
    """Without gradients, in eval mode and on the threads that torch was told; all is restored."""
    training = vae.training
    vae.eval()
    try:
        with torch.no_grad(), as_told():
            yield
    finally:
        vae.train(training)
