"""The same of scvi-tools' SCANVI, in an environment with ``torch==2.13.0 scvi-tools==1.4.2``."""

import json
import logging
import sys
import warnings

import anndata as ad
import clock
import scvi
import torch

LR = 1e-5  # costs no time; by its default of 1e-3 it comes to NaN at 20,000 genes
PLANS = {
    "": {"lr": LR},
    "fused": {
        "optimizer": "Custom",
        "optimizer_creator": lambda p: torch.optim.Adam(p, lr=LR, eps=0.01, fused=True),
    },
}


def main(task: str, path: str, given: str) -> None:
    """Time a task, once warm."""
    settings = json.loads(given)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(settings["threads"])
    adata = ad.read_h5ad(path)
    scvi.model.SCANVI.setup_anndata(adata, "given", "Unknown")
    model = scvi.model.SCANVI(adata, n_layers=settings["layers"])
    taken = {"train": train, "predict": predict}[task](model, settings)
    clock.tell(taken, ("scvi-tools", "torch", "numpy"))


def train(model, settings) -> float:
    """Seconds an epoch."""

    def run(n_epochs):
        model.train(
            n_epochs,
            train_size=1.0,
            batch_size=settings["minibatch"],
            enable_progress_bar=False,
            plan_kwargs=dict(PLANS[settings["way"]]),
        )

    return clock.epoch_seconds(run, settings["epochs"])


def predict(model, settings) -> float:
    """Seconds of the probabilities of all labels of all cells."""
    model.train(1, train_size=1.0, enable_progress_bar=False)
    return clock.better_of_two(lambda: model.predict(soft=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
