"""Checks at the door: say what we got, what we expected, and what to do."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_scanvi.names import listed, name_of, names_of, nearest, several

LARGEST_SEED = 2**63


class InputError(ValueError):
    """Data or arguments of the user that cannot be worked with; the message says what to do.

    Parameters
    ----------
    message
        What is wrong, what was expected, and what to do.
    mend
        Arguments whose change mends it, with the value to give or None where the user must know
        it; for those who give arguments another name, as the command line does.
    """

    def __init__(self, message: str, mend: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.mend = dict(mend or {})


class Advice(UserWarning):
    """What is allowed but may not be meant; `mend` as in :class:`InputError`."""

    def __init__(self, message: str, mend: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.mend = dict(mend or {})


def check_known(
    given: Iterable[str], known: Iterable[str], what: str, error: type[Exception] = TypeError
) -> None:
    """Refuse unknown names, naming the nearest known one."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        hint = nearest(name, known, f"choose from {', '.join(known)}")
        raise error(f"{name!r} is not {what}; {hint}")


def look_up(table: Mapping[Any, Any], choice: Any, argument: str) -> Any:
    """The entry of a table, or `choice` itself where it is a part and not a name."""
    if not isinstance(choice, str | bool | None):
        return choice
    if choice not in table:
        raise InputError(f"{argument}={choice!r}, expected one of {', '.join(map(repr, table))}")
    return table[choice]


def plain_number(value: Any) -> Any:
    """A number of numpy, pandas or torch as Python's own; anything else as it is.

    A float of fewer than 64 bits is the decimal that it was written as: np.float32(0.05) is 0.05.
    """
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = _number_in(value)
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.number | np.bool_ | np.str_) else value


def _number_in(value: Tensor | np.ndarray) -> Any:
    """The entry of an array without dimensions; numpy has no bfloat16."""
    if not isinstance(value, Tensor):
        return value[()]
    return value.item() if value.dtype == torch.bfloat16 else value.detach().cpu().numpy()[()]


def plain(value: Any) -> Any:
    """The same, inside dicts, lists and tuples too."""
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return plain_number(value)


def make_plain(settings: Any) -> None:
    """Make the numbers in a dataclass Python's own, a frozen one's too as it is made."""
    for field in fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))


def plain_arguments(function: Callable) -> Callable:
    """The same function, which meets Python's own numbers alone."""

    @wraps(function)
    def converted(*args: Any, **kwargs: Any) -> Any:
        return function(*map(plain_number, args), **{k: plain_number(v) for k, v in kwargs.items()})

    return converted


def is_number(value: Any) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_at_least(minimum: int, **sizes: int) -> None:
    """Refuse sizes that are no integers or too small."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < minimum:
            raise InputError(f"{name}={size!r}, expected an integer of at least {minimum}")


def check_positive(**numbers: float) -> None:
    """Refuse what is no finite number above 0."""
    for name, number in numbers.items():
        if not is_number(number) or not 0 < number < math.inf:
            raise InputError(f"{name}={number!r}, expected a finite number above 0")


def check_not_negative(**numbers: float) -> None:
    """Refuse what is no finite number of at least 0."""
    for name, number in numbers.items():
        if not is_number(number) or not 0 <= number < math.inf:
            raise InputError(f"{name}={number!r}, expected a number that is at least 0")


def check_flags(**flags: bool) -> None:
    """Refuse what is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InputError(f"{name}={flag!r}, expected True or False")


def check_seed(seed: int) -> None:
    """Refuse what torch takes for no seed, with room for the epochs that are added to it."""
    check_at_least(0, seed=seed)
    if seed >= LARGEST_SEED:
        raise InputError(f"seed={seed}, expected an integer below 2**63")


def positions_of(names: Any, known: Iterable, argument: str) -> list[int]:
    """Where a name or several stand among the known ones; unknown names are refused."""
    position = {name_of(name): i for i, name in enumerate(known)}
    names = names_of(several(names))
    if not names:
        raise InputError(f"{argument} is empty; leave it out, or name at least one")
    unknown = [name for name in names if name not in position]
    if unknown:
        hint = nearest(unknown[0], position, f"the model knows {listed(position)}")
        raise InputError(
            f"{argument}: the model does not know {unknown[0]!r}"
            + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
            + f"; {hint}"
        )
    return [position[name] for name in names]


def check_rate(**rates: float) -> None:
    """Refuse dropout rates outside [0, 1)."""
    for name, rate in rates.items():
        if not is_number(rate) or not 0 <= rate < 1:
            raise InputError(f"{name}={rate!r}, expected a probability in [0, 1)")


def check_arguments(constructor: Callable, unknown: Mapping[str, Any]) -> None:
    """Refuse keywords that `constructor` does not spell out."""
    parameters = inspect.signature(constructor).parameters
    name = constructor.__name__
    check_known(unknown, [p for p in parameters if p != "unknown"], f"an argument of {name}")
