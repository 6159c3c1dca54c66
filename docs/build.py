"""Build the site: ``python docs/build.py`` reads the repository and writes ``build/site``.

The pages, the executed notebooks, the changelog and the results are laid out in ``build/source``
and their links, which are those of the repository, are set to where things lie in the site. Then
Sphinx runs; a warning is an error. Notebooks that have no executed copy, or have changed since,
are executed first.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parent.parent
SOURCE, SITE = ROOT / "build" / "source", ROOT / "build" / "site"
NOTEBOOKS, EXECUTED = ROOT / "notebooks", ROOT / "build" / "notebooks"
DOCTREES = ROOT / "build" / "doctrees"

PAGES = {  # what does not lie in docs, and where it is in the site
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "results.md",
}
FOLDERS = {  # the page of the API that tells of a folder of the package
    "criticism": "criticism",
    "data": "data",
    "estimator": "estimator",
    "experiments": "experiments",
    "extensions": "extensions",
    "model": "module",
    "posterior": "posterior",
    "training": "training",
}
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^)\s]+)\)")
DOCUMENTED = re.compile(r"automodule:: (\S+)")


def documented() -> set[str]:
    """The modules that a page of the API tells of."""
    pages = (ROOT / "docs" / "api").glob("*.rst")
    return {name for page in pages for name in DOCUMENTED.findall(page.read_text("utf-8"))}


def place(path: str, modules: set[str]) -> str | None:
    """Where a path of the repository is in the site; None if it is not there.

    Examples: ``docs/query.md`` is ``query.md``, ``pyro_scanvi/metrics.py`` is the anchor of the
    module, ``tests`` is not there.
    """
    if path in PAGES:
        return PAGES[path]
    parts = PurePosixPath(path).parts
    if parts[0] == "notebooks":
        return path if path.endswith(".ipynb") else "index.md"
    if parts[0] == "docs":
        return str(PurePosixPath(*parts[1:]))
    if parts[0] == "pyro_scanvi" and path.endswith(".py"):
        module = path.removesuffix(".py").replace("/", ".")
        return f"#{module}" if module in modules else None
    if len(parts) == 2 and parts[0] == "pyro_scanvi" and parts[1] in FOLDERS:
        return f"api/{FOLDERS[parts[1]]}.rst"
    return None


def relinked(text: str, page: str, modules: set[str]) -> str:
    """A page of the repository with its links set to the site; what is not there is no link."""
    own = place(page, modules)
    assert own is not None, page

    def link(match: re.Match) -> str:
        to, _, anchor = match["to"].partition("#")
        if not to or "://" in to or to.startswith("mailto:"):
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(page), to))
        found = place(path, modules)
        if found is None:
            return match["text"]
        if not found.startswith("#"):
            found = os.path.relpath(found, os.path.dirname(own) or ".")
            found += f"#{anchor}" if anchor else ""
        return f"[{match['text']}]({found})"

    return LINK.sub(link, text)


def assemble() -> None:
    """Lay out what Sphinx reads; files that are the same keep their times, so that it is quick."""
    modules, written = documented(), set()
    for page in pages():
        name = str(page.relative_to(ROOT)) if page.parent != EXECUTED else f"notebooks/{page.name}"
        place_of = place(name, modules)
        assert place_of is not None, name
        target = SOURCE / place_of
        target.parent.mkdir(parents=True, exist_ok=True)
        is_text = page.suffix in (".md", ".ipynb")
        text = page.read_text("utf-8")
        text = relinked(text, name, modules) if is_text else text
        if not target.exists() or target.read_text("utf-8") != text:
            target.write_text(text, "utf-8")
        written.add(target)
    for old in set(SOURCE.rglob("*.*")) - written:
        if old.is_file():
            old.unlink()


def pages() -> list[Path]:
    """All files that the site is made of."""
    docs = ROOT / "docs"
    found = [*docs.glob("*.md"), *docs.glob("*.svg"), *docs.glob("api/*.rst")]
    executed = [EXECUTED / path.name for path in NOTEBOOKS.glob("*.ipynb")]
    return sorted([*found, *(ROOT / name for name in PAGES), *executed])


def not_executed(notebooks: Path = NOTEBOOKS, executed: Path = EXECUTED) -> list[str]:
    """Names of the notebooks whose executed copy is missing or older than they are."""

    def is_old(path: Path) -> bool:
        copy = executed / path.name
        return not copy.exists() or copy.stat().st_mtime < path.stat().st_mtime

    return sorted(path.name for path in notebooks.glob("*.ipynb") if is_old(path))


def main() -> int:
    """Build; the exit code of Sphinx."""
    if missing := not_executed():
        script = [sys.executable, str(NOTEBOOKS / "execute.py")]
        subprocess.run([*script, *missing], check=True)
    assemble()
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.rmtree(DOCTREES, ignore_errors=True)  # links to sources keep places of before
    options = ["-W", "--keep-going", "-q", "-d", str(DOCTREES), "-c", str(ROOT / "docs")]
    return build_main([*options, "-b", "html", str(SOURCE), str(SITE)])


if __name__ == "__main__":
    sys.exit(main())
