"""SCANVI of scvi-tools in several ways (METHODS), and kNN on SCVI.

    python scvi_peer.py CELLS.h5ad FOLDER SEED BATCH_KEY|- [METHOD ...]

Needs ``pip install torch==2.13.0 scvi-tools==1.4.2``, in an environment of its own. CELLS holds raw
counts and obs["given"], "Unknown" where no label is given. Epochs are scvi-tools' defaults, and of
SCANVI after SCVI the 20 of its tutorial, or 100. FOLDER gets METHOD.npz of each: classes,
probabilities, latent and seconds; from_scvi, longer and knn share one SCVI, whose seconds count for
each.
"""

import sys
import time
import warnings
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import scvi
from sklearn.neighbors import KNeighborsClassifier

QUIET = {"enable_progress_bar": False}
POPV = {
    "n_layers": 3,
    "n_latent": 20,
    "gene_likelihood": "nb",
    "dropout_rate": 0.05,
    "encode_covariates": True,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}


def from_scvi(source, batch_key, epochs=20):
    """The recipe that its manual recommends."""
    vae, seconds = trained_scvi(source, batch_key)
    start = time.perf_counter()
    model = scvi.model.SCANVI.from_scvi_model(vae, "Unknown", "given")
    model.train(max_epochs=epochs, n_samples_per_label=100, **QUIET)
    return *answer(model), seconds + time.perf_counter() - start


def longer(source, batch_key):
    """The same, with five times its epochs."""
    return from_scvi(source, batch_key, 100)


def scratch(source, batch_key):
    """SCANVI alone, with its defaults."""
    cells, start = ad.read_h5ad(source), time.perf_counter()
    scvi.model.SCANVI.setup_anndata(cells, "given", "Unknown", batch_key=batch_key)
    model = scvi.model.SCANVI(cells)
    model.train(**QUIET)
    return *answer(model), time.perf_counter() - start


def popv(source, batch_key):
    """The settings of popV."""
    cells, start = ad.read_h5ad(source), time.perf_counter()
    scvi.model.SCVI.setup_anndata(cells, batch_key=batch_key)
    vae = scvi.model.SCVI(cells, **POPV)
    vae.train(max_epochs=20, batch_size=512, **QUIET)
    model = scvi.model.SCANVI.from_scvi_model(vae, "Unknown", "given")
    model.train(max_epochs=20, batch_size=512, n_samples_per_label=20, **QUIET)
    return *answer(model), time.perf_counter() - start


def knn(source, batch_key):
    """15 neighbours in the latent space of SCVI, weighted by distance."""
    vae, seconds = trained_scvi(source, batch_key)
    start = time.perf_counter()
    latent, given = vae.get_latent_representation(), vae.adata.obs["given"].astype(str)
    labelled = (given != "Unknown").to_numpy()
    nearest = KNeighborsClassifier(min(15, labelled.sum()), weights="distance")
    nearest.fit(latent[labelled], given[labelled])
    seconds += time.perf_counter() - start
    return nearest.classes_.astype(str), nearest.predict_proba(latent), latent, seconds


@cache
def trained_scvi(source, batch_key):
    """SCVI with its defaults, and its seconds."""
    cells, start = ad.read_h5ad(source), time.perf_counter()
    scvi.model.SCVI.setup_anndata(cells, batch_key=batch_key)
    model = scvi.model.SCVI(cells)
    model.train(**QUIET)
    return model, time.perf_counter() - start


def answer(model):
    """Classes, probabilities and latent space."""
    soft = model.predict(soft=True)
    return soft.columns.to_numpy(str), soft.to_numpy(), model.get_latent_representation()


METHODS = {f.__name__: f for f in (from_scvi, longer, knn, scratch, popv)}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    source, folder, seed, batch_key, *methods = sys.argv[1:]
    for method in methods:
        scvi.settings.seed = int(seed)
        found = METHODS[method](source, None if batch_key == "-" else batch_key)
        names = ("classes", "probabilities", "latent", "seconds")
        np.savez(Path(folder) / f"{method}.npz", **dict(zip(names, found, strict=True)))
