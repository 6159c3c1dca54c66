"""Models with a card: the hub can read it, the folder opens, names in it stay text."""

import sys
from shutil import copytree
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import yaml

from pyro_scanvi import SCANVAE, SCANVI, InputError
from pyro_scanvi.estimator import hub
from pyro_scanvi.estimator.hub import Card, downloaded, push_to_hub, to_hub_folder
from tests.examples import as_they_are, simulated

CARD = Card("cc-by-4.0", "Blood: a test", tags=["tissue:blood"], figures={"kappa | odd": 0.5})
ODD = {"B": "B|`cells`", "NK": "<b>NK</b>", "T": "T: 'x' \"y\" # - é"}


class Own(SCANVAE):
    """A class of one's own."""


@pytest.fixture(scope="module")
def adata():
    """Three types with names that mean something in Markdown, HTML and YAML; two batches."""
    adata = simulated(60)
    adata.obs["label"] = [ODD.get(name, name) for name in adata.obs["cell_type"]]
    adata.obs["batch"] = np.where(np.arange(60) % 3, "one", "two")
    SCANVI.setup_anndata(adata, "label", "Unknown", batch_key="batch")
    return adata


@pytest.fixture(scope="module")
def model(adata):
    return SCANVI(adata, n_hidden=8, n_latent=3, seed=4).train(max_epochs=1, progress_bar=False)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return to_hub_folder(model, tmp_path_factory.mktemp("hub") / "model", CARD)


def front_matter(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    nothing, front, body = text.split("---\n", 2)
    assert nothing == ""
    return yaml.safe_load(front), body


def table(body, first):
    """Rows of the table whose first heading is `first`, read as Markdown says."""
    lines = body[body.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[c.strip() for c in line.replace("\\|", "\0").split("|")[1:-1]] for line in lines]


def test_the_hub_reads_the_front_matter(folder):
    """Names as the hub and scvi-tools' models there have them."""
    front, _ = front_matter(folder)
    assert front["license"] == "cc-by-4.0" and front["library_name"] == "pyro_scanvi"
    for tag in ("biology", "single-cell", "model_cls_name:SCANVI", "modality:rna", "tissue:blood"):
        assert tag in front["tags"]
    assert "annotated:True" in front["tags"]


def test_front_matter_holds_any_text(model):
    text = hub.written(
        model, Card("other: '#", tags=['a: "b" # é', "- c", "<&>", "\N{DNA DOUBLE HELIX}"])
    )
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert front["license"] == "other: '#"
    assert front["tags"][-4:] == ['a: "b" # é', "- c", "<&>", "\N{DNA DOUBLE HELIX}"]


def test_the_card_counts_cells(folder, adata):
    """Types and batches, by hand."""
    _, body = front_matter(folder)
    labelled = adata.obs["label"][adata.obs["label"] != "Unknown"]
    assert f"60 cells, {len(labelled)} of them labelled; 20 genes" in body
    assert [int(n) for _, n in table(body, "type")] == list(labelled.value_counts().sort_index())
    assert table(body, "batch") == [["one", "40"], ["two", "20"]]


def test_names_stay_in_their_cells(folder):
    """No name breaks a table or becomes HTML."""
    _, body = front_matter(folder)
    for first, width in (("type", 2), ("what", 3), ("figure", 2), ("setting", 2)):
        assert {len(row) for row in table(body, first)} == {width}
    assert "<b>" not in body and "\\<b\\>NK" in body


def test_figures_are_those_of_held_out_labels(folder, model):
    """Accuracy of the rules where they did not see the label; what was measured elsewhere."""
    figures = dict(table(front_matter(folder)[1], "figure"))
    rules = model.consensus()
    right = (rules.held_out.argmax(1) == rules.label).mean()
    name = f"accuracy on held-out labels ({len(rules.label)} cells)"
    assert float(figures[name]) == pytest.approx(right, abs=1e-3)
    assert figures["kappa \0 odd"] == "0.5"
    assert float(figures["ELBO, train (nats per cell)"]) == pytest.approx(
        model.history["elbo"].iloc[-1], rel=1e-3
    )


def test_the_folder_opens(folder, model, adata):
    """As one that save() wrote does, the card beside."""
    again = SCANVI.load(folder, adata.copy())
    pd.testing.assert_frame_equal(again.predict(soft=True), model.predict(soft=True))
    query = SCANVI.load_query_data(SCANVI.prepare_query_anndata(adata.copy(), folder), folder)
    assert query.is_trained


def test_the_lines_that_open_it_run(model, adata, tmp_path, monkeypatch):
    """As they stand in the card, with cells saved along."""
    folder = to_hub_folder(model, tmp_path / "model", CARD, save_anndata=True)
    monkeypatch.chdir(folder)
    code = front_matter(folder)[1].split("```python\n")[1].split("```")[0]
    names = {"new": adata.copy()}
    exec(code, names)
    np.testing.assert_array_equal(names["model"].predict(), model.predict())


def test_a_class_of_ones_own_is_told(adata):
    model = as_they_are(SCANVI(adata, module_class=Own, n_hidden=8, n_latent=3))
    assert "SCANVI.load(folder, adata, module_class=Own)" in hub.written(model, CARD)


def test_nothing_is_written_of_an_untrained_model(adata, tmp_path):
    with pytest.raises(InputError, match="not trained"):
        to_hub_folder(SCANVI(adata, n_hidden=8, n_latent=3), tmp_path / "model", CARD)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_something_else_stays(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no saved model"):
        to_hub_folder(model, tmp_path, CARD, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("wrong", [{"license": ""}, {"license": "mit", "title": "a\n---"}])
def test_a_card_that_is_none(wrong):
    with pytest.raises(InputError, match="expected a name in one line"):
        Card(**wrong)


def test_tags_are_a_list():
    with pytest.raises(InputError, match="a list of tags"):
        Card("mit", tags="blood")


class FakeHub(ModuleType):
    """Stands for huggingface_hub: keeps what is uploaded, by name."""

    def __init__(self, place):
        super().__init__("huggingface_hub")
        self.place, self.made = place, {}

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.made[repo_id] = private

    def upload_folder(self, *, repo_id, folder_path, delete_patterns):
        for name in delete_patterns:
            (self.place / repo_id / name).unlink(missing_ok=True)
        copytree(folder_path, self.place / repo_id, dirs_exist_ok=True)
        return f"address of {repo_id}"

    def snapshot_download(self, repo_id, *, revision=None):
        assert revision in (None, "abc")
        return str(self.place / repo_id)


def test_there_and_back(model, adata, tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert push_to_hub(model, "me/blood", CARD) == "address of me/blood"
    assert fake.made == {"me/blood": True}
    push_to_hub(model, "me/blood", CARD, save_anndata=True)
    assert (downloaded("me/blood") / "cells.h5ad").exists()
    push_to_hub(model, "me/blood", CARD)  # and the cells of before are gone
    folder = downloaded("me/blood", revision="abc")
    assert not (folder / "cells.h5ad").exists()
    assert 'downloaded("me/blood")' in (folder / "README.md").read_text()
    again = SCANVI.load(folder, adata.copy())
    np.testing.assert_array_equal(again.predict(), model.predict())
    with pytest.raises(InputError, match="owner/name"):
        push_to_hub(model, "blood", CARD)


def test_without_the_hub_the_cure_is_named(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        push_to_hub(model, "me/blood", CARD)
    with pytest.raises(ImportError, match="SCANVI.load"):
        downloaded("me/blood")
