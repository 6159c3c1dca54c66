"""Intervals against scipy; pairs; what is refused."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pyro_scanvi import InputError
from pyro_scanvi.experiments import against, bootstrap_interval, markdown, summary, t_interval
from pyro_scanvi.experiments.intervals import check_seeds, tidy

VALUES = np.random.default_rng(0).gamma(2.0, size=40)


def frame(settings=("a", "b"), seeds=range(5), metrics=("accuracy", "elbo")) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = [
        {"seed": seed, "setting": setting, "metric": metric, "value": rng.normal() + 10 * seed}
        for seed in seeds
        for setting in settings
        for metric in metrics
    ]
    return tidy(rows)


def values(table, setting, metric):
    return table.query("setting == @setting and metric == @metric")["value"].to_numpy()


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_students_interval_is_that_of_scipy(level):
    expected = stats.ttest_1samp(VALUES, 0).confidence_interval(level)
    np.testing.assert_allclose(t_interval(VALUES, level), expected)


def test_the_bootstrap_is_that_of_scipy():
    """Two of 2,000 resamples differ by less than a tenth of the width but in 1e-6 of seeds."""
    percentiles = stats.bootstrap(
        (VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    found, width = bootstrap_interval(VALUES), percentiles.high - percentiles.low
    np.testing.assert_allclose(found, percentiles, atol=0.1 * width)
    assert bootstrap_interval(VALUES) == found


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
def test_one_value_has_no_interval(interval):
    assert np.isnan(interval(np.array([1.0]))).all()


def test_values_are_averaged_within_a_unit_first():
    table = frame()
    again = pd.concat([table, table.assign(value=table["value"] + 2)])
    found, expected = summary(again), summary(table)
    assert (found["n"] == 5).all()
    for column in ("mean", "low", "high"):
        np.testing.assert_allclose(found[column], expected[column] + 1)


def test_differences_are_those_of_pairs():
    """Seeds differ by tens, settings of a seed by ones: the paired interval does not see seeds."""
    table = frame()
    found = against(table, "a").set_index("metric")
    for metric in ("accuracy", "elbo"):
        test = stats.ttest_rel(values(table, "b", metric), values(table, "a", metric))
        expected = test.confidence_interval(0.95)
        np.testing.assert_allclose(found.loc[metric, ["low", "high"]].tolist(), expected)
    assert (found["high"] - found["low"] < 10).all() and (found["setting"] == "b").all()


def test_what_one_setting_lacks_altogether_is_left_out():
    table = frame(metrics=("accuracy", "elbo"))
    without = table[~((table["setting"] == "b") & (table["metric"] == "elbo"))]
    assert against(without, "a")["metric"].tolist() == ["accuracy"]
    assert against(table[table["setting"] == "a"], "a").empty


def test_seeds_that_are_not_shared_are_refused():
    table = frame().drop(index=0)
    with pytest.raises(InputError, match="'b' and 'a' do not share seed 0; compare"):
        against(table, "a")


def test_bad_tables_are_refused():
    with pytest.raises(InputError, match="'c' is not a setting of the table"):
        against(frame(), "c")
    with pytest.raises(InputError, match="no column cell"):
        summary(frame(), unit="cell")
    with pytest.raises(InputError, match="level=95"):
        summary(frame(), level=95)


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1], [0.5]])
def test_bad_seeds_are_refused(seeds):
    with pytest.raises(InputError, match="seed"):
        check_seeds(seeds)
    assert check_seeds(np.arange(2)) == [0, 1]


def test_a_table_in_markdown():
    assert markdown(summary(frame())).splitlines()[1] == "|---|---|---|---|---|---|"
