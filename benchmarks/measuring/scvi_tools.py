"""The same of scvi-tools' SCANVI, in an environment with ``torch==2.13.0 scvi-tools==1.4.2``."""

import json
import logging
import resource
import sys
import time
import warnings
from importlib.metadata import version

import anndata as ad
import scvi
import torch

PLANS = {
    "": {},
    "fused": {
        "optimizer": "Custom",
        "optimizer_creator": lambda p: torch.optim.Adam(p, lr=1e-3, eps=0.01, fused=True),
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
    seconds = {"train": train, "predict": predict}[task](model, settings)
    versions = {name: version(name) for name in ("scvi-tools", "torch", "numpy")}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": memory, "versions": versions}))


def train(model, settings) -> float:
    """Seconds an epoch, of several after a first one."""

    def run(n_epochs):
        model.train(
            n_epochs,
            train_size=1.0,
            batch_size=settings["minibatch"],
            enable_progress_bar=False,
            plan_kwargs=dict(PLANS[settings["way"]]),
        )

    run(1)
    start = time.perf_counter()
    run(settings["epochs"])
    return (time.perf_counter() - start) / settings["epochs"]


def predict(model, settings) -> float:
    """Seconds of the probabilities of all labels of all cells, the better of two runs."""
    model.train(1, train_size=1.0, enable_progress_bar=False)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model.predict(soft=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
