"""Models as folders: whole, equal to the bit in a new process, never silently wrong."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_scanvi import SCANVI, InputError
from tests.examples import file_limit

FILES = ("weights.safetensors", "model.json", "label_rules.safetensors")


@pytest.fixture(scope="module")
def adata():
    """40 cells of two kinds."""
    rng = np.random.default_rng(0)
    kind = np.arange(40) % 2
    counts = rng.poisson(np.where(kind[:, None], [8.0] * 6 + [1.0] * 6, [1.0] * 6 + [8.0] * 6))
    labels = np.where(np.arange(40) < 20, np.array(["a", "b"])[kind], "Unknown")
    obs = pd.DataFrame({"label": labels}, index=[f"c{i}" for i in range(40)])
    adata = ad.AnnData(counts.astype(np.float32), obs, pd.DataFrame(index=[*"ABCDEFGHIJKL"]))
    SCANVI.setup_anndata(adata, "label", "Unknown")
    return adata


@pytest.fixture(scope="module")
def model(adata):
    """Trained for two epochs."""
    model = SCANVI(adata, n_hidden=8, n_latent=3, y_prior=[0.3, 0.7], seed=3)
    return model.train(max_epochs=2, progress_bar=False)


@pytest.fixture
def saved(model, tmp_path):
    """Its folder."""
    model.save(tmp_path / "model", save_anndata=True)
    return tmp_path / "model"


def test_loads_equal(model, saved, adata):
    """Weights, settings, history, predictions."""
    again = SCANVI.load(saved, adata.copy())
    np.testing.assert_array_equal(model.predict(soft=True), again.predict(soft=True))
    pd.testing.assert_frame_equal(model.history, again.history)
    assert again.seed == 3 and again.module.y_prior.tolist() == model.module.y_prior.tolist()


def save_predictions(folder, path):
    np.save(path, SCANVI.load(folder).predict(soft=True))


@pytest.mark.slow
def test_loads_equal_in_a_new_process(model, saved, tmp_path, new_process):
    """With the cells that were saved along."""
    assert new_process(save_predictions, saved, tmp_path / "soft.npy") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "soft.npy"), model.predict(soft=True))


def test_trains_on_after_loading(saved, adata):
    """In train mode: batch norms move."""
    again = SCANVI.load(saved, adata.copy())
    before = again.module.z_encoder.hidden.layers[0].batch_norm.running_mean.clone()
    again.train(max_epochs=1, progress_bar=False)
    assert again.n_epochs_trained == 3
    assert not before.equal(again.module.z_encoder.hidden.layers[0].batch_norm.running_mean)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("seed", range(8))
def test_flipped_bits_are_found(saved, adata, file, seed):
    """Any byte; never a model that is silently wrong."""
    data = bytearray((saved / file).read_bytes())
    rng = np.random.default_rng(seed)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    (saved / file).write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        SCANVI.load(saved, adata.copy())


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_truncated_files_are_found(saved, adata, file, share):
    """Also an empty one."""
    data = (saved / file).read_bytes()
    (saved / file).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match="damaged"):
        SCANVI.load(saved, adata.copy())


@pytest.mark.parametrize("file", FILES)
def test_missing_files_are_named(saved, adata, file):
    """Either of them."""
    (saved / file).unlink()
    with pytest.raises(InputError, match=file):
        SCANVI.load(saved, adata.copy())


def test_nothing_is_overwritten_unasked(model, saved, tmp_path):
    """A model needs overwrite=True; another folder is never replaced."""
    with pytest.raises(InputError, match="overwrite=True"):
        model.save(saved)
    model.save(saved, overwrite=True)
    assert not (saved / "cells.h5ad").exists()
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="holds no saved model"):
        model.save(tmp_path / "other", overwrite=True)


def test_a_failed_save_leaves_the_old_one(model, saved, monkeypatch):
    """And nothing beside it."""
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(saved, overwrite=True)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_changed_data_are_named(saved, adata):
    """Genes that differ; an unseen label; no cells at all."""
    with pytest.raises(InputError, match=r"1 of 12 are missing \(A\)"):
        SCANVI.load(saved, adata[:, 1:].copy())
    changed = adata.copy()
    changed.obs["label"] = changed.obs["label"].astype(str).replace("a", "z")
    with pytest.raises(InputError, match="z"):
        SCANVI.load(saved, changed)
    (saved / "cells.h5ad").unlink()
    with pytest.raises(InputError, match="without its cells"):
        SCANVI.load(saved)


def test_a_later_format_is_refused(saved, adata, monkeypatch):
    """With the way out."""
    monkeypatch.setattr("pyro_scanvi.storage.models.FORMAT", 0)
    with pytest.raises(InputError, match="update pyro_scanvi"):
        SCANVI.load(saved, adata.copy())


def test_no_pickle_is_written(saved):
    """Text and safetensors."""
    json.loads((saved / "model.json").read_text())
    assert (saved / "weights.safetensors").read_bytes()[8:9] == b"{"


# ---- paths as users type them -------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder; the working directory is another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def everything(folder):
    """Names below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_new_nested_folder_at_home(model, adata, home, kind):
    """By every method that takes a folder."""
    path = kind("~/runs/1/model")
    model.save(path, save_anndata=True)
    assert everything(home / "runs" / "1") == sorted(
        ["model", "model/cells.h5ad", *(f"model/{name}" for name in FILES)]
    )
    expected = model.predict(soft=True)
    pd.testing.assert_frame_equal(SCANVI.load(path).predict(soft=True), expected)
    query = SCANVI.prepare_query_anndata(adata, path)
    query = SCANVI.load_query_data(query, path)
    assert query.state_diff(path)["changed"].sum() == 0
    assert everything(home.parent / "work") == []


@pytest.mark.parametrize("open_save", ["load_scvi_tools", "from_scvi_model"])
def test_saves_of_scvi_tools_at_home(adata, home, open_save):
    labels = {"from_scvi_model": {"labels_key": "label", "unlabeled_category": "Unknown"}}
    with pytest.raises(InputError, match=f"^{home}/runs/model.pt is not there"):
        getattr(SCANVI, open_save)("~/runs", adata.copy(), **labels.get(open_save, {}))


def test_checkpoints_at_home(adata, home):
    def fresh():
        return SCANVI(adata, n_hidden=8, n_latent=3)

    fresh().train(1, progress_bar=False, checkpoint_dir="~/runs/1")
    assert everything(home) == ["runs", "runs/1", "runs/1/last.ckpt"]
    for ckpt_path in ("last", "~/runs/1/last.ckpt"):
        model = fresh().train(2, progress_bar=False, checkpoint_dir="~/runs/1", ckpt_path=ckpt_path)
        assert model.n_epochs_trained == 2
    assert everything(home.parent / "work") == []


def test_what_is_refused_leaves_no_folder(adata, model, tmp_path, monkeypatch):
    """Neither where the model cannot be saved, nor where the disk fails half way."""
    with monkeypatch.context() as patch:
        patch.setattr(model, "vae_arguments", {"seen": object})
        patch.setattr("pyro_scanvi.estimator.scanvi.without_parts", dict)
        with pytest.raises(InputError, match=r"argument\['seen'\] is a type, which a file"):
            model.save(tmp_path / "runs" / "1" / "model")
    with pytest.raises(InputError, match="there is no checkpoint"):
        model.train(3, checkpoint_dir=tmp_path / "runs" / "2", ckpt_path=tmp_path / "none.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save(tmp_path / "runs" / "3" / "model")
    monkeypatch.setattr(Path, "write_bytes", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(tmp_path / "runs" / "4" / "model")
    assert everything(tmp_path) == []


def test_a_folder_below_a_file(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/a cannot be made: .*/file is a file"):
        model.save(tmp_path / "file" / "a" / "model")


def test_a_disk_that_fills_with_the_cells_is_told_of_the_folder_that_was_given(model, saved):
    """The cells are the last of its large files, and not to be written on their own."""
    sizes = sorted((saved / name).stat().st_size for name in (*FILES, "cells.h5ad"))
    assert sizes[-1] == (saved / "cells.h5ad").stat().st_size
    with file_limit(sizes[-1] - 1), pytest.raises(InputError, match=f"^{saved} cannot be written"):
        model.save(saved, overwrite=True, save_anndata=True)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert SCANVI.load(saved).is_trained
