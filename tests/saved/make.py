"""Write files like those of this folder: ``python -m tests.saved.make FOLDER``.

README.md says what they are. Those that are here stay as they are: what they show is that files of
before can be read.
"""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch

from pyro_scanvi import SCANVI

MODEL = {"n_hidden": 4, "n_latent": 2, "dispersion": "gene-batch", "y_prior": [0.3, 0.7]}
RUN = {"batch_size": 16, "progress_bar": False, "pretrain_epochs": 1}
EPOCHS = 3  # the checkpoint is of the second, after the warm start
GENES = list("ABCDEFGH")


def cells(n: int = 40, batches: tuple[str, ...] = ("one", "two"), seed: int = 0) -> ad.AnnData:
    """Two types that differ in all of 8 genes; the first half of the cells is labelled."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 2
    means = np.where(kind[:, None], [8.0] * 4 + [1.0] * 4, [1.0] * 4 + [8.0] * 4)
    labels = np.where(np.arange(n) < n // 2, np.array(["a", "b"])[kind], "Unknown")
    obs = pd.DataFrame(
        {"label": labels, "batch": np.array(batches)[np.arange(n) // 2 % len(batches)]},
        index=[f"c{i}" for i in range(n)],
    )
    obs["depth"] = rng.normal(size=n).astype(np.float32)
    return ad.AnnData(rng.poisson(means).astype(np.float32), obs, pd.DataFrame(index=GENES))


def new_cells() -> ad.AnnData:
    """Of a batch and a type, "c", that the model has not seen."""
    adata = cells(20, batches=("two", "three"), seed=1)
    adata.obs["label"] = adata.obs["label"].replace({"a": "c"})
    return adata


def untrained(adata: ad.AnnData) -> SCANVI:
    """A model with batches, a covariate and arguments that are not the defaults."""
    keys = {"batch_key": "batch", "continuous_covariate_keys": ["depth"]}
    SCANVI.setup_anndata(adata, "label", "Unknown", **keys)
    return SCANVI(adata, seed=3, **MODEL)


def answers(model: SCANVI) -> dict[str, np.ndarray]:
    """Label probabilities (N, L), latent space (N, K) and ELBO (N,)."""
    return {
        "probabilities": model.predict(soft=True, method="classifier").to_numpy(),
        "latent": model.get_latent_representation(),
        "elbo": model.get_elbo(return_mean=False, seed=0),
    }


def main(folder: Path) -> None:
    """Train for two epochs, save, map new cells on it; and train without a stop."""
    torch.set_num_threads(1)
    model = untrained(cells()).train(EPOCHS - 1, checkpoint_dir=folder, **RUN)
    (folder / "last.ckpt").rename(folder / "run.ckpt")
    model.save(folder / "model", save_anndata=True)
    arguments = {"extend_labels": ["c"], "unfrozen": False}
    query = SCANVI.load_query_data(new_cells(), folder / "model", **arguments).train(1, **RUN)
    query.save(folder / "query", save_anndata=True)
    whole = untrained(cells()).train(EPOCHS, **RUN)
    for name, made in {"model": model, "query": query, "resumed": whole}.items():
        np.savez_compressed(folder / f"{name}.npz", **answers(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
