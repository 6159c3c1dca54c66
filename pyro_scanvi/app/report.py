"""A model as one page of HTML, without scripts and without anything from elsewhere."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pyro_scanvi.app.parts import PARTS, Part
from pyro_scanvi.app.plotting import drawn_alike
from pyro_scanvi.app.seen import Seen
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.storage.files import check_new, disk_errors, replacing, user_path
from pyro_scanvi.validation import InputError

SUFFIX = ".html"


def write_report(model: SCANVI, path: str | Path) -> Path:
    """Write what a trained model says of its cells as a page: one file, for any browser.

    What was given; UMAP by label, confidence, novelty and batch; the leak of labels; confusion and
    reliability on held-out labels; cells by type and batch; rejected cells; curves of training;
    markers; settings and versions. What cannot be told of a model is a sentence that says why.

    Parameters
    ----------
    model
        It and its AnnData stay as they are.
    path
        Ends in .html; a file that is there is replaced.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InputError
        If the model is not trained, its cells have changed since, or the file cannot be written;
        it is written whole or not at all.
    """
    path = user_path(path)
    check_report(path, overwrite=True)
    return write_page(Seen.by(model), path)


def write_page(seen: Seen, path: Path, overwrite: bool = True) -> Path:
    """The same of answers that are there."""
    with drawn_alike():
        page = rendered([part(seen) for part in PARTS])
    with disk_errors(path), replacing(path, overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def rendered(parts: list[Part]) -> str:
    """The page; every name in it is text, whatever its letters."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["told"] = _told
    template = files("pyro_scanvi.app").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title="Labels by pyro_scanvi", parts=parts)


def check_report(path: Path, overwrite: bool, *others: Path) -> None:
    """Refuse a page that cannot be written, or lies in one of the `others`; nothing is made."""
    if path.suffix != SUFFIX:
        message = f"the report {path} does not end in {SUFFIX}; name a file, such as report{SUFFIX}"
        raise InputError(message, {"report": f"{path}{SUFFIX}"})
    check_new(path, "report", overwrite, *others)


def _told(value: Any) -> Any:
    """A number in three digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else value
