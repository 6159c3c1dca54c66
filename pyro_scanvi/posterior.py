"""What is asked of a trained model: tensors in, arrays out, minibatch by minibatch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pyro_scanvi.data import UNLABELED, CellData, Cells, ordered_loader
from pyro_scanvi.likelihoods import CountParameters
from pyro_scanvi.scanvae import SCANVAE


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


def latent_mean(vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
    """Cell state at the mean of q(z | x), (N, K)."""
    return over_minibatches(vae, data, batch_size, lambda cells: vae.state(vae.q_z(cells).mean))


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


def count_parameters(
    vae: SCANVAE, cells: Cells, n_samples: int, batch: int | None = None
) -> CountParameters:
    """rho, mu, theta and gate logits at S draws for each cell, (S, N, G).

    With a `batch`, every cell is decoded as if it were of that batch.
    """
    latents = draw(vae, cells, n_samples)
    if batch is not None:
        cells = replace(cells, batch=torch.full_like(cells.batch, batch))
    return vae.count_parameters(latents.z, latents.library, latents.y, cells)


def over_minibatches(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    ask: Callable[[Cells], Tensor],
    dim: int = 0,
) -> np.ndarray:
    """What `ask` answers for each minibatch, joined along the cells' dimension `dim`."""
    device = vae.y_prior.device
    with evaluating(vae):
        answers = [ask(cells.to(device)).cpu() for cells in ordered_loader(data, batch_size)]
    return torch.cat(answers, dim).numpy()


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws of their own, the same for each seed; None draws on from torch's generator."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(vae: SCANVAE) -> Iterator[None]:
    """Without gradients and in eval mode, so that no batch norm moves; the mode is restored."""
    training = vae.training
    vae.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        vae.train(training)
