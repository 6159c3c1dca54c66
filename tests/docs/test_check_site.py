"""The check of the site finds each kind of fault, in a small site that has them all."""

import os

import pytest

from tests.scripts import load

CI = bool(os.environ.get("CI"))  # there the browser is installed, and nothing is left out
if not CI:
    pytest.importorskip("playwright", reason="the extra docs is not installed")
site = load("docs/check_site.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(site.browser_path() is None and not CI, reason="no Chromium is installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets that the browser leaves
]

SET = "<mjx-container>x</mjx-container>"  # as MathJax leaves it
MATHJAX = "<script>window.MathJax = {startup: {promise: Promise.resolve()}}</script>"
PICTURE = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>"
GOOD = f"""{MATHJAX}<p id="here">a</p><a href="#here">b</a><a href="sub/other.html#there">c</a>
<a href="https://example.org/nowhere">not followed</a><img src="there.svg">
<span class="math">{SET}</span><pre style="overflow: auto">{"wide" * 200}</pre>"""
FAULTS = {  # what a page holds, and what is said of it
    "link": ('<a href="missing.html">a</a>', "broken link: missing.html"),
    "anchor": ('<a href="sub/other.html#missing">a</a>', "broken anchor: sub/other.html#missing"),
    "own_anchor": ('<a href="#missing">a</a>', "broken anchor: own_anchor.html#missing"),
    "picture": ('<img src="missing.png">', "no picture: missing.png"),
    "maths": (f'{MATHJAX}<span class="math">\\(x\\)</span>', "maths is not set: \\(x\\)"),
    "maths_error": (
        f'{MATHJAX}<span class="math"><mjx-container><mjx-merror>Undefined</mjx-merror>'
        "</mjx-container></span>",
        "maths has an error: Undefined",
    ),
    "console": ("<script>console.error('it broke')</script>", "console: it broke"),
    "script": ("<script>missing()</script>", "script: missing is not defined"),
    "host": (
        "<script src='https://example.org/a.js'></script>",
        "from another host: https://example.org/a.js",
    ),
    "wide": ('<p style="width: 900px">too much</p>', "wider than a phone: <p> too much"),
}


def page(body: str) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    icon = '<link rel="icon" href="data:,">'
    return f"<!doctype html><html><head>{head}{icon}</head><body>{body}</body></html>"


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, list[str]]:
    """Of a page without a fault, and of one with each."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sub").mkdir()
    (folder / "there.svg").write_text(PICTURE)
    (folder / "sub" / "other.html").write_text(page('<h1 id="there">other</h1>'))
    (folder / "good.html").write_text(page(GOOD))
    for name, (body, _) in FAULTS.items():
        (folder / f"{name}.html").write_text(page(body))
    return site.check(folder)


def test_a_good_page_has_no_fault(faults):
    assert faults["good.html"] == [] and faults["sub/other.html"] == []


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(name, faults):
    assert FAULTS[name][1] in faults[f"{name}.html"]


def test_maths_without_mathjax_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "WAIT", 300)
    (tmp_path / "a.html").write_text(page('<span class="math">\\(x\\)</span>'))
    [fault] = site.check(tmp_path)["a.html"]
    assert fault.startswith("not opened, or maths never set")
