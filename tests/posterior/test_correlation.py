"""Correlation of genes: block by block against numpy and scipy, what is correlated, and memory."""

import tracemalloc

import numpy as np
import pytest
import scipy.stats

from pyro_scanvi import SCANVI, InputError
from pyro_scanvi.posterior import correlation, draws
from tests.posterior.examples import BATCHES, G, N, certain, decoded


def blocks_of(values: np.ndarray, size: int = 7):
    return (values[i : i + size] for i in range(0, len(values), size))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_pearson_of_blocks(offset):
    """Against numpy; sums of squares would leave no digit at this offset."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) * 1e-2 + offset
    found = correlation.pearson(blocks_of(values), *values.shape)
    np.testing.assert_allclose(found, np.corrcoef(values, rowvar=False), atol=1e-9)


def test_spearman_of_blocks(monkeypatch):
    """Against scipy, with many equal values; in passes of 10 rows."""
    rng = np.random.default_rng(0)
    values = np.rint(np.exp(rng.normal(size=(501, 6)) @ rng.normal(size=(6, 6))))
    monkeypatch.setattr(correlation, "LARGEST_PASS", 60)
    found = correlation.spearman(blocks_of(values.astype(np.float32)), *values.shape)
    np.testing.assert_allclose(found, scipy.stats.spearmanr(values).statistic, atol=1e-10)


@pytest.mark.parametrize("correlate", correlation.CORRELATIONS.values())
def test_columns_that_do_not_vary(correlate):
    values = np.random.default_rng(0).normal(size=(20, 3))
    values[:, 1] = 0
    found = correlate(blocks_of(values), 20, 3)
    assert np.isnan(found[1]).all() and np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(np.diag(found)[[0, 2]], 1)


def samples_of(model: SCANVI, batch: int | None = None, **changes) -> np.ndarray:
    """What is correlated, (S N, G)."""
    settings = {"n_samples": 10, "size_factor": 1000.0, "batches": [batch]} | changes
    with draws.seeded(0):
        return correlation.correlation_of_genes(
            model.module, model._data, 64, lambda blocks, *_: np.concatenate([*blocks]), **settings
        )


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_correlation_of_genes(models, kind):
    """Against numpy and scipy on the same samples."""
    model = models[kind]
    samples = samples_of(model).astype(float)
    expected = {
        "pearson": np.corrcoef(samples, rowvar=False),
        "spearman": scipy.stats.spearmanr(samples).statistic,
    }
    for name, matrix in expected.items():
        found = model.get_feature_correlation_matrix(correlation_type=name, seed=0)
        assert list(found.index) == list(found.columns) == list(model.adata.var_names)
        np.testing.assert_allclose(found, matrix, atol=1e-8)


def test_correlations_of_batches_are_averaged(models):
    """Where nothing is drawn."""
    model = certain(models["poisson"])
    singles = [model.get_feature_correlation_matrix(transform_batch=b) for b in BATCHES]
    found = model.get_feature_correlation_matrix(transform_batch=BATCHES)
    np.testing.assert_allclose(found, np.mean(singles, axis=0), atol=1e-4)
    assert not np.allclose(singles[0], singles[1], atol=1e-3)


def test_denoised_samples_are_gamma(models):
    """Mean size rho, variance mean^2 / theta: means of standardised draws and squares.

    Each over 1,200 pairs of cell and gene, within 6 errors: false-alarm rate below 1e-5.
    """
    model = certain(models["nb"])
    px = decoded(model)
    mean, theta = px.mu.numpy() * 500, px.theta.numpy()
    samples = samples_of(model, n_samples=1000, size_factor=500.0).reshape(-1, N, G)
    standard = (samples - mean) / (mean / np.sqrt(theta))
    squares = standard**2
    assert (np.abs(standard.mean(0)) < 6 * standard.std(0) / np.sqrt(1000)).all()
    assert (np.abs(squares.mean(0) - 1) < 6 * squares.std(0) / np.sqrt(1000)).all()


def test_a_poisson_has_no_gamma_noise(models):
    model = certain(models["poisson"])
    samples = samples_of(model, n_samples=1, size_factor=500.0)
    np.testing.assert_allclose(samples, decoded(model).mu * 500, rtol=1e-4)


@pytest.mark.parametrize("name", correlation.CORRELATIONS)
def test_memory_grows_with_genes_only(name, monkeypatch):
    """100 genes: 8 times the rows, which all together would take 2.8 MB more."""
    monkeypatch.setattr(correlation, "LARGEST_PASS", 2**14)
    rng, peaks = np.random.default_rng(0), []
    for n_rows in (1024, 8192):
        blocks = (rng.normal(size=(64, 100)).astype(np.float32) for _ in range(n_rows // 64))
        tracemalloc.start()
        correlation.CORRELATIONS[name](blocks, n_rows, 100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_gene_ranked = 8192 * 64
    assert peaks[1] - peaks[0] < {"pearson": 1e5, "spearman": one_gene_ranked}[name]


def test_the_temporary_file_is_removed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model.get_feature_correlation_matrix()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of(model, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="GiB of disk.*TMPDIR"):
        model.get_feature_correlation_matrix()
    model.get_feature_correlation_matrix(correlation_type="pearson")
