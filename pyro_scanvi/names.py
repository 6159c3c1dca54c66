"""Names of categories: one name in whatever type it comes, and names that look like another."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

NAMES_SHOWN = 5
WHOLE_NUMBER = re.compile(r"(-?\d+)\.0+")
NUMBER = re.compile(r"[-+]?[\d.]+")
UNLABELED_WORDS = (  # as `bare` gives them
    "",
    "na",
    "nan",
    "none",
    "null",
    "missing",
    "nolabel",
    "notannotated",
    "notassigned",
    "notavailable",
    "unannotated",
    "unassigned",
    "unclassified",
    "undefined",
    "undetermined",
    "unknown",
    "unlabeled",
    "unlabelled",
)
SHORTEST_TYPING_ERROR = 6  # letters; shorter words have too many neighbours


def name_of(value: Any) -> str:
    """How a category reads: 1, 1.0, "1" and "1.0" are one name, as files change the type."""
    text = str(value)
    whole = WHOLE_NUMBER.fullmatch(text)
    return whole.group(1) if whole else text


def names_of(values: Iterable) -> list[str]:
    """The name of each value."""
    return [name_of(value) for value in values]


def several(given: Any) -> list:
    """A name as a list of one, and several as a list."""
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)


def reads_unlabeled(name: str, unlabeled: str) -> bool:
    """Whether a label that is not the unlabelled category looks as if it meant it.

    "unknown", "Unassigned", "nan", "Unknown " and "Unknwon" do beside "Unknown".
    """
    words = [*UNLABELED_WORDS, bare(unlabeled)]
    word = bare(name)
    if word in words:
        return True
    long = [known for known in words if len(known) >= SHORTEST_TYPING_ERROR]
    enough = len(word) >= SHORTEST_TYPING_ERROR
    return enough and bool(difflib.get_close_matches(word, long, n=1, cutoff=0.85))


def bare(name: str) -> str:
    """A name without case, blanks and signs; a number stays as it is."""
    if NUMBER.fullmatch(name):
        return name
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def nearest(name: Any, known: Iterable[str], otherwise: str, cutoff: float = 0.4) -> str:
    """The advice "did you mean ...?" with the known name that is most like it, if one is."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else otherwise


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ in case and blanks alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(name.casefold().split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def renaming(names: Mapping[str, str], column: str) -> str:
    """The line of Python that renames categories of a column of obs."""
    return f"adata.obs[{column!r}] = adata.obs[{column!r}].astype(object).replace({dict(names)})"


def first(names: Iterable) -> str:
    """The first few names in brackets; nothing where there are none."""
    shown = listed(names)
    return f" ({shown})" if shown else ""


def listed(names: Iterable) -> str:
    """The first few names, and dots for more."""
    names = [str(n) for n in names]
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
