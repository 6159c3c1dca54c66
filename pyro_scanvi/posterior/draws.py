"""What is asked of a trained model: tensors in, arrays out, minibatch by minibatch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pyro_scanvi.data.minibatches import UNLABELED, CellData, Cells, ordered_loader
from pyro_scanvi.model.likelihoods import CountParameters
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.threads import as_told
from pyro_scanvi.validation import check_seed

LARGEST_PASS = 2**22  # numbers in a tensor of samples: 16 MB, large enough to keep a core busy


def label_probabilities(
    vae: SCANVAE, data: CellData, batch_size: int, use_posterior_mean: bool = True
) -> np.ndarray:
    """q(y | z) of each cell, (N, L), at the mean of q(z | x) or at a sample of it."""

    def probabilities(cells: Cells) -> Tensor:
        q_z = vae.q_z(cells)
        return vae.q_y(q_z.mean if use_posterior_mean else q_z.sample()).probs

    return over_minibatches(vae, data, batch_size, probabilities)


def with_known_labels(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The same probabilities, (N, L), but certainty of the label where it is known."""
    certain = np.eye(probabilities.shape[1], dtype=probabilities.dtype)[label]
    return np.where((label != UNLABELED)[:, None], certain, probabilities)


def latent_mean(vae: SCANVAE, data: CellData, batch_size: int, mc_samples: int) -> np.ndarray:
    """E_q(z | x) of the cell's state, (N, K).

    Where the state is a transform of z (softmax), it is the mean of `mc_samples` draws.
    """

    def mean(cells: Cells) -> Tensor:
        q_z = vae.q_z(cells)
        if isinstance(vae.state, nn.Identity):
            return q_z.mean
        return mean_over_samples(
            mc_samples, q_z.mean.numel(), lambda n: vae.state(q_z.sample((n,)))
        )

    return over_minibatches(vae, data, batch_size, mean)


def latent_sample(vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
    """The cell's state at one draw from q(z | x), (N, K)."""
    return over_minibatches(vae, data, batch_size, lambda cells: vae.state(vae.q_z(cells).sample()))


def latent_moments(vae: SCANVAE, data: CellData, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of q(z | x), (N, K) each, before any transform of z."""

    def moments(cells: Cells) -> Tensor:
        q_z = vae.q_z(cells)
        return torch.stack([q_z.mean, q_z.variance])

    return tuple(over_minibatches(vae, data, batch_size, moments, dim=1))


def library_size(vae: SCANVAE, data: CellData, batch_size: int, give_mean: bool) -> np.ndarray:
    """Mean of q(l | x), or a draw of it; the given or the total count where l is known; (N, 1)."""

    def size(cells: Cells) -> Tensor:
        known = vae.observed_library(cells)
        if known is not None:
            return known
        return vae.q_l(cells).mean if give_mean else vae.q_l(cells).sample()

    return over_minibatches(vae, data, batch_size, size)


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
    most = max(1, LARGEST_PASS // size)
    return [min(most, n_samples - start) for start in range(0, n_samples, most)]


def mean_over_samples(n_samples: int, size: int, ask: Callable[[int], Tensor]) -> Tensor:
    """Mean over the first dimension of what `ask` answers, S samples of `size` numbers each."""
    return sum(ask(n).sum(0) for n in passes(n_samples, size)) / n_samples


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
