"""Pages of the repository come into the site with links that lead somewhere there."""

import os

import pytest

pytest.importorskip("sphinx", reason="the extra docs is not installed")

from tests.scripts import load  # noqa: E402

build = load("docs/build.py")
MODULES = {"pyro_scanvi.metrics"}


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/query.md", "extending.md", "[a](extending.md)"),
        ("docs/query.md", "extending.md#saving", "[a](extending.md#saving)"),
        ("docs/query.md", "#keeping", "[a](#keeping)"),
        ("docs/query.md", "https://pyro.ai", "[a](https://pyro.ai)"),
        ("docs/query.md", "../benchmarks/RESULTS.md#labels", "[a](results.md#labels)"),
        ("docs/query.md", "../pyro_scanvi/metrics.py", "[a](#pyro_scanvi.metrics)"),
        ("docs/query.md", "../pyro_scanvi/names.py", "a"),
        ("docs/query.md", "../pyro_scanvi/model", "[a](api/module.rst)"),
        ("docs/query.md", "../tests/reference", "a"),
        ("docs/query.md", "../notebooks/01_a.ipynb", "[a](notebooks/01_a.ipynb)"),
        ("notebooks/01_a.ipynb", "../docs/query.md", "[a](../query.md)"),
        ("notebooks/01_a.ipynb", "02_b.ipynb", "[a](02_b.ipynb)"),
        ("benchmarks/RESULTS.md", "../docs/labels.md", "[a](labels.md)"),
        ("CONTRIBUTING.md", "docs/architecture.md", "[a](architecture.md)"),
    ],
)
def test_links_are_set_to_the_site(page, link, expected):
    assert build.relinked(f"see [a]({link}).", page, MODULES) == f"see {expected}."


def test_pictures_stay():
    assert build.relinked("![a](a.svg)", "docs/query.md", MODULES) == "![a](a.svg)"


def test_the_api_tells_of_modules():
    assert {"pyro_scanvi.model.scanvae", "pyro_scanvi.metrics"} <= build.documented()


def test_notebooks_that_changed_are_executed_again(tmp_path):
    notebooks, executed = tmp_path / "notebooks", tmp_path / "executed"
    for folder in (notebooks, executed):
        folder.mkdir()
        for name in ("01_a.ipynb", "02_b.ipynb"):
            (folder / name).touch()
    os.utime(executed / "02_b.ipynb", (0, 0))
    (notebooks / "03_c.ipynb").touch()
    assert build.not_executed(notebooks, executed) == ["02_b.ipynb", "03_c.ipynb"]
