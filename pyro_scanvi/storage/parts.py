"""Parts of one's own among settings, such as a likelihood: kept by name, and handed in again.

A folder holds no code. It says what a part was called, which is checked, and never decides what is
imported or run.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pyro_scanvi.validation import InputError, check_known

PLAIN = (str, bool, int, float, np.generic, np.ndarray, Tensor, type(None))  # what files hold
LOCAL = "<locals>."


def parts_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of some settings is code, by its place: "extra_encoder_kwargs.activation"."""
    found: dict[str, Any] = {}

    def take(place: str, value: Any) -> None:
        if not isinstance(value, PLAIN):
            found[place] = value

    _each(settings, take)
    return found


def without_parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with None in the place of what is code."""
    return _each(settings, lambda place, value: value if isinstance(value, PLAIN) else None)


def with_parts(settings: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with each part in its place."""
    return _each(settings, lambda place, value: parts.get(place, value))


def names_of_parts(settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Name and module of each part of some settings, by its place."""
    parts = parts_in(settings).items()
    return {place: {"name": name_of_part(p), "module": _module(p)} for place, p in parts}


def name_of_part(part: Any) -> str:
    """What a class, function or object is called, without where it is defined.

    Examples
    --------
    >>> from torch import nn
    >>> name_of_part(nn.GELU), name_of_part(lambda p: p), name_of_part(nn.GELU())
    ('GELU', '<lambda>', 'GELU()')
    """
    if isinstance(part, partial):
        given = [f"{name}={value!r}" for name, value in part.keywords.items()]
        return f"{name_of_part(part.func)}({', '.join([*map(repr, part.args), *given])})"
    if hasattr(part, "__qualname__"):
        return part.__qualname__.rpartition(LOCAL)[-1]
    return f"{name_of_part(type(part))}({', '.join(map(name_of_part, _functions_in(part)))})"


def check_parts(saved: Mapping[str, Mapping[str, str]], given: Mapping[str, Any] | None) -> None:
    """Refuse parts that are missing, unknown, or called otherwise than those that were saved."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise InputError(f"parts={given!r}, expected a dict from places to parts")
    if not saved and given:
        raise InputError(f"parts names {', '.join(given)}, but the model was saved without any")
    check_known(given, saved, "a part of the saved model", InputError)
    missing = [f"{place} ({_told(name)})" for place, name in saved.items() if place not in given]
    if missing:
        place = next(place for place in saved if place not in given)
        called = saved[place]["name"].partition("(")[0]
        raise InputError(
            "the model was saved with parts of one's own, of which a folder holds the names alone; "
            f"missing are {', '.join(missing)}: give them, parts={{{place!r}: {called}, ...}}"
        )
    for place, name in saved.items():
        if name_of_part(given[place]) != name["name"]:
            raise InputError(
                f"parts[{place!r}] is {name_of_part(given[place])} of {_module(given[place])}, but "
                f"the model was saved with {_told(name)}; give that one, or, if it is the same "
                "part, its old name"
            )


def _functions_in(part: Any) -> list[Any]:
    """The functions and classes that a dataclass was given, beside its defaults."""
    entries = fields(part) if is_dataclass(part) else ()
    held = [(getattr(part, field.name), field.default) for field in entries]
    return [value for value, default in held if callable(value) and value is not default]


def _each(value: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """Every entry of nested dicts, lists and tuples, changed by a function of its place and it."""
    inner = f"{place}." if place else ""
    if isinstance(value, Mapping):
        return {str(k): _each(v, change, f"{inner}{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_each(v, change, f"{inner}{i}") for i, v in enumerate(value)]
    return change(place, value)


def _module(part: Any) -> str:
    of = part.func if isinstance(part, partial) else part
    return getattr(of, "__module__", None) or type(of).__module__


def _told(name: Mapping[str, str]) -> str:
    return f"{name['name']} of {name['module']}"
