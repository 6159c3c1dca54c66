"""Sets, coarser labels and noise through the estimator: training, answers, files, queries."""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scanvi import SCANVI, InputError, pl
from pyro_scanvi.model.label_noise import FixedNoise
from pyro_scanvi.posterior.importance import log_joint
from tests.examples import SMALL, TYPES, as_they_are, simulated

N = 60
SETS = {"lymphoid": ["B", "T"]}
RIGHT = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]


def some_cells(n=N):
    """A third of them labelled, a third by a set or a coarser label, others by a second column."""
    adata = simulated(n)
    truth = adata.obs["truth"].to_numpy()
    part = np.arange(n) // 3 % 3
    broad = np.where(truth == "NK", "NK", "lymphoid")
    adata.obs["cell_type"] = np.where(part == 0, truth, np.where(part == 1, broad, "Unknown"))
    adata.obs["fine"] = np.where(part == 0, truth, "Unknown")
    adata.obs["coarse"] = np.where(part < 2, broad, "Unknown")
    adata.obs["second"] = np.where(part == 2, truth, "Unknown")
    return adata


def made(adata, key="cell_type", setup=None, **arguments):
    SCANVI.setup_anndata(
        adata, key, "Unknown", **({"label_sets": SETS} if setup is None else setup)
    )
    return SCANVI(adata, **(SMALL | arguments))


def train(model, epochs=1, **settings):
    return model.train(epochs, progress_bar=False, batch_size=30, **settings)


@pytest.fixture(scope="module")
def model():
    """With sets; the tests only read it."""
    return train(made(some_cells()), 3)


def known(model):
    """Which cells have an exact label, and which a set."""
    given = model.adata.obs["cell_type"]
    return given.isin(TYPES).to_numpy(), (given == "lymphoid").to_numpy()


# ---- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["classifier", "bayes"])
def test_kept_labels_are_the_posterior_within_the_set(model, method):
    """Exact labels have probability 1; within a set that of each label over that of the set."""
    arguments = {"soft": True, "method": method, "n_mc_samples": 5, "seed": 0}
    kept, free = (model.predict(keep_observed=k, **arguments) for k in (True, False))
    exact, in_set = known(model)
    np.testing.assert_allclose(kept.sum(axis=1), 1, rtol=1e-6)
    given = pd.get_dummies(model.adata.obs["cell_type"][exact])[kept.columns]
    np.testing.assert_array_equal(kept[exact], given)
    assert (kept.loc[in_set, "NK"] == 0).all()
    expected = free[["B", "T"]].div(free[["B", "T"]].sum(axis=1), axis=0)
    np.testing.assert_allclose(kept.loc[in_set, ["B", "T"]], expected[in_set], rtol=1e-4)
    pd.testing.assert_frame_equal(kept[~exact & ~in_set], free[~exact & ~in_set])


@pytest.mark.parametrize("method", ["classifier", "bayes"])
def test_noisy_labels_are_weighed_not_given_back(method):
    """p(y | x, e) is p(y | x) times the column of the given label, normalised; here by hand."""
    adata = some_cells()
    noise = partial(FixedNoise, matrix=RIGHT)
    model = as_they_are(made(adata, "fine", {}, label_noise=noise))
    arguments = {"soft": True, "method": method, "n_mc_samples": 5, "seed": 0}
    kept, free = (model.predict(keep_observed=k, **arguments) for k in (True, False))
    for cell, given in enumerate(adata.obs["fine"]):
        column = np.array(RIGHT)[:, TYPES.index(given)] if given in TYPES else np.ones(3)
        expected = free.iloc[cell].to_numpy() * column
        np.testing.assert_allclose(kept.iloc[cell], expected / expected.sum(), rtol=1e-4)


def test_a_sure_model_overrules_a_noisy_label(trained):
    """A classifier that is right about the types is not told by a label that is wrong."""
    adata = simulated()
    adata.obs["cell_type"] = (
        pd.Series(TYPES, index=TYPES).shift(1, fill_value="T")[adata.obs["truth"]].to_numpy()
    )
    adata.obs.iloc[0, 0] = "Unknown"
    model = made(adata, setup={}, label_noise=partial(FixedNoise, matrix=RIGHT))
    model.module.load_state_dict(trained.module.state_dict(), strict=False)
    sure = model.module.classifier
    with torch.no_grad():
        for parameter in list(sure.parameters())[-2:]:
            parameter *= 5
    kept = as_they_are(model).predict(keep_observed=True)
    assert (kept == adata.obs["truth"]).mean() > 0.9


def test_marginal_likelihood_of_what_is_known(model):
    """log sum over the set of p(x, y), against log_joint with the same draws."""
    arguments = {"n_mc_samples": 4, "n_inner_samples": 2, "batch_size": N, "return_mean": False}
    found = model.get_marginal_ll(feed_labels=True, seed=0, **arguments)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        joint = log_joint(model.module, model._data[np.arange(N)], 4, 2).exp().numpy()
    members = {"B": [0], "NK": [1], "T": [2], "lymphoid": [0, 2], "Unknown": [0, 1, 2]}
    rows = zip(joint, model.adata.obs["cell_type"], strict=True)
    expected = np.log([row[members[given]].sum() for row, given in rows])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    free = model.get_marginal_ll(feed_labels=False, seed=0, **arguments)
    exact, in_set = known(model)
    assert (found[exact | in_set] < free[exact | in_set]).all()
    np.testing.assert_allclose(found[~exact & ~in_set], free[~exact & ~in_set], rtol=1e-6)


def test_elbo_of_what_is_known(model):
    """It lies below the estimate of the likelihood on average; fed or not is one where unknown."""
    fed, free = (
        model.get_elbo(feed_labels=f, seed=0, return_mean=False, batch_size=N)
        for f in (True, False)
    )
    exact, in_set = known(model)
    np.testing.assert_array_equal(fed[~exact & ~in_set], free[~exact & ~in_set])
    assert (fed[in_set] != free[in_set]).all()
    assert fed.mean() < model.get_marginal_ll(feed_labels=True, n_mc_samples=50, seed=0)


def test_a_named_label_has_a_class_a_probability_and_a_prior():
    adata = some_cells()
    model = train(
        made(adata, setup={"labels": ["new"], "label_sets": SETS | {"any": ["new", "B"]}})
    )
    assert model.fields.classes.tolist() == ["B", "NK", "T", "new"]
    torch.testing.assert_close(model.module.y_prior, torch.full((4,), 0.25))
    for method in ("classifier", "bayes"):
        soft = model.predict(soft=True, method=method, n_mc_samples=2)
        assert list(soft.columns) == ["B", "NK", "T", "new"] and (soft["new"] >= 0).all()
    assert model.predict(soft=True)["new"].mean() > 0


# ---- scores and settings ------------------------------------------------------------------------


def test_scores_count_what_can_be_scored():
    """Cross-entropy is of all cells of whom anything is known, accuracy of exact labels."""
    model = made(some_cells(), dropout_rate=0.0)
    exact, in_set = known(model)
    frozen = {"plan_kwargs": {"lr": 1e-12}, "train_size": 0.5}
    row = train(model, **frozen).history.query("split == 'validation'").iloc[-1]
    held = model.validation_indices
    soft = model.predict(soft=True).iloc[held]
    given = model.adata.obs["cell_type"].iloc[held]
    told = np.where(given == "lymphoid", soft["B"] + soft["T"], 0.0)
    for name in TYPES:
        told = np.where(given == name, soft[name], told)
    scored = (exact | in_set)[held]
    assert 0 < exact[held].sum() < scored.sum() < len(held)
    assert row["cross_entropy"] == pytest.approx(-np.log(told[scored]).mean(), rel=1e-4)
    right = (soft.idxmax(axis=1) == given)[exact[held]].mean()
    assert row["accuracy"] == pytest.approx(right)


def test_without_any_exact_label_there_is_no_accuracy():
    """The cross-entropy of sets is scored, and drawn."""
    adata = some_cells()
    broad = adata.obs["truth"].replace({"B": "lymphoid", "T": "lymphoid", "NK": "innate"})
    adata.obs["cell_type"] = broad.where(np.arange(N) > 5, "Unknown")
    sets = SETS | {"innate": ["NK", "ILC"]}
    model = train(made(adata, setup={"label_sets": sets}))
    assert np.isfinite(model.history["cross_entropy"]).all()
    assert "accuracy" not in model.history
    curves = pl.history(model.history, "cross_entropy")
    assert len(curves.lines) == model.history["split"].nunique()
    plt.close("all")


@pytest.mark.parametrize(
    "settings",
    [{"class_balanced": True}, {"n_samples_per_label": 2}, {"cell_weights": np.arange(1.0, N + 1)}],
    ids=["balanced", "few of each", "weights"],
)
def test_settings_go_with_sets(settings):
    model = train(made(some_cells()), 2, **settings)
    assert np.isfinite(model.history[["elbo", "cross_entropy", "accuracy"]]).all(axis=None)


def test_a_run_is_resumed_to_the_bit_and_knows_its_evidence(tmp_path):
    whole = train(made(some_cells()), 3)
    train(made(some_cells()), 1, checkpoint_dir=tmp_path)
    again = train(made(some_cells()), 3, ckpt_path=tmp_path / "last.ckpt")
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name
    changed = made(some_cells(), setup={"label_sets": {"lymphoid": ["B", "NK", "T"]}})
    with pytest.raises(InputError, match="data was"):
        train(changed, 3, ckpt_path=tmp_path / "last.ckpt")


def test_the_summary_counts_cells_known_in_part(model):
    exact, in_set = known(model)
    assert f"known of {exact.sum()} cells, in part of {in_set.sum()};" in repr(model)
    assert "further labels: 1 sets (lymphoid)" in repr(model)
    adata = some_cells()
    setup = {"coarse_labels_key": "coarse", "annotator_keys": ["second"]}
    noisy = made(adata, "fine", setup, label_noise="rate")
    assert f"known of {exact.sum()} cells, in part of {N - exact.sum()};" in repr(noisy)
    table = noisy.view_anndata_setup()
    assert table.loc["coarse labels", "categories"] == "NK, lymphoid"
    assert table.loc["annotator", "place"] == "obs['second']"
    assert model.view_anndata_setup().loc["sets of labels", "categories"] == "lymphoid"


# ---- changed cells, files and queries -----------------------------------------------------------


def test_edited_labels_are_refused_by_what_reads_them():
    adata = some_cells()
    model = train(made(adata, "fine", {"coarse_labels_key": "coarse"}))
    before = model.predict()
    adata.obs["coarse"] = np.roll(adata.obs["coarse"], 1)
    assert (model.predict() == before).all()
    for ask in (
        lambda: train(model),
        lambda: model.predict(keep_observed=True),
        lambda: model.get_elbo(feed_labels=True),
        lambda: model.get_marginal_ll(feed_labels=True),
    ):
        with pytest.raises(InputError, match=r"or what else says labels\) has changed"):
            ask()


ALL = {
    "label_sets": SETS,
    "coarse_labels_key": "coarse",
    "soft_labels_key": "soft",
    "annotator_keys": ["second"],
    "labels": ["new"],
}


def test_a_saved_model_knows_its_sources(tmp_path):
    adata = some_cells()
    adata.obsm["soft"] = pd.DataFrame({"B": 0.5, "new": 0.5}, adata.obs_names)
    model = train(made(adata, setup=ALL, label_noise="dirichlet"))
    model.save(tmp_path / "m", save_anndata=True)
    again = SCANVI.load(tmp_path / "m")
    assert again.fields.sources == model.fields.sources
    for one, other in ((model, again), (model, SCANVI.load(tmp_path / "m", some_of(adata)))):
        pd.testing.assert_frame_equal(
            one.predict(soft=True, keep_observed=True),
            other.predict(soft=True, keep_observed=True),
            check_names=False,
        )


def some_of(adata):
    """A copy without its setup."""
    copy = adata.copy()
    del copy.uns["pyro_scanvi"]
    return copy


def test_fixed_noise_is_saved_by_name(tmp_path):
    noise = partial(FixedNoise, matrix=RIGHT)
    model = train(made(some_cells(), label_noise=noise))
    model.save(tmp_path / "m")
    with pytest.raises(InputError, match="label_noise .FixedNoise"):
        SCANVI.load(tmp_path / "m", some_cells())
    with pytest.raises(InputError, match="the model was saved with"):
        SCANVI.load(tmp_path / "m", some_cells(), parts={"label_noise": FixedNoise})
    again = SCANVI.load(tmp_path / "m", some_cells(), parts={"label_noise": noise})
    torch.testing.assert_close(again.module.label_noise.matrix[0], torch.tensor(RIGHT))
    assert (again.predict(keep_observed=True) == model.predict(keep_observed=True)).all()


@pytest.mark.parametrize("columns", [True, False], ids=["with columns", "without"])
def test_queries(columns):
    adata = some_cells()
    setup = {"coarse_labels_key": "coarse", "annotator_keys": ["second"]}
    model = train(made(adata, "fine", setup, label_noise="rate"))
    new = some_of(adata)
    if not columns:
        new.obs = new.obs[["fine"]]
    query = SCANVI.load_query_data(new, model)
    assert query._data.evidence.shape == (N, 3)
    in_part = known_in_part(query)
    assert in_part.any() == columns
    np.testing.assert_array_equal(query.predict(), model.predict())


def known_in_part(model):
    said = (model._data.evidence != 0).any(1) & (model._data.label == -1)
    return said


def with_a_new_type():
    adata = some_cells()
    adata.obs["fine"] = adata.obs["fine"].replace({"NK": "newer"})
    return adata


def test_a_rate_of_errors_takes_new_labels():
    model = train(made(some_cells(), "fine", {}, label_noise="rate"))
    query = SCANVI.load_query_data(with_a_new_type(), model, extend_labels=["newer"])
    before, after = (m.module.label_noise.confusion({})[0] for m in (model, query))
    assert after.shape == (4, 4) and torch.equal(before[0, 0], after[0, 0])
    torch.testing.assert_close(after.sum(-1), torch.ones(4))
    assert np.isfinite(train(query).history["elbo"]).all()


@pytest.mark.parametrize("kind", ["learned", "dirichlet", partial(FixedNoise, matrix=RIGHT)])
def test_a_matrix_takes_no_new_labels(kind):
    """Before the AnnData is touched; a reference that knows the names needs none."""
    model = as_they_are(made(some_cells(), "fine", {}, label_noise=kind))
    new = with_a_new_type()
    with pytest.raises(InputError, match=r"labels=\[...\]\), or one with label_noise='rate'"):
        SCANVI.load_query_data(new, model, extend_labels=["newer"])
    assert "pyro_scanvi" not in new.uns
    if isinstance(kind, str):
        knows = as_they_are(made(some_cells(), "fine", {"labels": ["newer"]}, label_noise=kind))
        query = SCANVI.load_query_data(new, knows)
        assert (query.predict() == knows.predict()).all()


def test_new_labels_are_not_called_as_sets(model):
    with pytest.raises(InputError, match="'lymphoid' is a set of labels of the reference"):
        SCANVI.load_query_data(some_cells(), model, extend_labels=["lymphoid"])
