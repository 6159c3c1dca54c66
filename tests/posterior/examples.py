"""Models of each kind that the questions are asked, and what they should say."""

import copy

import anndata as ad
import numpy as np
import pandas as pd
import torch

from pyro_scanvi import SCANVI
from tests.examples import simulated

N, G, K = 60, 20, 4
BATCHES = ("one", "two", "six")
KINDS = {
    "zinb": {},
    "nb": {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    "poisson": {"gene_likelihood": "poisson"},
    "labels": {"dispersion": "gene-label"},
    "library": {"use_observed_lib_size": False},
    "covariates": {"encode_covariates": True},
    "softmax": {"latent_distribution": "ln"},
}


def batched(n: int = N) -> ad.AnnData:
    """Cells of three types in three batches, half of them unlabelled."""
    adata = simulated(n)
    adata.obs["batch"] = np.array(BATCHES)[np.random.default_rng(1).integers(3, size=n)]
    return adata


def model_of(adata: ad.AnnData, **arguments) -> SCANVI:
    """A small model of cells in batches; batch norm has seen none of them."""
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key="batch")
    return SCANVI(adata, **({"n_hidden": 16, "n_latent": K} | arguments))


def certain(model: SCANVI) -> SCANVI:
    """A copy whose q(z | x) has next to no variance."""
    model = copy.deepcopy(model)
    model.module.z_encoder.var_eps = 1e-20
    with torch.no_grad():
        model.module.z_encoder.variance.weight.zero_()
        model.module.z_encoder.variance.bias.fill_(-50.0)
    return model


def tensors(model: SCANVI) -> dict[str, torch.Tensor]:
    cells = model._data[np.arange(len(model._data))]
    return {"x": cells.x, "batch": cells.batch, "label": cells.label, "cells": cells}


def decoded(model: SCANVI, batch: np.ndarray | None = None, size: float = 1.0):
    """p(x | z) at the mean of q(z | x), by the interface of scvi-tools."""
    given = tensors(model)
    codes = given["batch"] if batch is None else torch.as_tensor(batch)
    with torch.no_grad():
        z = model.module.inference(given["x"], given["batch"])["qz"].mean
        library = torch.full((len(z), 1), float(np.log(size)))
        return model.module.generative(z, library, codes, y=given["label"].clamp(min=0))["px"]


def by_bayes(model: SCANVI, **arguments) -> pd.DataFrame:
    """Probability of each label, by Bayes' rule."""
    return model.predict(soft=True, method="bayes", **arguments)
