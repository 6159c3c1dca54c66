"""Labels from marker genes: scores by hand, simulated types, what is refused."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import zscore

from pyro_scanvi import InputError
from pyro_scanvi.extensions.markers import marker_labels, marker_scores
from tests.examples import simulated


@pytest.fixture
def cells() -> ad.AnnData:
    """Thirty cells; gene0 and gene1 mark B, gene2 marks T; three T are labelled, no B is."""
    rng = np.random.default_rng(0)
    truth = np.repeat(["B", "T", "NK"], 10)
    means = np.full((30, 8), 5.0)
    means[truth == "B", :2] = 40
    means[truth == "T", 2] = 40
    given = np.where(np.isin(np.arange(30), [10, 11, 12]), "T", "Unknown")
    obs = pd.DataFrame({"truth": truth, "given": given}, [f"cell{i}" for i in range(30)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(8)])
    return ad.AnnData(csr_matrix(rng.poisson(means).astype(np.float32)), obs, var)


MARKERS = {"B": ["gene0", "gene1"], "T": ["gene2"]}


def test_scores_are_mean_z_scores_of_log_shares(cells):
    x = cells.X.toarray().astype(float)
    z = zscore(np.log1p(1e4 * x / x.sum(1, keepdims=True)))
    scores = marker_scores(cells.X, cells.var_names, MARKERS)
    np.testing.assert_allclose(scores["B"], z[:, :2].mean(1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(scores["T"], z[:, 2], rtol=1e-6, atol=1e-9)


def test_cells_of_the_type_are_labelled_and_given_labels_stay(cells):
    before = cells.obs.copy()
    labels = marker_labels(cells, "given", "Unknown", MARKERS, n_cells=5)
    assert labels.value_counts().to_dict() == {"Unknown": 17, "T": 8, "B": 5}
    known = labels != "Unknown"
    assert (labels[known] == cells.obs["truth"][known]).all()
    assert (labels[before["given"] == "T"] == "T").all()
    pd.testing.assert_frame_equal(cells.obs, before)


def test_a_cell_without_a_value_is_unlabelled(cells):
    """As setup_anndata takes it; its name is no label."""
    wanted = marker_labels(cells, "given", "Unknown", MARKERS, n_cells=5)
    cells.obs["given"] = cells.obs["given"].astype(object).where(cells.obs["given"] != "Unknown")
    assert cells.obs["given"].isna().sum() == 27
    found = marker_labels(cells, "given", "Unknown", MARKERS, n_cells=5)
    pd.testing.assert_series_equal(found, wanted)


def test_the_highest_scores_are_taken(cells):
    labels = marker_labels(cells, "given", "Unknown", {"B": ["gene0"]}, n_cells=3)
    share = np.asarray(cells.X[:, 0].todense()).ravel() / np.asarray(cells.X.sum(1)).ravel()
    assert set(np.flatnonzero(labels == "B")) == set(np.argsort(-share)[:3])


def test_counts_may_stand_in_a_layer_and_be_dense(cells):
    wanted = marker_labels(cells, "given", "Unknown", MARKERS, n_cells=5)
    cells.layers["counts"], cells.X = cells.X.toarray(), None
    found = marker_labels(cells, "given", "Unknown", MARKERS, n_cells=5, layer="counts")
    pd.testing.assert_series_equal(found, wanted)


def test_a_gene_that_nowhere_differs_tells_nothing():
    x = np.ones((4, 2), np.float32)
    assert (marker_scores(x, pd.Index(["a", "b"]), {"B": ["a"]}) == 0).all(axis=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markers": {}}, "markers is empty"),
        ({"markers": {"B": "gene0"}}, "expected a list"),
        ({"markers": {"B": []}}, "no marker of 'B'"),
        ({"markers": {"B": ["gene99"]}}, "'gene99' is not a gene"),
        ({"n_cells": 0}, "n_cells"),
        ({"n_cells": 25}, "only .* unlabelled cells express the markers of 'B'"),
        ({"labels_key": "cell_typ"}, "no column 'cell_typ'"),
        ({"layer": "spliced"}, "no layer 'spliced'"),
    ],
)
def test_what_cannot_be_asked_is_refused(cells, changes, message):
    arguments = {"labels_key": "given", "unlabeled_category": "Unknown", "markers": MARKERS}
    with pytest.raises(InputError, match=message):
        marker_labels(cells, **(arguments | changes))


def test_normalised_values_are_refused():
    adata = simulated()
    adata.X = np.log1p(adata.X / adata.X.sum(1, keepdims=True) * 1e4)
    with pytest.raises(InputError):
        marker_labels(adata, "cell_type", "Unknown", {"B": ["gene0"]})
