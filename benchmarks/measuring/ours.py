"""A timed run of this package. TASK CELLS.h5ad SETTINGS; prints JSON. WAYS says what it can run."""

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import anndata as ad
import clock
import pyro
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import pyro_scanvi
from pyro_scanvi import ELBO, SCANVI, Cells
from pyro_scanvi.data.minibatches import training_loader
from pyro_scanvi.model.distributions import ZeroInflatedNegativeBinomial
from pyro_scanvi.training.settings import Plan

R = Plan().classification_ratio


def main(task: str, path: str, given: str) -> None:
    """Time a task, once warm."""
    settings = json.loads(given)
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings["threads"])
    adata = ad.read_h5ad(path)
    SCANVI.setup_anndata(adata, "given", "Unknown")
    model = SCANVI(adata, n_layers=settings["layers"])
    taken = {"train": train, "predict": predict}[task](model, settings)
    clock.tell(taken, ("pyro-scanvi", "pyro-ppl", "torch", "numpy", "numba"))


def train(model: SCANVI, settings: dict[str, Any]) -> float:
    """Seconds an epoch."""
    run = WAYS[settings["way"]](model, settings["minibatch"])
    return clock.epoch_seconds(run, settings["epochs"])


def by_train(model: SCANVI, minibatch: int, **how: Any) -> Callable[[int], None]:
    """As users train."""
    fixed = {"train_size": 1.0, "batch_size": minibatch, "progress_bar": False}
    return lambda n_epochs: model.train(n_epochs, **fixed, **how)


def by_hand(model: SCANVI, minibatch: int) -> Callable[[int], None]:
    """The loss of ELBO() written out in torch, and a bare loop: without Pyro and Lightning.

    Networks, likelihood, minibatches and optimiser are those of the package.
    """
    return in_a_bare_loop(model, minibatch, partial(loss_by_hand, model.module))


def without_lightning(model: SCANVI, minibatch: int) -> Callable[[int], None]:
    """ELBO() by Pyro in that bare loop; without its checks, as later epochs of training are."""
    bound = ELBO()(model.module, Plan())

    def loss(cells: Cells) -> Tensor:
        with pyro.validation_enabled(False):
            return bound.parts(cells).loss

    return in_a_bare_loop(model, minibatch, loss)


def in_a_bare_loop(
    model: SCANVI, minibatch: int, loss_of: Callable[[Cells], Tensor]
) -> Callable[[int], None]:
    """Minibatches, a loss of each, and steps."""
    vae, data = model.module, model.fields.encode(model.adata)
    optimizer = Plan().make_optimizer(vae.parameters())

    def run(n_epochs: int) -> None:
        vae.train()
        loader = training_loader(data, minibatch, seed=0)
        for epoch in range(n_epochs):
            loader.sampler.set_epoch(epoch)
            for cells in loader:
                loss = loss_of(cells)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return run


def loss_by_hand(vae: pyro_scanvi.SCANVAE, cells: Cells) -> Tensor:
    """-log p(x|z) + log q(z|x) - E log p(z|u,y) + KL_u + KL_y, and classification; per cell."""
    q_z = Normal(*vae.z_encoder(cells.x.log1p()))
    z = q_z.rsample()
    labels = torch.eye(vae.n_labels).unsqueeze(1)
    known = torch.where(
        (labels.squeeze(1).argmax(-1) == cells.label.unsqueeze(-1)) | ~cells.labelled.unsqueeze(-1),
        0.0,
        -1e20,
    )
    log_q_y = (vae.classifier(z).log_softmax(-1) + known).log_softmax(-1)
    q_u = Normal(*vae.u_encoder(z, labels))
    u = q_u.rsample()
    p_z = Normal(*vae.z_decoder(u, labels))
    kl_u = kl_divergence(q_u, Normal(torch.zeros(()), torch.ones(()))).sum(-1)
    of_label = kl_u - p_z.log_prob(z).sum(-1) - vae.y_prior.log().unsqueeze(-1) + log_q_y.T
    weight = log_q_y.T.exp()
    hidden = vae.x_decoder(z)
    p_x = ZeroInflatedNegativeBinomial(
        cells.x.sum(-1, keepdim=True) * vae.x_decoder.expression(hidden),
        vae.dispersion.log_theta.exp(),
        vae.x_decoder.gate(hidden),
        validate_args=False,
    )
    cost = (weight * torch.where(weight > 0, of_label, 0.0)).sum(0)
    cost = cost - p_x.log_prob(cells.x).sum(-1) + q_z.log_prob(z).sum(-1)
    logits = vae.classifier(q_z.mean).log_softmax(-1)
    wrong = -logits.gather(-1, cells.label.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    labelled = cells.labelled.to(wrong.dtype)
    return cost.mean() + R * (wrong * labelled).sum() / labelled.sum().clamp(min=1)


def predict(model: SCANVI, settings: dict[str, Any]) -> float:
    """Seconds of the probabilities of all labels of all cells."""
    model.train(1, train_size=1.0, progress_bar=False)
    return clock.better_of_two(lambda: PREDICTIONS[settings["way"]](model))


WAYS: dict[str, Callable[..., Callable[[int], None]]] = {
    "": by_train,
    "elbo": lambda model, minibatch: by_train(model, minibatch, objective=ELBO()),
    "without Lightning": without_lightning,
    "by hand": by_hand,
}
PREDICTIONS: dict[str, Callable[[SCANVI], Any]] = {
    "": lambda model: model.predict(soft=True, method="classifier"),
    "rules": lambda model: model.predict(soft=True, method="consensus"),
}


if __name__ == "__main__":
    main(*sys.argv[1:])
