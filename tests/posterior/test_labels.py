"""Labels of cells, by the classifier and by Bayes' rule."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from tests.examples import as_they_are, simulated, small_model
from tests.posterior.examples import by_bayes


@pytest.fixture
def model(trained):
    """A trained model; the tests only read it."""
    return trained


def test_bayes_recovers_clear_types(model):
    """Chance is 1/3."""
    hidden = (model.adata.obs["cell_type"] == "Unknown").to_numpy()
    soft = by_bayes(model, seed=0)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-12)
    hard = model.predict(method="bayes", seed=0)
    assert (soft.idxmax(axis=1).to_numpy() == hard).all()
    assert (hard == model.adata.obs["truth"].to_numpy())[hidden].mean() > 0.9


def test_bayes_does_not_ask_the_classifier(model):
    twin = copy.deepcopy(model)
    for parameter in twin.module.classifier.parameters():
        parameter.data.fill_(float("nan"))
    pd.testing.assert_frame_equal(by_bayes(twin, seed=0), by_bayes(model, seed=0))


def test_prior_of_labels_shifts_log_odds(model):
    """By exactly the log of the ratio of the priors, with the same draws."""
    twin = copy.deepcopy(model)
    prior = torch.tensor([0.6, 0.3, 0.1])
    twin.module.y_prior.copy_(prior)
    arguments = {"n_mc_samples": 20, "seed": 0}
    shift = np.log(by_bayes(twin, **arguments)) - np.log(by_bayes(model, **arguments))
    odds = shift.sub(shift.iloc[:, 2], axis=0).to_numpy()
    expected = (prior / prior[2]).log().expand(120, -1)
    np.testing.assert_allclose(odds, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["classifier", "bayes"])
def test_observed_labels_are_kept(method):
    """Those of half of the cells, here wrong ones; the others are predicted as ever."""
    adata = simulated(n=60)
    model = as_they_are(small_model(adata))
    labelled = (adata.obs["cell_type"] != "Unknown").to_numpy()
    arguments = {"method": method, "seed": 0, "n_mc_samples": 5}
    free = model.predict(soft=True, **arguments)
    kept = model.predict(soft=True, keep_observed=True, **arguments)
    pd.testing.assert_frame_equal(kept[~labelled], free[~labelled])
    expected = pd.get_dummies(adata.obs["cell_type"][labelled])[kept.columns]
    np.testing.assert_array_equal(kept[labelled], expected)
    hard = model.predict(keep_observed=True, **arguments)
    assert (hard[labelled] == adata.obs["cell_type"][labelled]).all()
    assert (hard[~labelled] == model.predict(**arguments)[~labelled]).all()
    assert not (free[labelled].max(axis=1) == 1).any()
    some = model.predict(indices=[7, 3], keep_observed=True, soft=True, method="classifier")
    expected = model.predict(keep_observed=True, soft=True, method="classifier").iloc[[7, 3]]
    pd.testing.assert_frame_equal(some, expected, rtol=1e-5)


def test_cells_without_a_column_of_labels_have_none_to_keep(model):
    new = simulated()
    del new.obs["cell_type"]
    pd.testing.assert_frame_equal(
        model.predict(new, soft=True, keep_observed=True), model.predict(soft=True)
    )
