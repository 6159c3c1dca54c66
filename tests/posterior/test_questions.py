"""What every question keeps to: nothing is moved, seeds, one minibatch at a time, refusals."""

import copy
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scanvi import SCANVAE, InputError
from pyro_scanvi.data.minibatches import CellData
from tests.examples import as_they_are, simulated, small_model
from tests.posterior.examples import KINDS, N, batched, model_of

METHODS = {
    "latent mean": lambda m, **a: m.get_latent_representation(**a),
    "latent sample": lambda m, **a: m.get_latent_representation(give_mean=False, **a),
    "latent moments": lambda m, **a: m.get_latent_representation(return_dist=True, **a),
    "expression": lambda m, **a: m.get_normalized_expression(n_samples=3, **a),
    "expression as of batches": lambda m, **a: m.get_normalized_expression(
        transform_batch=["one", "two"], n_samples=2, return_mean=False, **a
    ),
    "expression overall": lambda m, **a: m.get_normalized_expression(n_samples_overall=7, **a),
    "parameters": lambda m, **a: m.get_likelihood_parameters(n_samples=2, **a),
    "library": lambda m, **a: m.get_latent_library_size(give_mean=False, **a),
    "predictive": lambda m, **a: m.posterior_predictive_sample(n_samples=2, **a),
    "pearson": lambda m, **a: m.get_feature_correlation_matrix(correlation_type="pearson", **a),
    "spearman": lambda m, **a: m.get_feature_correlation_matrix(**a),
    "elbo": lambda m, **a: m.get_elbo(**a),
    "elbo of cells": lambda m, **a: m.get_elbo(return_mean=False, feed_labels=True, **a),
    "reconstruction": lambda m, **a: m.get_reconstruction_error(**a),
}


def flattened(answer) -> np.ndarray:
    """All numbers of an answer."""
    parts = answer.values() if isinstance(answer, dict) else answer
    parts = parts if isinstance(answer, dict | tuple) else [answer]
    return np.concatenate([np.ravel(np.asarray(p, dtype=float)) for p in parts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_moves_nothing(models, method, kind):
    """Not a bit of the state dict, the mode, a gradient, or with a seed torch's generator."""
    model = copy.deepcopy(models[kind])
    model.module.train()
    state, generator = copy.deepcopy(model.module.state_dict()), torch.get_rng_state()
    answer = flattened(METHODS[method](model, seed=3, batch_size=25))
    assert np.isfinite(answer).all()
    assert model.module.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in model.module.parameters())
    model.module.eval()
    np.testing.assert_array_equal(flattened(METHODS[method](model, seed=3, batch_size=25)), answer)


EXACT = ("latent mean", "latent moments")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in EXACT])
def test_seeds_matter(models, method):
    model = models["library"]
    one, two = (flattened(METHODS[method](model, seed=s)) for s in (0, 1))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("method", METHODS)
def test_one_minibatch_lives_at_a_time(model, method, monkeypatch):
    """Of 12 that are read; the one before the last may not be collected yet."""
    alive, most, read = weakref.WeakSet(), [], CellData.__getitem__

    def watched(self, positions):
        cells = read(self, positions)
        assert len(cells) <= 5
        alive.add(cells.x)
        most.append(len(alive))
        return cells

    monkeypatch.setattr(CellData, "__getitem__", watched)
    METHODS[method](model, batch_size=5)
    assert len(most) >= (2 if method == "expression overall" else 12)
    assert max(most) <= 2


# ---- names of batches ---------------------------------------------------------------------------


def test_a_model_without_batches_has_one():
    model = as_they_are(small_model(simulated(N)))
    found = model.get_normalized_expression(transform_batch="all cells", seed=0)
    pd.testing.assert_frame_equal(found, model.get_normalized_expression(seed=0))


def test_numbered_batches_are_found_by_number():
    adata = batched()
    adata.obs["batch"] = adata.obs["batch"].map({"one": 1, "two": 2, "six": 6})
    model = as_they_are(model_of(adata))
    one, text = (model.get_normalized_expression(transform_batch=b, seed=0) for b in (6, "6"))
    pd.testing.assert_frame_equal(one, text)
    assert not one.equals(model.get_normalized_expression(transform_batch=2, seed=0))


# ---- errors -------------------------------------------------------------------------------------


REFUSED = [
    ("get_latent_representation", {"mc_samples": 0}, "mc_samples=0"),
    ("get_latent_representation", {"batch_size": 0}, "batch_size=0"),
    ("get_latent_representation", {"give_mean": False, "seed": -1}, "seed=-1"),
    ("get_latent_representation", {"indices": []}, "selects no cell"),
    ("get_normalized_expression", {"transform_batch": "twoo"}, "'twoo'; did you mean 'two'"),
    ("get_normalized_expression", {"transform_batch": ["one", "xyz"]}, "'xyz'; the model knows"),
    ("get_normalized_expression", {"transform_batch": []}, "transform_batch is empty"),
    ("get_normalized_expression", {"gene_list": ["gene1", "gnee2"]}, "did you mean 'gene2'"),
    ("get_normalized_expression", {"gene_list": ["x", "y", "z"]}, "'x' and 2 more"),
    ("get_normalized_expression", {"gene_list": "gene1"}, "expected a list of names"),
    ("get_normalized_expression", {"library_size": "observed"}, "expected one of 'latent'"),
    ("get_normalized_expression", {"library_size": 0}, "library_size=0"),
    ("get_normalized_expression", {"library_size": float("nan")}, "library_size=nan"),
    ("get_normalized_expression", {"library_size": None}, "expected one of 'latent'"),
    ("get_normalized_expression", {"n_samples": 0}, "n_samples=0"),
    ("get_normalized_expression", {"n_samples": 2.5}, "n_samples=2.5"),
    ("get_normalized_expression", {"n_samples_overall": 0}, "n_samples_overall=0"),
    ("get_normalized_expression", {"n_samples_overall": 3, "n_samples": 2}, "choose one"),
    (
        "get_normalized_expression",
        {"weights": "importance"},
        "'importance' is not supported.*prior of z",
    ),
    (
        "get_normalized_expression",
        {"n_samples": 2, "return_mean": False, "return_numpy": False},
        "three dimensions",
    ),
    ("get_likelihood_parameters", {"n_samples": -1}, "n_samples=-1"),
    ("posterior_predictive_sample", {"n_samples": True}, "n_samples=True"),
    ("posterior_predictive_sample", {"transform_batch": ["one", "two"]}, "in turn"),
    ("posterior_predictive_sample", {"gene_list": []}, "gene_list is empty"),
    ("get_feature_correlation_matrix", {"n_samples": 0}, "n_samples=0"),
    ("get_feature_correlation_matrix", {"batch_size": 0}, "batch_size=0"),
    ("get_feature_correlation_matrix", {"rna_size_factor": -1}, "rna_size_factor=-1"),
    ("get_feature_correlation_matrix", {"correlation_type": "kendall"}, "'pearson', 'spearman'"),
    ("get_feature_correlation_matrix", {"indices": [0], "n_samples": 1}, "no correlation"),
    ("get_elbo", {"batch_size": -3}, "batch_size=-3"),
    ("get_reconstruction_error", {"batch_size": 1.5}, "batch_size=1.5"),
]


@pytest.mark.parametrize("method, arguments, message", REFUSED)
def test_bad_arguments_are_refused(model, method, arguments, message, monkeypatch):
    """Before the model is asked."""
    monkeypatch.setattr(SCANVAE, "q_z", None)
    with pytest.raises(InputError, match=message):
        getattr(model, method)(**arguments)
