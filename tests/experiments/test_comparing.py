"""Settings are trained on the same cells, scored by hand, refused before anything is trained."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from pyro_scanvi import ELBO, InputError, SemiSupervisedELBO
from pyro_scanvi.experiments import (
    TABLES,
    Settings,
    against,
    compare,
    plot_comparison,
    plot_differences,
)
from pyro_scanvi.experiments.comparing import DEFAULT, GIVEN, HIDDEN, _Trials
from tests.examples import SMALL, simulated

METRICS = {"accuracy", "macro_f1", "calibration_error", "elbo", "marginal_ll", "seconds"}
COMMON = Settings(SMALL, {"max_epochs": 1, "batch_size": 32, "plan_kwargs": {"lr": 1e-2}})


def quick(settings, adata=None, seeds=(0, 1), **changes):
    adata = simulated(60) if adata is None else adata
    changes = {"truth": "truth", "common": COMMON, "n_mc_samples": 2} | changes
    return compare(settings, adata, seeds, progress_bar=False, **changes)


@pytest.fixture(scope="module")
def compared():
    plan = {"n_epochs_kl_warmup": 5}
    return quick({"a": Settings(), "same": Settings(), "b": Settings(train={"plan_kwargs": plan})})


def test_equal_settings_are_equal_to_the_bit(compared):
    """Cells, hidden labels, first weights and draws are those of the seed."""
    assert list(compared) == ["seed", "setting", "metric", "value"]
    assert set(compared["metric"]) == METRICS and compared["value"].notna().all()
    found = against(compared, "a").set_index(["setting", "metric"])["difference"]
    assert (found["same"].drop("seconds") == 0).all()
    assert found["b", "elbo"] != 0
    wide = compared.pivot(index="seed", columns=["setting", "metric"], values="value")
    assert wide["a", "elbo"].nunique() == 2


def test_pictures(compared):
    assert plot_comparison(compared, "elbo").get_xlabel() == "elbo"
    axis = plot_differences(compared, "a", "elbo")
    assert [t.get_text() for t in axis.get_yticklabels()] == ["same", "b"]
    with pytest.raises(InputError, match="metric='loss', the table has accuracy"):
        plot_comparison(compared, "loss")


def test_scores_by_hand():
    """The labels that were hidden, as scikit-learn counts them; held-out cells are others."""
    adata = simulated(60)
    trial = _Trials(adata, "truth", 5, 0.25, {}, 3)(1, DEFAULT)
    assert len(trial.held_out) == 15 and len(trial.training) == 45
    assert not set(trial.held_out.obs_names) & set(trial.training.obs_names)
    shown = trial.training.obs[GIVEN] != HIDDEN
    assert (trial.training.obs.loc[shown, GIVEN] == trial.training.obs.loc[shown, "truth"]).all()
    assert shown.sum() == 15
    model = trial.train(trial.model(COMMON), COMMON)
    found = dict(trial.scores(model))
    predicted = np.asarray(model.predict(method="classifier"))[~shown].astype(str)
    truth = trial.training.obs["truth"].to_numpy()[~shown].astype(str)
    assert found["accuracy"] == pytest.approx((predicted == truth).mean())
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert found["elbo"] == model.get_elbo(trial.held_out, seed=1)


def test_settings_go_over_common_ones_key_by_key():
    mine = Settings({"n_latent": 3}, {"max_epochs": 7, "plan_kwargs": {"eps": 1e-8}})
    merged = mine.over(COMMON)
    assert merged.model == SMALL | {"n_latent": 3}
    plan = {"lr": 1e-2, "eps": 1e-8}
    assert merged.train == {"max_epochs": 7, "batch_size": 32, "plan_kwargs": plan}
    assert COMMON.train["plan_kwargs"] == {"lr": 1e-2}


def test_the_anndata_stays_as_it_is():
    adata = simulated(60)
    obs, uns = adata.obs.copy(), dict(adata.uns)
    quick({"a": Settings()}, adata, seeds=(0,))
    assert adata.obs.equals(obs) and adata.uns == uns


def test_every_row_of_every_table_can_be_trained():
    """None is refused, and all start from the baseline of one name."""
    trial = _Trials(simulated(60), "truth", 5, 0.25, {}, 2)(0, DEFAULT)
    for table in TABLES.values():
        assert "default" in table
        for row in table.values():
            merged = row.over(Settings(SMALL, {}))
            train = {**merged.train, "max_epochs": 0, "pretrain_epochs": 0}
            trial.train(trial.model(merged), Settings(train=train))


@pytest.mark.parametrize(
    "settings, changes, error, message",
    [
        ({}, {}, InputError, "expected Settings by name"),
        ({"a": {"lr": 1}}, {}, InputError, "expected Settings by name"),
        ({"a": Settings()}, {"truth": "label"}, InputError, "not a column of obs"),
        ({"a": Settings()}, {"held_out": 1.0}, InputError, "held_out=1.0"),
        ({"a": Settings()}, {"n_per_label": 0}, InputError, "n_per_label=0"),
        ({"a": Settings()}, {"seeds": (1, 1)}, InputError, "seeds"),
        ({"a": Settings(train={"checkpoint_dir": "x"})}, {}, InputError, "share checkpoint_dir"),
        ({"a": Settings({"n_latent": 0})}, {}, InputError, "n_latent=0"),
        ({"a": Settings(train={"plan_kwargs": {"lrr": 1}})}, {}, TypeError, "did you mean 'lr'"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, changes, error, message):
    with pytest.raises(error, match=message):
        quick(settings, **changes)


def test_an_error_says_which_setting_and_that_nothing_was_trained(monkeypatch):
    calls = []
    monkeypatch.setattr("pyro_scanvi.experiments.comparing._measured", calls.append)
    with pytest.raises(InputError) as error:
        quick({"good": Settings(), "bad": Settings(train={"batch_size": 0})})
    assert error.value.__notes__ == ["setting 'bad'; nothing was trained yet"] and not calls


class NotANumber(SemiSupervisedELBO):
    def bound(self, model_trace, guide_trace):
        return super().bound(model_trace, guide_trace) * float("nan")


def test_a_run_that_is_not_finite_is_missing_and_the_others_go_on():
    broken = Settings(train={"objective": ELBO(kind=NotANumber)})
    with pytest.warns(UserWarning, match="seed 0 of 'broken' was not trained to its end"):
        found = quick({"broken": broken, "a": Settings()}, seeds=(0,))
    values = found.set_index(["setting", "metric"])["value"]
    assert values["broken"].isna().all() and values["a"].notna().all()
    with pytest.raises(InputError, match="do not share"):
        against(pd.concat([found, found.assign(seed=1).fillna(0)]), "a")


def count_given(trial, model):
    yield "given", (trial.training.obs[GIVEN] != HIDDEN).sum()
    yield "labels", model.module.n_labels


def test_a_setting_may_tell_more_of_the_cells_and_scores_are_an_argument():
    def without_b(adata, seed):
        labels = adata.obs[GIVEN].astype(str)
        adata.obs[GIVEN] = labels.where(labels != "B", HIDDEN)
        return {"labels": ["B", f"of {seed}"]}

    rows = {"a": Settings(), "without B": Settings(prepare=without_b)}
    found = quick(rows, n_per_label=5, score=count_given)
    values = found.pivot_table("value", "setting", "metric")
    assert values["given"].to_dict() == {"a": 15, "without B": 10}
    assert values["labels"].to_dict() == {"a": 3, "without B": 4}


def test_missing_labels_are_refused():
    adata = simulated(60)
    adata.obs.loc["cell3", "truth"] = None
    with pytest.raises(InputError, match="lacks 1 labels"):
        quick({"a": Settings(train={"objective": ELBO()})}, adata)
