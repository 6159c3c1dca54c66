"""A model of counts that stay on the disk: trained, asked, written back; in how much memory."""

import subprocess
import sys

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix, vstack

from pyro_scanvi import SCANVI
from pyro_scanvi.data import on_disk
from tests.examples import simulated, small_model


@pytest.fixture
def path(tmp_path):
    adata = simulated()
    adata.X = csr_matrix(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_answers_are_those_in_memory(path):
    """Of one model, to the bit; where cells, genes and labels are read, and where new cells are."""
    model = small_model(ad.read_h5ad(path)).train(2, progress_bar=False)
    model.save(path.parent / "model")
    adata = ad.read_h5ad(path, backed="r")
    opened = SCANVI.load(path.parent / "model", adata)
    for given in (None, adata):
        expected, found = model.predict(given, soft=True), opened.predict(given, soft=True)
        pd.testing.assert_frame_equal(found, expected)
    some = {"indices": [7, 3, 100]}
    pd.testing.assert_frame_equal(opened.predict(soft=True, **some), expected.iloc[[7, 3, 100]])
    z = [m.get_latent_representation() for m in (model, opened)]
    np.testing.assert_array_equal(*z)
    tables = [
        m.differential_expression(group1="B", groupby="cell_type", silent=True).sort_index()
        for m in (model, opened)
    ]
    pd.testing.assert_series_equal(*(t["raw_mean1"] for t in tables))
    query = SCANVI.load_query_data(adata, model)
    pd.testing.assert_frame_equal(query.predict(soft=True), expected)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(on_disk, "WINDOW", 48)
    monkeypatch.setattr(on_disk, "BLOCK", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("small_windows")
def test_training_learns_as_in_memory(path):
    """Types that differ clearly are told in both; what a cell costs is the same within a tenth."""
    settings = {"max_epochs": 10, "batch_size": 16, "class_balanced": True}
    found = {}
    for name, adata in (("disk", ad.read_h5ad(path, backed="r")), ("memory", ad.read_h5ad(path))):
        model = small_model(adata).train(**settings, pretrain_epochs=1, progress_bar=False)
        hidden = adata.obs["cell_type"] == "Unknown"
        right = (model.predict() == adata.obs["truth"])[hidden].mean()
        found[name] = right, model.history["elbo_train"].iloc[-3:].mean().item()
    assert found["disk"][0] > 0.95 and found["memory"][0] > 0.95
    assert found["disk"][1] == pytest.approx(found["memory"][1], rel=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("small_windows")
def test_a_run_is_resumed_bit_for_bit(path):
    adata = ad.read_h5ad(path, backed="r")
    settings = {"batch_size": 16, "progress_bar": False}
    whole = small_model(adata).train(4, **settings)
    folder = {"checkpoint_dir": path.parent / "run"}
    small_model(adata).train(2, **settings, **folder)
    resumed = small_model(adata).train(4, **settings, **folder, ckpt_path="last")
    pd.testing.assert_frame_equal(resumed.predict(soft=True), whole.predict(soft=True))


def test_annotations_are_written_beside_the_counts(path):
    """As docs/large_data.md says; X is not touched."""
    adata = ad.read_h5ad(path, backed="r")
    model = small_model(adata).train(1, progress_bar=False)
    model.annotate()
    adata.file.close()
    with h5py.File(path, "r+") as file:
        before = file["X/data"].id.get_offset(), file["X/data"][:].tolist()
        ad.io.write_elem(file, "obs", adata.obs)
        for name in ("obsm", "uns"):
            ad.io.write_elem(file, name, dict(getattr(adata, name)))
        assert (file["X/data"].id.get_offset(), file["X/data"][:].tolist()) == before
    again = ad.read_h5ad(path)
    assert again.obs["scanvi_prediction"].tolist() == adata.obs["scanvi_prediction"].tolist()
    np.testing.assert_array_equal(again.obsm["X_scanvi"], adata.obsm["X_scanvi"])
    assert again.uns["pyro_scanvi"]["n_epochs"] == 1


PROGRAM = """
import sys
import anndata as ad
from pyro_scanvi import SCANVI

for path in sys.argv[1:]:
    adata = ad.read_h5ad(path, backed="r")
    SCANVI.setup_anndata(adata, "cell_type", "none")
    model = SCANVI(adata, n_hidden=16)
    few = {"limit_train_batches": 20, "limit_val_batches": 5}
    model.train(1, progress_bar=False, trainer_kwargs=few)
    assert len(model.predict(method="classifier")) == adata.n_obs
    told = dict(line.split(":") for line in open("/proc/self/status"))
    print(told["VmHWM"].split()[0])  # of this program alone; ru_maxrss begins with its parent's
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """1,500 cells are in memory as a whole; of 75,000, 450 MB, a part is."""
    rng = np.random.default_rng(0)
    some = rng.integers(1, 5, size=(1500, 1500)) * (rng.random((1500, 1500)) < 0.5)
    some, paths = csr_matrix(some.astype(np.float32)), []
    for n_copies in (1, 50):
        x = vstack([some] * n_copies, format="csr")
        label = np.where(rng.random(x.shape[0]) < 0.01, rng.choice(["B", "T"], x.shape[0]), "none")
        obs = pd.DataFrame({"cell_type": label}, index=np.arange(x.shape[0]).astype(str))
        paths.append(tmp_path / f"{n_copies}.h5ad")
        ad.AnnData(x, obs, pd.DataFrame(index=np.arange(1500).astype(str))).write_h5ad(paths[-1])
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, check=True
    )
    small, large = map(int, told.stdout.split())
    assert paths[1].stat().st_size > 4.5e8
    assert 1024 * (large - small) < 3e8
