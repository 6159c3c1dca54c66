"""The Python of README and of the pages in docs runs, and what they link to is there."""

import re
from pathlib import Path

import pyro
import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
EPOCHS = re.compile(r"epochs=\d+")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(page: Path, code: str, namespace: dict, epochs: int = 1) -> None:
    """Fewer epochs, otherwise as it stands."""
    exec(compile(EPOCHS.sub(f"epochs={epochs}", code), page.name, "exec"), namespace)


@pytest.fixture(scope="module")
def quick_start() -> dict:
    """What README's first block leaves."""
    namespace: dict = {}
    run(README, blocks(README)[0], namespace)
    return namespace


def test_the_quick_start_runs(quick_start):
    adata, model = quick_start["adata"], quick_start["model"]
    assert adata.obs["predicted"].isin(model.fields.classes).all()
    assert quick_start["probabilities"].shape == (700, 10)


@pytest.mark.filterwarnings("ignore:a file takes other names")
@pytest.mark.filterwarnings(
    "ignore:(Consolidated metadata|zarr v3 autosharding)"
)  # of later versions
@pytest.mark.parametrize(
    "page",
    [README, *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES if page != README)],
    ids=lambda page: page.name,
)
def test_blocks_run(page, quick_start):
    """In order, after the quick start."""
    namespace = dict(quick_start)
    for block in blocks(page)[page == README :]:
        run(page, block, namespace)
    pyro.clear_param_store()  # an AutoGuide's are there; other tests find it empty


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = [x for x in LINK.findall(page.read_text("utf-8")) if not (page.parent / x).exists()]
    assert not missing


def test_readme_is_short():
    """Fifteen lines of quick start, a page of all."""
    assert len([line for line in blocks(README)[0].splitlines() if line.strip()]) <= 15
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130
    assert len(DOCS) >= 8
