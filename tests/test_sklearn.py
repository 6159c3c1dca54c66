"""The classifier of scikit-learn: its contract, and that its answers are those of SCANVI."""

import pickle
import pickletools

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array, issparse
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from torch import nn

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.sklearn import EXPECTED_FAILED_CHECKS, SCANVIClassifier
from tests.examples import mostly_slow, simulated

SMALL = {"n_hidden": 16}
PLAN = {"plan_kwargs": {"lr": 1e-2}, "batch_size": 32}


def small(**changes) -> SCANVIClassifier:
    settings = {"n_latent": 4, "max_epochs": 2, "model_kwargs": SMALL, "random_state": 0}
    return SCANVIClassifier(**(settings | changes))


def as_counts(X):
    """Of the fractions, zeros among them, that scikit-learn makes up: no row is without counts."""
    return np.rint(50 * (X.toarray() if issparse(X) else np.asarray(X, dtype=float))) + 1


@pytest.fixture(scope="module")
def adata():
    return simulated()


@pytest.fixture(scope="module")
def y(adata) -> np.ndarray:
    """Three names, and -1 where the label is not known."""
    given = adata.obs["cell_type"].to_numpy(dtype=object)
    return np.where(given == "Unknown", -1, given)


@pytest.fixture(scope="module")
def fitted(adata, y) -> SCANVIClassifier:
    return small(max_epochs=5, train_kwargs=PLAN).fit(csr_array(adata.X), y)


# ---- scikit-learn's own checks -------------------------------------------------------------------


@pytest.mark.slow
def test_the_contract_is_kept_but_for_what_is_named():
    """All at once: names of single checks would have the address of `as_counts` in them."""
    classifier, named = small(to_counts=as_counts), EXPECTED_FAILED_CHECKS
    found = pd.DataFrame(
        estimator_checks.check_estimator(
            classifier, expected_failed_checks=named, on_fail=None, on_skip=None
        )
    )
    assert found.loc[found["status"] == "failed", ["check_name", "exception"]].empty
    assert set(found.loc[found["status"] == "xfail", "check_name"]) == set(named)
    assert (found["status"] == "passed").sum() > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED_FAILED_CHECKS)
def test_what_fails_by_its_marker_passes_without_it(name):
    check = getattr(estimator_checks, name)
    check("SCANVIClassifier", small(to_counts=as_counts, unlabeled_category=None))


# ---- it is SCANVI --------------------------------------------------------------------------------


def test_answers_are_those_of_scanvi(adata, fitted):
    """By hand, with the seed that numpy draws."""
    seed = np.random.RandomState(0).randint(2**31 - 1)
    cells = adata.copy()
    SCANVI.setup_anndata(cells, "cell_type", "Unknown")
    model = SCANVI(cells, seed=int(seed), n_latent=4, **SMALL)
    model.train(5, progress_bar=False, **PLAN)
    assert fitted.classes_.tolist() == ["B", "NK", "T"]
    np.testing.assert_array_equal(fitted.predict_proba(adata.X), model.predict(soft=True))
    np.testing.assert_array_equal(fitted.predict(adata.X), model.predict())
    np.testing.assert_array_equal(fitted.transform(adata.X), model.get_latent_representation())
    assert fitted.score(adata.X, adata.obs["truth"]) > 0.9


def test_how_labels_are_found_can_be_said(adata, fitted, monkeypatch):
    by_classifier = fitted.model_.predict(soft=True, method="classifier")
    assert not np.allclose(fitted.predict_proba(adata.X), by_classifier)
    monkeypatch.setattr(fitted, "method", "classifier")
    np.testing.assert_array_equal(fitted.predict_proba(adata.X), by_classifier)


MARKERS = {
    "numbers": (-1, {"B": 3, "T": 10, "NK": 2}, [2, 3, 10]),
    "a name": ("Unknown", {"B": "B", "T": "T", "NK": "NK"}, ["B", "NK", "T"]),
    "text": ("-1", {"B": "B", "T": "T", "NK": "NK"}, ["B", "NK", "T"]),
}


@pytest.mark.parametrize("case", mostly_slow(MARKERS))
def test_labels_of_any_type(case, adata):
    """As they are given they come back; -1 and "-1" are one name."""
    marker, names, classes = MARKERS[case]
    column = [names.get(label, marker) for label in adata.obs["cell_type"]]
    wanted = marker if marker == "Unknown" else -1
    found = small(unlabeled_category=wanted, max_epochs=1).fit(adata.X, np.array(column))
    assert found.classes_.tolist() == classes
    assert set(found.predict(adata.X)) <= set(classes)
    given = found.model_.adata.obs["y"]
    assert given.isna().tolist() == (adata.obs["cell_type"] == "Unknown").tolist()


def test_all_cells_may_be_labelled(adata):
    """And nothing warns: so it is with classifiers."""
    found = small(max_epochs=1, unlabeled_category=None).fit(adata.X, adata.obs["truth"])
    assert not found.model_.adata.obs["y"].isna().any()


def test_genes_and_batches_have_names(adata, y):
    frame = adata.to_df()
    batch = np.array(["one", "two"])[np.arange(len(y)) % 2]
    found = small(max_epochs=1).fit(frame, y, batch=batch)
    assert found.feature_names_in_.tolist() == found.model_.get_var_names().tolist()
    assert found.model_.fields.batches.tolist() == ["one", "two"]
    assert found.predict(frame).shape == y.shape, "without a batch"
    with pytest.raises(ValueError, match="feature names should match"):
        found.predict(frame.iloc[:, ::-1])
    states = found.set_output(transform="pandas").transform(frame)
    assert states.columns.tolist() == [f"scanviclassifier{i}" for i in range(4)]
    assert states.columns.tolist() == found.get_feature_names_out().tolist()


# ---- what is refused -----------------------------------------------------------------------------


REFUSED = {
    "negative": (lambda x, y: (x - 1, y), "Negative values in data"),
    "normalised": (lambda x, y: (np.log1p(x / 7), y), "fractional: .* look log-normalised"),
    "a word for unknown": (
        lambda x, y: (x, np.where(y == "T", "unknown", y)),
        "labelled 'unknown', .* unlabeled_category is '-1'",
    ),
    "no label": (lambda x, y: (x, np.full(len(y), -1)), "no cell is labelled"),
    "one label": (lambda x, y: (x, np.where(y == "B", y, -1)), "single class, 'B'"),
    "numbers to regress": (lambda x, y: (x, np.arange(len(y)) + 0.5), "Unknown label type"),
    "a missing label": (lambda x, y: (x, np.where(y == "B", np.nan, y)), "contains NaN"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(change, said, adata, y):
    with pytest.raises(ValueError, match=said):
        small().fit(*change(adata.X, y))


def test_batches_of_another_number_are_refused(adata, y):
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        small().fit(adata.X, y, batch=["one"] * 3)


def test_questions_before_training_and_of_other_cells_are_refused(adata, fitted):
    for ask in ("predict", "predict_proba", "transform"):
        with pytest.raises(NotFittedError):
            getattr(small(), ask)(adata.X)
    with pytest.raises(ValueError, match="X has 19 features, but .* 20 features"):
        fitted.predict(adata.X[:, 1:])
    with pytest.raises(InputError, match="cells without counts: 1"):
        fitted.predict(adata.X * (np.arange(120) > 0)[:, None])


def test_fractions_are_made_into_counts_where_that_is_said(adata, y):
    """In training, and of new cells, whose answers are those to their counts."""
    found = small(max_epochs=1, to_counts=np.rint).fit(adata.X + 0.3, y)
    np.testing.assert_array_equal(found.model_.adata.X, adata.X)
    states = found.transform(adata.X - 0.3 * (adata.X > 0))
    np.testing.assert_array_equal(states, found.transform(adata.X))


# ---- pickles -------------------------------------------------------------------------------------


class Renamed(SCANVAE):
    """A class of one's own."""


def test_a_pickle_holds_a_saved_model(adata, fitted):
    """Equal to the bit, and no tensor, module or AnnData is pickled."""
    stored = pickle.dumps(fitted)
    named = {arg for _, arg, _ in pickletools.genops(stored) if isinstance(arg, str)}
    assert not [name for name in named if name.startswith(("torch", "anndata", "pandas"))]
    opened = pickle.loads(stored)
    np.testing.assert_array_equal(opened.predict_proba(adata.X), fitted.predict_proba(adata.X))
    np.testing.assert_array_equal(opened.transform(adata.X), fitted.transform(adata.X))
    pd.testing.assert_frame_equal(opened.model_.history, fitted.model_.history)
    assert opened.get_params() == fitted.get_params()


def test_classes_and_parts_of_ones_own_come_back_from_a_pickle(adata, y):
    own = {"module_class": Renamed, "extra_encoder_kwargs": {"activation": nn.Tanh}}
    found = pickle.loads(
        pickle.dumps(small(max_epochs=1, model_kwargs=SMALL | own).fit(adata.X, y))
    )
    assert type(found.model_.module) is Renamed


def test_before_training_there_is_nothing_to_save():
    assert pickle.loads(pickle.dumps(small())).get_params() == small().get_params()


# ---- scikit-learn's tools ------------------------------------------------------------------------


@pytest.mark.slow
def test_unlabelled_cells_always_train_and_are_never_scored(adata, y):
    """By PredefinedSplit, whose -1 is that; in a pipeline."""
    y = np.where(y == -1, -1, pd.Series(y).map({"B": 0, "NK": 1, "T": 2, -1: -1})).astype(int)
    fold = np.where(y == -1, -1, np.arange(len(y)) // 3 % 2)
    pipeline = make_pipeline(small(train_kwargs=PLAN, max_epochs=5), PCA(2))
    states = pipeline.fit_transform(adata.X, y)
    assert states.shape == (120, 2)
    scores = cross_val_score(pipeline[0], adata.X, y, cv=PredefinedSplit(fold))
    assert len(scores) == 2 and scores.min() > 0.8


@pytest.mark.slow
def test_searches_and_calibration(adata):
    X, y = csr_array(adata.X), adata.obs["truth"].to_numpy(dtype=str)
    batch = np.arange(120) % 2
    search = GridSearchCV(small(unlabeled_category=None), {"n_latent": [2, 3]}, cv=2)
    assert search.fit(X, y, batch=batch).best_params_["n_latent"] in (2, 3)
    assert search.best_estimator_.model_.fields.batches.tolist() == [0, 1]
    calibrated = CalibratedClassifierCV(small(), cv=2).fit(X, y)
    assert calibrated.predict_proba(X).shape == (120, 3)
    assert calibrated.score(X, y) > 0.8
