"""Small models and minibatches that the tests share."""

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scanvi import SCANVAE, SCANVI, Cells
from pyro_scanvi.posterior.trained import Trained
from pyro_scanvi.surgery.growing import grow

TYPES = ("B", "NK", "T")
SMALL = {"n_hidden": 16, "n_latent": 4, "dropout_rate": 0.1, "linear_classifier": False}
SIZES = {"n_input": 20, "n_labels": 3, "n_hidden": 8, "n_latent": 4}
QUESTIONS = sorted(  # the methods that SCANVI inherits
    name for theme in Trained.__subclasses__() for name in vars(theme) if not name.startswith("_")
)


def mostly_slow(cases: Iterable) -> list:
    """Cases of a test of which `make test` runs the first alone."""
    first, *others = cases
    return [pytest.param(first), *(pytest.param(case, marks=pytest.mark.slow) for case in others)]


def small_vae(seed: int = 0, **changes) -> SCANVAE:
    """A model of 20 genes and 3 labels, the same for each seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SCANVAE(**(SIZES | changes))


def enlarged(old: SCANVAE, arguments: dict) -> SCANVAE:
    """A model of the class of `old`, made with other arguments, that holds its weights."""
    return grow(old, type(old)(**arguments).eval())


def random_cells(
    vae: SCANVAE, labels: str = "mixed", n: int = 12, n_obs: int | None = None, seed: int = 0
) -> Cells:
    """Cells with all that `vae` reads; labels are "all", "mixed" (every other) or "none"."""
    rng = torch.Generator().manual_seed(seed)

    def codes(n_codes: int) -> torch.Tensor:
        return torch.randint(n_codes, (n,), generator=rng)

    dtype = vae.y_prior.dtype
    x = torch.poisson(torch.full((n, vae.n_input), 2.0, dtype=dtype), generator=rng)
    x[:, 0] += 1  # no empty cell
    label = codes(vae.n_labels)
    hidden = {"all": slice(0), "mixed": slice(0, n, 2), "none": slice(n)}[labels]
    label[hidden] = -1
    continuous = torch.randn(n, vae.n_continuous_cov, generator=rng, dtype=dtype)
    categorical = [codes(k) for k in vae.n_cats_per_cov]
    return Cells(
        x=x,
        batch=codes(vae.n_batch),
        label=label,
        index=torch.arange(n),
        n_obs=n_obs or n,
        continuous=continuous if vae.n_continuous_cov else None,
        categorical=torch.stack(categorical, -1) if categorical else None,
        size_factor=x.sum(-1, keepdim=True) / 10 if vae.use_size_factor_key else None,
    )


def simulated(n: int = 120, n_genes: int = 20, seed: int = 0) -> ad.AnnData:
    """Three types that differ clearly, half of the cells unlabelled; truth in obs["truth"]."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 3
    means = 4 * np.exp(1.5 * rng.normal(size=(3, n_genes)))
    x = rng.poisson(means[kind]).astype(np.float32)
    x[:, 0] += 1  # no empty cell
    truth = np.array(TYPES)[kind]
    shown = np.where(rng.random(n) < 0.5, truth, "Unknown")
    obs = pd.DataFrame({"cell_type": shown, "truth": truth}, index=[f"cell{i}" for i in range(n)])
    return ad.AnnData(x, obs, pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]))


def as_they_are(model: SCANVI) -> SCANVI:
    """The same model, whose weights are meant to be asked though they were never trained."""
    model.is_trained = True
    return model


def small_model(adata: ad.AnnData, seed: int = 0, **arguments) -> SCANVI:
    """A small estimator on `adata`, which is set up."""
    SCANVI.setup_anndata(adata, "cell_type", "Unknown")
    return SCANVI(adata, seed=seed, **(SMALL | arguments))


@contextmanager
def file_limit(n_bytes: int | None) -> Iterator[None]:
    """No file may become larger: the next best thing to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if n_bytes is None else n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
