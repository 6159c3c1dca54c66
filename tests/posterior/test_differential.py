"""Differential expression: recovery of simulated changes, draws of groups, and what is refused."""

import copy
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.data.minibatches import CellData
from pyro_scanvi.posterior import differential

CHANGE = ["proba_de", "proba_not_de", "bayes_factor", "scale1", "scale2", "pseudocounts", "delta"]
CHANGE += ["lfc_mean", "lfc_median", "lfc_std", "lfc_min", "lfc_max"]
VANILLA = ["proba_m1", "proba_m2", "bayes_factor", "scale1", "scale2"]
RAW = ["raw_mean1", "raw_mean2", "non_zeros_proportion1", "non_zeros_proportion2"]
RAW += ["raw_normalized_mean1", "raw_normalized_mean2"]
NAMES = ["comparison", "group1", "group2"]
N_GENES = 100
UP, DOWN = slice(0, 10), slice(10, 20)  # 4-fold between the types
ONE, TWO = slice(20, 25), slice(25, 30)  # 4-fold between the batches; the other genes are the same
TYPE_GENES = [f"gene{i}" for i in range(20)]
BATCH_GENES = [f"gene{i}" for i in range(20, 30)]


def simulated_changes(seed: int = 0, n: int = 400) -> ad.AnnData:
    """Types A and B, 10 genes up in each; batches one and two, 5 genes up in each.

    What goes up in one has the mean of what goes up in the other: no gene changes its share of
    the counts because others do.
    """
    rng = np.random.default_rng(seed)
    base = 4 * np.exp(0.7 * rng.normal(size=N_GENES))
    base[DOWN], base[TWO] = base[UP], base[ONE]
    means = np.tile(base, (n, 1))
    is_a, is_two = np.arange(n) % 2 == 0, np.arange(n) // 2 % 2 == 1
    for cells, genes in ((is_a, UP), (~is_a, DOWN), (~is_two, ONE), (is_two, TWO)):
        means[cells, genes] *= 4
    counts = rng.poisson(means * rng.gamma(20, 1 / 20, size=(n, 1))).astype(np.float32)
    obs = {"cell_type": np.where(is_a, "A", "B"), "batch": np.where(is_two, "two", "one")}
    names = [f"cell{i}" for i in range(n)]
    genes = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
    adata = ad.AnnData(csr_matrix(counts), pd.DataFrame(obs, index=names), genes)
    adata.obs.loc[rng.random(n) < 0.3, "cell_type"] = "Unknown"
    adata.obs["truth"] = np.where(is_a, "A", "B")
    adata.obs["cluster"] = np.arange(n) % 3
    return adata


def trained(seed: int = 0) -> SCANVI:
    adata = simulated_changes(seed)
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key="batch")
    model = SCANVI(adata, seed=seed, n_hidden=32, n_latent=4)
    return model.train(30, batch_size=50, plan_kwargs={"lr": 5e-3}, progress_bar=False)


@pytest.fixture(scope="module")
def model():
    """A trained model; the tests only read it."""
    return trained()


@pytest.fixture
def asked(model):
    """The method of the trained model, quiet and with few draws."""
    return partial(
        model.differential_expression, delta=0.5, silent=True, n_samples_overall=600, seed=0
    )


# ---- draws --------------------------------------------------------------------------------------


def test_outliers_are_left_out():
    """Ten of a hundred cells lie far away."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(100, 3))
    latent[::10] += 30
    kept = differential.without_outliers(np.arange(100) + 5, latent)
    np.testing.assert_array_equal(kept, [i + 5 for i in range(100) if i % 10])
    with pytest.warns(UserWarning, match="6 cells are too few"):
        assert len(differential.without_outliers(np.arange(6), latent[:6])) == 6


class Told:
    """In place of draws: the position of each cell, and the batch it is decoded in."""

    def __init__(self, vae, cells, n_samples):
        self.cells = cells

    def decode(self, batch):
        own = self.cells.batch
        decoded = own if batch is None else torch.full_like(own, batch)
        self.rho = torch.stack([self.cells.x[:, 0], decoded.float()], -1).unsqueeze(0)
        return self


@pytest.mark.parametrize("batches", [[None], [1], [2, 0], [0, 1, 2]])
def test_every_cell_is_drawn_as_often_and_batches_come_in_order(model, monkeypatch, batches):
    monkeypatch.setattr(differential, "Draws", Told)
    told = np.arange(20, dtype=np.float32)[:, None]
    data = CellData(csr_matrix(told), batch=np.full(20, 1), label=np.zeros(20, dtype=int))
    cells = np.array([3, 8, 11, 19])
    found = differential.expression_draws(model.module, data, cells, batches, 30, batch_size=7)
    drawn, times = np.unique(found[:, 0], return_counts=True)
    np.testing.assert_array_equal(drawn, cells)
    assert sorted(times) == [7, 7, 8, 8]
    assert (np.diff(found[:, 0]) < 0).any()  # in no order, so that pairs are independent
    expected = np.repeat([1 if b is None else b for b in batches], 30 // len(batches))
    np.testing.assert_array_equal(found[:, 1], expected)


# ---- a trained model ----------------------------------------------------------------------------


def false_share(table: pd.DataFrame, true_genes: list[str]) -> float:
    calls = table.index[table["is_de_fdr_0.05"]]
    return float((~calls.isin(true_genes)).mean()) if len(calls) else 0.0


@pytest.mark.parametrize("mode", ["change", "vanilla"])
def test_simulated_changes_are_recovered(asked, mode):
    """None of 24 other seeds of data and model fails here."""
    table = asked(groupby="truth", group1="A", mode=mode)
    truth = pd.Series(0, index=table.index)
    truth[TYPE_GENES[UP]], truth[TYPE_GENES[DOWN]] = 1, -1
    if mode == "vanilla":
        assert roc_auc_score(truth == 1, table["bayes_factor"]) > 0.98
        assert roc_auc_score(truth == -1, -table["bayes_factor"]) > 0.98
        assert table["bayes_factor"].is_monotonic_decreasing
        return
    assert roc_auc_score(truth != 0, table["proba_de"]) > 0.99
    assert false_share(table, TYPE_GENES) < 0.2
    assert table.loc[truth != 0, "is_de_fdr_0.05"].mean() > 0.9
    np.testing.assert_allclose(table["lfc_mean"][truth != 0], 2 * truth[truth != 0], atol=1)
    assert table["proba_de"].is_monotonic_decreasing


def test_halves_of_a_type_do_not_differ(asked, model):
    """None of 24 other seeds fails here."""
    half = np.random.default_rng(0).random(400) < 0.5
    is_a = (model.adata.obs["truth"] == "A").to_numpy()
    table = asked(idx1=half & is_a, idx2=~half & is_a)
    assert not table["is_de_fdr_0.05"].any()
    assert table["lfc_mean"].abs().max() < 0.3


def test_a_batch_effect_goes_with_batch_correction(asked):
    """Cells of one type in batch one against those in batch two: they differ by batch alone.

    None of 24 other seeds fails here.
    """
    batches = {"idx1": "truth == 'A' and batch == 'one'", "idx2": "truth == 'A' and batch == 'two'"}
    raw, corrected = asked(**batches), asked(**batches, batch_correction=True)
    assert raw.loc[BATCH_GENES, "is_de_fdr_0.05"].mean() > 0.9
    assert false_share(raw, BATCH_GENES) < 0.15
    assert not corrected["is_de_fdr_0.05"].any()
    assert corrected.loc[BATCH_GENES, "lfc_mean"].abs().max() < 0.5
    # Draws of different batches differ by 2 in log2 already.
    assert corrected.loc[BATCH_GENES, "lfc_std"].max() < 1
    crossed = asked(**batches, batch_correction=True, batchid1=["one"], batchid2="two")
    assert crossed.loc[BATCH_GENES, "is_de_fdr_0.05"].mean() > 0.9
    swapped = asked(**batches, batch_correction=True, batchid1=["two"], batchid2=["one"])
    difference = crossed["lfc_mean"] + swapped["lfc_mean"]
    assert difference.loc[BATCH_GENES].abs().max() < 0.7


@pytest.mark.parametrize("all_stats", [True, False])
def test_columns_are_those_of_scvi_tools(asked, all_stats):
    raw = RAW if all_stats else []
    change = asked(groupby="truth", all_stats=all_stats, fdr_target=0.1)
    assert list(change) == [*CHANGE, *raw, "is_de_fdr_0.1", *NAMES]
    vanilla = asked(groupby="truth", all_stats=all_stats, mode="vanilla")
    assert list(vanilla) == [*VANILLA, *raw, *NAMES]
    by_cells = asked(idx1=[0, 1], all_stats=all_stats)
    assert list(by_cells) == [*CHANGE, *raw, "is_de_fdr_0.05"]
    assert list(change["comparison"].unique()) == ["A vs Rest", "B vs Rest"]
    assert (change["group2"] == "Rest").all() and change.index.nunique() == N_GENES


def test_raw_columns_are_of_the_right_group(asked, model):
    table = asked(groupby="truth", group1="B").loc[model.adata.var_names]
    counts = pd.DataFrame(model.adata.X.toarray()).groupby(model.adata.obs["truth"].to_numpy())
    means, shares = counts.mean(), counts.agg(lambda x: (x > 0).mean())
    np.testing.assert_allclose(table["raw_mean1"], means.loc["B"], rtol=1e-5)
    np.testing.assert_allclose(table["raw_mean2"], means.loc["A"], rtol=1e-5)
    np.testing.assert_allclose(table["non_zeros_proportion1"], shares.loc["B"], rtol=1e-5)


def test_seeds(asked):
    """The same seed gives the same table, whichever other groups are asked for."""
    ask = partial(asked, groupby="truth")
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    both = ask()
    assert torch.equal(torch.random.get_rng_state(), before)
    pd.testing.assert_frame_equal(both, ask())
    pd.testing.assert_frame_equal(both[both["group1"] == "B"], ask(group1="B"))
    assert not both["lfc_mean"].equals(ask(seed=1)["lfc_mean"])
    unseeded = ask(seed=None)
    assert not unseeded.equals(ask(seed=None))


def test_the_model_and_the_data_stay_as_they_are(asked, model):
    before = copy.deepcopy(model.module.state_dict()), model.adata.obs.copy()
    twin = copy.deepcopy(model)
    twin.module.train()
    found = twin.differential_expression(**asked.keywords, groupby="truth")
    pd.testing.assert_frame_equal(found, asked(groupby="truth"))
    assert twin.module.training
    for name, value in twin.module.state_dict().items():
        np.testing.assert_array_equal(value, before[0][name])
    pd.testing.assert_frame_equal(twin.adata.obs, before[1])


def test_other_cells_and_a_bar(model, capsys):
    """The groups are those of the cells that are given."""
    other = model.adata[40:90].copy()
    other.obs["mine"] = np.where(np.arange(50) < 20, "x", "y")
    table = model.differential_expression(other, groupby="mine", group1="x", n_samples_overall=50)
    expected = other.X[:20].mean(axis=0)
    np.testing.assert_allclose(table.loc[other.var_names, "raw_mean1"], np.ravel(expected), 1e-5)
    assert "Differential expression" in capsys.readouterr().out


def test_outliers_are_not_drawn(asked, model, monkeypatch):
    """Draws are of the cells that are kept, raw statistics of all."""
    seen = []

    def first_half(cells, latent):
        assert latent.shape == (len(cells), 4)
        return cells[: len(cells) // 2]

    def draws(vae, data, cells, *rest):
        seen.append(cells)
        return original(vae, data, cells, *rest)

    original = differential.expression_draws
    monkeypatch.setattr(differential, "without_outliers", first_half)
    monkeypatch.setattr(differential, "expression_draws", draws)
    table = asked(groupby="truth", group1="A", filter_outlier_cells=True)
    assert [len(cells) for cells in seen] == [100, 100]
    monkeypatch.undo()
    found = asked(groupby="truth", group1="A", filter_outlier_cells=True)
    pd.testing.assert_series_equal(table["raw_mean1"].sort_index(), found["raw_mean1"].sort_index())
    assert found.loc[TYPE_GENES, "is_de_fdr_0.05"].all()


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groupby": "truht"}, "did you mean 'truth'"),
        ({"mode": "chnge"}, "'chnge' is not a mode; did you mean 'change'"),
        ({"test_mode": "four"}, "'four' is not a test_mode"),
        ({"delta": -0.1}, "delta=-0.1, expected"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"fdr_target": 0}, "fdr_target=0, expected a share"),
        ({"fdr_target": 1.5}, "fdr_target=1.5"),
        ({"pseudocounts": 0}, "pseudocounts=0, expected a positive"),
        ({"weights": "importance"}, "weights='importance' is not supported.*prior of z"),
        ({"batchid1": ["one"]}, "batchid1 is given, but batch_correction is False"),
        (
            {"batch_correction": True, "batchid1": ["tow"]},
            "batchid1: the model does not know 'tow'; did you mean 'two'",
        ),
        ({"batch_correction": True, "batchid1": ["one"]}, "share batches but are not the same"),
        ({"batch_correction": True, "batchid1": []}, "batchid1 is empty"),
    ],
)
def test_arguments_that_are_refused(asked, arguments, message):
    with pytest.raises(InputError, match=message):
        asked(**({"groupby": "truth"} | arguments))


def test_sizes_that_are_refused(asked):
    for arguments in ({"n_samples_overall": 0}, {"n_samples_overall": 1, "batch_correction": True}):
        with pytest.raises(ValueError, match="n_samples_overall=.*expected an integer of at least"):
            asked(groupby="truth", **arguments)
    with pytest.raises(ValueError, match="seed=-1"):
        asked(groupby="truth", seed=-1)
