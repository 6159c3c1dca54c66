"""The report: what it says, what stays text, where it says that it cannot tell, and a browser."""

import os
import warnings
from configparser import ConfigParser
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_scanvi import ELBO, SCANVI, InputError
from pyro_scanvi.app import plotting
from pyro_scanvi.app.parts import (
    LONGEST_NAME,
    PARTS,
    Part,
    Picture,
    Table,
    held_out_labels,
    short_names,
)
from pyro_scanvi.app.report import rendered, write_report
from pyro_scanvi.app.scoring import Judged
from pyro_scanvi.app.seen import Seen, leak_sentence
from pyro_scanvi.metrics import expected_calibration_error, reliability
from tests.examples import as_they_are, file_limit, simulated, small_model
from tests.scripts import ROOT, load

CI = bool(os.environ.get("CI"))  # there the browser is installed, and nothing is left out
HOSTILE = {"B": "<script>alert(1)</script>", "NK": "$\\frac{ & \"'", "T": "日本 " + "x" * 60}


def first_two(latent: np.ndarray, seed: int) -> np.ndarray:
    """In place of a UMAP, which takes longer to compile than all tests of a file to run."""
    return latent[:, :2]


def cells(names=None) -> ad.AnnData:
    """Three types, two batches."""
    adata = simulated()
    adata.obs["batch"] = pd.Categorical(np.array(["b1", "</table>b2"])[np.arange(120) % 2])
    adata.obs["cell_type"] = adata.obs["cell_type"].replace(names or {})
    return adata


def trained_model(adata: ad.AnnData, batch_key: str | None = "batch", **arguments) -> SCANVI:
    SCANVI.setup_anndata(adata, "cell_type", "Unknown", batch_key=batch_key)
    model = SCANVI(adata, n_hidden=16, n_latent=4)
    return model.train(2, progress_bar=False, **arguments)


class Page(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


# ---- scores -------------------------------------------------------------------------------------


@pytest.fixture
def judged():
    """Five cells: one B of two is taken for T; an NK that no probability is told of."""
    soft = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.4, 0.6], [0.1, 0.9]])
    return Judged.of(["B", "T"], np.array(["B", "B", "T", "T", "NK"]), soft)


def test_scores_by_hand(judged):
    assert judged.names == ["B", "T", "NK"]
    scores = judged.scores()
    assert (scores["cells"], scores["accuracy"]) == (5, 3 / 5)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    by_type = judged.by_type()
    assert by_type.loc["T"].tolist() == [2, 0.5, 1, pytest.approx(2 / 3)]
    assert by_type.loc["NK", ["cells", "recall", "f1"]].tolist() == [1, 0, 0]
    assert np.isnan(by_type.loc["NK", "precision"])
    assert judged.confusion().to_numpy().tolist() == [[1, 1, 0], [0, 2, 0], [0, 1, 0]]


def test_reliability_by_hand():
    """Wilson (1927): the ends are the roots of (p - right)^2 = z^2 p (1 - p) / n."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 500)
    correct = rng.random(500) < confidence
    bins = reliability(correct, confidence)
    for end in ("low", "high"):
        p, right = bins[end], bins["right"]
        inside = (p > 0) & (p < 1)
        expected = 1.959964**2 * p * (1 - p) / bins["cells"]
        np.testing.assert_allclose(((p - right) ** 2)[inside], expected[inside], rtol=1e-4)
    gap = (bins["cells"] * (bins["right"] - bins["confidence"]).abs()).sum() / 500
    assert gap == pytest.approx(expected_calibration_error(correct.astype(float), confidence))


@pytest.mark.parametrize(("apart", "expected"), [(0.0, 0.5), (9.0, 1.0)])
def test_the_leak(apart, expected):
    """Labelled cells are an island, or scattered among those that have the same prediction."""
    adata = simulated(300)
    seen = Seen.by(as_they_are(small_model(adata)))
    latent = np.random.default_rng(0).normal(size=(300, 3)) + apart * seen.labelled[:, None]
    seen = replace(seen, latent=latent, soft=pd.get_dummies(adata.obs["truth"]))
    found = seen.leak()
    assert abs(found.mean() - expected) < 0.12
    assert f"space: {found.mean():.2f} (" in leak_sentence(found)
    single = np.where(~adata.obs["truth"].duplicated(), adata.obs["truth"], "Unknown")
    seen = replace(seen, given=single)
    assert leak_sentence(seen.leak()) == "", "of single labelled cells nothing is told"
    assert seen.figures()["leak"] is None


NAMES = {  # labels in turn, and the names of what was given and of what is predicted
    "missing": (["B", None, "T"], {"B", "T", "Unknown"}),
    "numbers": ([2, None, 1], {"1", "2", "Unknown"}),
}


@pytest.mark.parametrize(("labels", "expected"), NAMES.values(), ids=NAMES)
def test_given_and_predicted_labels_have_the_same_names(labels, expected):
    adata = simulated(30)
    column = pd.Series(labels).take(np.arange(30) % 3)
    adata.obs["cell_type"] = column.set_axis(adata.obs_names)
    seen = Seen.by(as_they_are(small_model(adata)))
    assert set(seen.given) == expected
    assert set(seen.soft.columns) == expected - {"Unknown"} >= set(seen.predicted)


# ---- the page -----------------------------------------------------------------------------------


def test_names_stay_text():
    name = HOSTILE["B"]
    table = Table(name, [name], [[name, 0.12345]])
    page = rendered([Part(name, name, [name], [table], [Picture(f'"{name}', "data:,")])])
    assert "<script" not in page
    found = Page(page)
    assert found.of("img") == [{"src": "data:,", "alt": f'"{name}'}]
    assert found.of("div")[-1]["aria-label"] == name
    assert found.said.count(name) >= 6 and "0.123" in found.said


def test_long_names_are_shortened_unless_they_would_be_alike():
    one, other = ("x" * 30 + digit + "y" * 30 for digit in "12")
    assert short_names({one, "T"}) == {one: "x" * 20 + "..." + "y" * 20, "T": "T"}
    assert short_names({one, other}) == {one: one, other: other}
    assert len(short_names({one})[one]) == LONGEST_NAME + 3


def test_an_untrained_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="not trained"):
        write_report(small_model(simulated()), tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """Of models with rules and batches, without either, and without held-out cells."""
    folder = tmp_path_factory.mktemp("pages")
    without = {"objective": ELBO(), "batch_key": None}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(plotting, "umap_of", first_two)
        write_report(trained_model(cells(HOSTILE)), folder / "rules.html")
        write_report(trained_model(cells(), **without, train_size=0.6), folder / "split.html")
        write_report(trained_model(cells(), **without, train_size=1.0), folder / "none.html")
    return folder


@pytest.mark.slow
def test_what_stands_in_it(pages):
    page = Page((pages / "rules.html").read_text("utf-8"))
    assert len(page.of("section")) == len(PARTS)
    assert {*HOSTILE.values(), "</table>b2"} <= set(page.said)
    assert len(page.of("script")) == 0
    assert len(page.of("img")) == 5 + 1 + 2 + 2 + 3  # maps, leak, held-out labels, types, curves
    assert all(len(image["alt"]) > 20 for image in page.of("img"))
    assert all(image["src"].startswith("data:image/svg") for image in page.of("img"))
    assert len(page.of("table")) == len(page.of("caption"))
    assert {"Markers of predicted types", "The farthest cells", "torch"} <= set(page.said)


@pytest.mark.slow
def test_what_cannot_be_told_is_a_sentence(pages):
    split, none = ((pages / f"{name}.html").read_text("utf-8") for name in ("split", "none"))
    assert "labelled cells that training held out: accuracy" in split
    assert "there are no labelled cells that training held out" in none
    for page in (split, none):
        assert "There is one batch, so that no picture shows batches" in page
        assert "the model has no label rules" in page


@pytest.mark.slow
def test_the_held_out_cells_are_those_that_training_scored():
    """All labels of theirs, and what the model says of them without seeing them."""
    model = trained_model(cells(), objective=ELBO(), train_size=0.6)
    held_out = model.adata.obs.iloc[model.validation_indices]
    known = held_out[held_out["cell_type"] != "Unknown"]
    judged = Seen.by(model).held_out
    assert len(known) > 15
    assert [judged.names[code] for code in judged.label] == known["cell_type"].tolist()
    expected = model.predict(model.adata[known.index].copy(), soft=True)
    np.testing.assert_allclose(judged.soft, expected, rtol=1e-5)


def test_a_file_of_before_has_not_kept_what_was_held_out():
    model = as_they_are(small_model(simulated()))
    known = model.consensus()
    unkept = replace(known, held_out=np.full_like(known.held_out, np.nan))
    model.rules = replace(model.rules, consensus=unkept)
    part = held_out_labels(Seen.by(model))
    assert part.pictures == () and "which an earlier version wrote" in part.sentences[0]


@pytest.mark.slow
def test_model_and_cells_stay_and_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "umap_of", first_two)
    adata = cells()
    model = trained_model(adata)
    before = adata.copy()
    one = write_report(model, tmp_path / "one.html").read_bytes()
    assert one == write_report(model, str(tmp_path / "two.html")).read_bytes()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.obsm) == list(before.obsm) and list(adata.uns) == list(before.uns)
    with file_limit(1000), pytest.raises(InputError, match="one.html cannot be written"):
        write_report(model, tmp_path / "one.html")
    assert (tmp_path / "one.html").read_bytes() == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "two.html"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets that the browser leaves
def test_a_browser_finds_no_fault(pages):
    """Console, scripts, other hosts, pictures, anchors, and the width of a phone, 390 pixels."""
    if not CI:
        pytest.importorskip("playwright", reason="the extra docs is not installed")
    site = load("docs/check_site.py")
    if site.browser_path() is None and not CI:
        pytest.skip("no Chromium is installed")
    assert site.check(pages) == {f"{name}.html": [] for name in ("none", "rules", "split")}


def test_what_is_no_python_is_installed():
    """The template, which the page is made of, is named in the package's data."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    data = config["options.package_data"]
    listed = {ROOT / p.replace(".", "/") / name for p in data for name in data[p].split()}
    files = (p for p in (ROOT / "pyro_scanvi").rglob("*") if p.is_file())
    kept = {p for p in files if p.suffix != ".py" and p.parent.name != "__pycache__"}
    assert kept == listed
