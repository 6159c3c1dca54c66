"""Labels of cells, by the classifier and by Bayes' rule."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from scipy.stats import multivariate_normal

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.extensions import WithoutU
from pyro_scanvi.posterior.labels import partial_answers
from tests.examples import SMALL, as_they_are, simulated, small_model
from tests.posterior.examples import by_bayes, certain


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


@pytest.mark.parametrize("method", ["classifier", "bayes", "states"])
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


def smallest_by_hand(p, sets, confidence):
    """One cell, in words: the smallest that is sure, of two alike the surer."""
    sure = [(len(s), -sum(p[c] for c in s), n) for n, s in sets.items()]
    sure = [entry for entry in sure if -entry[1] >= confidence]
    return min(sure)[2] if sure else "Unknown"


def test_where_the_leaf_is_unsure_the_answer_is_its_parent():
    """Against a search by hand, for probabilities that make every level the answer."""
    leaves = ["B", "NK", "T"]
    sets = {"lymphoid": ("NK", "T"), "innate": ("B", "NK"), "blood": ("B", "NK", "T")}
    p = np.random.default_rng(0).dirichlet(np.full(3, 0.4), size=300)
    answers = partial_answers(p, leaves, sets, 0.8, "Unknown")
    every = {name: (name,) for name in leaves} | sets
    wanted = [
        smallest_by_hand(dict(zip(leaves, row, strict=True)), every, 0.8) for row in p.tolist()
    ]
    assert answers.tolist() == wanted
    assert set(every) == set(wanted)  # the largest set holds all, so nobody is unknown
    unsure = partial_answers(p, leaves, {}, 0.8, "Unknown")
    assert ((unsure == "Unknown") == (p.max(1) < 0.8)).all()


def test_partial_answers_are_those_of_the_sets_that_were_set_up():
    adata = simulated()
    tree = {"NK": "lymphoid", "T": "lymphoid"}
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", label_parents=tree)
    model = as_they_are(SCANVI(adata, seed=0, **SMALL))
    soft = model.predict(soft=True)
    confidence = float(soft.max(axis=1).median())
    answers = model.predict(confidence=confidence)
    sure = soft.max(axis=1) >= confidence
    assert (answers[sure] == soft.idxmax(axis=1)[sure]).all()
    pairs = soft[["NK", "T"]].sum(axis=1) >= confidence
    assert (answers[~sure & pairs] == "lymphoid").all()
    assert (answers[~sure & ~pairs] == "Unknown").all()


@pytest.mark.parametrize("changes", [{"confidence": 0}, {"confidence": 1.5}, {"confidence": "a"}])
def test_a_confidence_is_a_probability(model, changes):
    with pytest.raises(InputError, match="expected a share"):
        model.predict(**changes)


def test_names_and_probabilities_are_not_asked_at_once(model):
    with pytest.raises(InputError, match="one of them"):
        model.predict(soft=True, confidence=0.9)


@pytest.fixture(scope="module")
def without_u():
    """p(z | y) is a Gaussian, and q(z | x) next to a point, so that all is known by hand."""
    model = as_they_are(small_model(simulated(60), module_class=WithoutU, y_prior=[0.5, 0.3, 0.2]))
    with torch.no_grad():
        model.module.z_decoder.mean.weight.mul_(10)  # types that differ
    return certain(model)


def test_labels_given_states_are_those_of_gaussians(without_u):
    z = without_u.get_latent_representation()
    with torch.no_grad():
        means, scales = without_u.module.z_decoder(torch.zeros(3, 0), torch.eye(3))
    log_p = [
        multivariate_normal(m, np.diag(s**2)).logpdf(z)
        for m, s in zip(means.double().numpy(), scales.double().numpy(), strict=True)
    ]
    expected = softmax(np.array(log_p).T + np.log([0.5, 0.3, 0.2]), axis=1)
    found = without_u.predict(soft=True, method="states", n_mc_samples=5, seed=0)
    assert expected.max(1).min() < 0.9  # not all are sure
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_without_noise_in_the_states_weights_change_nothing(without_u):
    """Draws are alike, so that each weighs the same."""
    arguments = {"soft": True, "n_mc_samples": 5, "seed": 0}
    states = without_u.predict(method="states", **arguments)
    bayes = without_u.predict(method="bayes", **arguments)
    np.testing.assert_allclose(states, bayes, atol=2e-3)


class OwnGuide(SCANVAE):
    def guide(self, cells):
        super().guide(cells)


def test_the_states_of_a_story_of_ones_own_are_not_known():
    model = as_they_are(small_model(simulated(30), module_class=OwnGuide))
    with pytest.raises(InputError, match="OwnGuide has a model or a guide of its own"):
        model.predict(method="states")
