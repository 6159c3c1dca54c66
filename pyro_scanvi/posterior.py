"""What is asked of a trained model: tensors in, arrays out, minibatch by minibatch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pyro_scanvi.data import CellData, Cells, ordered_loader
from pyro_scanvi.scanvae import SCANVAE


def label_probabilities(
    vae: SCANVAE, data: CellData, batch_size: int, use_posterior_mean: bool = True
) -> np.ndarray:
    """q(y | z) of each cell, (N, L), at the mean of q(z | x) or at a sample of it."""

    def probabilities(cells: Cells) -> Tensor:
        q_z = vae.q_z(cells)
        return vae.q_y(q_z.mean if use_posterior_mean else q_z.sample()).probs

    return _by_minibatch(vae, data, batch_size, probabilities)


def latent_mean(vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
    """Cell state at the mean of q(z | x), (N, K)."""
    return _by_minibatch(vae, data, batch_size, lambda cells: vae.state(vae.q_z(cells).mean))


def _by_minibatch(
    vae: SCANVAE, data: CellData, batch_size: int, ask: Callable[[Cells], Tensor]
) -> np.ndarray:
    device = vae.y_prior.device
    with evaluating(vae):
        answers = [ask(cells.to(device)).cpu() for cells in ordered_loader(data, batch_size)]
    return torch.cat(answers).numpy()


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
