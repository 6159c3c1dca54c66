"""Predictive checks against draws taken by hand, and against a model that cannot fit."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from pyro.distributions import Normal, Poisson
from scipy.stats import binom

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.criticism.predictive import posterior_predictive_checks
from tests.examples import as_they_are, simulated

RUN = {"n_draws": 20, "seed": 0, "progress_bar": False}


class Known(SCANVAE):
    """Counts are Poisson of means that do not depend on the cell."""

    rates = torch.linspace(0.2, 6.0, 20)

    def p_x(self, z, library, y, cells):
        return Poisson(self.rates.expand(*z.shape[:-1], -1)).to_event(1)


class Measured(Known):
    """A second modality that some cells lack."""

    def observed(self, z, library, y, cells):
        given = cells.extra["protein"]
        p = Normal(torch.zeros(2), 1.0).expand(given.shape)
        p = p.mask(~given.isnan()).to_event(1)
        return super().observed(z, library, y, cells) | {"protein": (p, given.nan_to_num())}


def known(module_class=Known, extra=None, n=300) -> SCANVI:
    adata = simulated(n)
    rng = np.random.default_rng(3)
    adata.X = rng.poisson(Known.rates.numpy(), size=(n, 20)).astype(np.float32)
    adata.X[:, 19] += adata.X.sum(1) == 0
    adata.obs["batch"] = np.array(["one", "two"])[np.arange(n) % 2]
    adata.obsm["protein"] = rng.normal(size=(n, 2)).astype(np.float32)
    adata.obsm["protein"][::3] = np.nan
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", extra=extra)
    return as_they_are(SCANVI(adata, module_class=module_class, n_hidden=4, n_latent=2))


@pytest.fixture(scope="module")
def model():
    return known()


def test_statistics_are_those_of_the_data(model):
    checks = posterior_predictive_checks(model, by="batch", batch_size=70, **RUN)
    x = np.asarray(model.adata.X, dtype=np.float64)
    groups = {"all": slice(None), "one": slice(0, None, 2), "two": slice(1, None, 2)}
    for group, cells in groups.items():
        for statistic, expected in {
            "zeros": (x[cells] == 0).mean(0),
            "mean": x[cells].mean(0),
            "variance": x[cells].var(0, ddof=1),
        }.items():
            table = checks.features
            rows = table[(table["statistic"] == statistic) & (table["group"] == group)]
            assert list(rows["feature"]) == list(model.fields.genes)
            np.testing.assert_allclose(rows["observed"], expected, rtol=1e-9)
    totals = checks.totals.query("group == 'one'").set_index("statistic")["observed"]
    of_cells = x[::2].sum(1)
    expected = [of_cells.mean(), of_cells.std(), *np.quantile(of_cells, [0.05, 0.5, 0.95])]
    np.testing.assert_allclose(totals, expected)


def test_draws_have_the_moments_of_the_model(model):
    """Of Poisson counts in 300 cells and 20 draws; 60 z values, fails for one seed in 1,000."""
    rows = posterior_predictive_checks(model, **RUN).features.set_index("statistic")
    rates, n = Known.rates.numpy(), 300 * 20
    zeros = np.exp(-rates)
    for statistic, mean, variance in (
        ("mean", rates, rates / n),
        ("zeros", zeros, zeros * (1 - zeros) / n),
        ("variance", rates, (rates + 2 * rates**2) / n),
    ):
        z = (rows.loc[statistic, "mean"] - mean) / np.sqrt(variance)
        assert np.abs(z).max() < 4.2


def test_a_model_that_is_true_is_covered_as_said(model):
    """Its states say nothing of the counts: coverage of 6,000 values, one seed in 1,000."""
    found = posterior_predictive_checks(model, **RUN).coverage
    for level, rows in found.groupby("level"):
        covered = round(float((rows["coverage"] * 300).sum()))
        low, high = binom.ppf([0.0005, 0.9995], 300 * 20, level)
        assert low <= covered <= high


def test_a_model_that_cannot_have_the_zeros_fails():
    model = known()
    adata = model.adata.copy()
    adata.X[:, 10:] *= np.random.default_rng(0).random((300, 10)) < 0.5  # dropout
    adata.X[:, 0] += 1
    checks = posterior_predictive_checks(model, adata, **RUN)
    zeros = checks.features.query("statistic == 'zeros'").set_index("feature")
    assert (zeros["p"].iloc[10:] == 0).all() and (zeros["z"].iloc[10:] > 5).all()
    assert zeros["p"].iloc[0] == 1.0  # it has none
    assert (checks.totals.set_index("statistic").loc[["mean", "quantile 0.5"], "p"] == 1).all()


def test_what_was_not_measured_does_not_count():
    model = known(Measured, {"protein": "obsm/protein"}, n=60)
    checks = posterior_predictive_checks(model, **RUN)
    rows = checks.features.query("site == 'protein' and statistic == 'mean'")
    given = model.adata.obsm["protein"]
    np.testing.assert_allclose(rows["observed"], np.nanmean(given, 0), rtol=1e-5)
    assert rows["mean"].abs().max() < 4 / np.sqrt(40 * 20) * 1.2
    total = checks.totals.query("site == 'protein' and statistic == 'sd'")["observed"]
    np.testing.assert_allclose(total, np.nanstd(given.sum(1)), rtol=1e-5)


def test_what_is_asked_wrongly_is_refused(model):
    with pytest.raises(InputError, match="'celltype' is not a column of obs"):
        posterior_predictive_checks(model, by="celltype")
    with pytest.raises(InputError, match="interval=2"):
        posterior_predictive_checks(model, interval=2)
    checks = posterior_predictive_checks(model, indices=[0, 1, 2], **(RUN | {"n_draws": 2}))
    with pytest.raises(InputError, match="'B' is not a group"):
        checks.plot_zeros(group="B")


def test_plots_show_the_tables(model):
    checks = posterior_predictive_checks(model, indices=range(50), **RUN)
    _, axes = plt.subplots(4)
    assert checks.plot_zeros(ax=axes[0]).get_xlabel() == "share of zeros, observed"
    assert len(checks.plot_mean_variance(ax=axes[1]).lines[-1].get_xdata()) == 20
    assert checks.plot_totals(ax=axes[2]) is axes[2]
    assert sum(bar.get_height() for bar in checks.plot_p_values(ax=axes[3]).patches) == 20
    plt.close()


def test_a_seed_repeats_the_checks(model):
    run = RUN | {"indices": range(40)}
    one, two = (posterior_predictive_checks(model, **run) for _ in range(2))
    assert one.features.equals(two.features) and one.coverage.equals(two.coverage)
