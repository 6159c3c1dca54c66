"""Read what ``torch.save`` wrote without doing what its pickle says.

A pickle is a program: it names functions and calls them. Here every name that torch does not itself
hold to be harmless is refused, but for numpy's arrays, dictionaries, pandas' tables and torch's
activations. Arrays and tables are not made by numpy and pandas either: inert stand-ins take down
what the pickle says of them, and arrays are built from that afterwards, from plain bytes and lists.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyro_scanvi.storage.files import user_path
from pyro_scanvi.validation import InputError

_PLAIN_DTYPE = re.compile(r"[biufSU]\d+")  # booleans, numbers, bytes and text


class _Ignored:
    """Stands for what no reader needs, such as a DataFrame of losses."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Type:
    """Stands for a dtype."""

    def __init__(self, name: str, *_: Any):
        self.name = name
        self.byte_order = "="

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]

    def numpy(self) -> np.dtype | None:
        """The dtype; None if it is neither objects nor plain."""
        if self.name == "O8":
            return np.dtype(object)
        plain = isinstance(self.name, str) and _PLAIN_DTYPE.fullmatch(self.name)
        return np.dtype(self.byte_order + self.name) if plain else None


class _Array:
    """Stands for an array until :meth:`numpy` builds it."""

    shape: tuple = ()
    fortran_order = False
    type: Any = None  # a pickle may say anything
    data: Any = None

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.type, self.fortran_order, self.data = state

    def numpy(self) -> np.ndarray | None:
        """The array; None if its dtype is neither objects nor plain."""
        dtype = self.type.numpy() if isinstance(self.type, _Type) else None
        if dtype is None:
            return None
        if dtype.hasobject:
            flat = np.empty(len(self.data), dtype=object)
            flat[:] = [_built(item) for item in self.data]
        else:
            flat = np.frombuffer(bytes(self.data), dtype=dtype).copy()
        return flat.reshape(self.shape, order="F" if self.fortran_order else "C")


def _scalar(dtype: _Type, data: bytes) -> _Array:
    array = _Array()
    array.type, array.data = dtype, data
    return array


def _plain_dict(*_: Any) -> dict:
    return {}


# What is given as activation_fn; their constructors keep numbers, and no more.
ACTIVATIONS = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU),
    *(nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh),
)
STAND_INS: dict[str, Any] = {
    "builtins.bytes": bytes,
    "builtins.dict": _plain_dict,
    "builtins.slice": _Ignored,
    "collections.defaultdict": _plain_dict,
    "numpy.dtype": _Type,
    "numpy.ndarray": _Array,
    **{f"{activation.__module__}.{activation.__name__}": activation for activation in ACTIVATIONS},
    **{
        f"numpy.{core}.multiarray.{name}": stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _Array), ("scalar", _scalar))
    },
}


def read(path: str | Path, allow: Mapping[str, Any] | None = None) -> Any:
    """What is in a file of ``torch.save``, on the CPU.

    Parameters
    ----------
    path
        The file.
    allow
        Further names the pickle may use, such as ``{"torch.nn.modules.activation.SiLU": nn.SiLU}``,
        and what each stands for.

    Raises
    ------
    InputError
        If it is no such file, or names anything else; the names are listed.
    """
    path = user_path(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        pandas = {n: _Ignored for n in names if n.startswith("pandas.")}
        table = STAND_INS | pandas | dict(allow or {})
        _check_names(path, names, table)
        with torch.serialization.safe_globals([(stand, name) for name, stand in table.items()]):
            return _built(torch.load(path, map_location="cpu", weights_only=True))
    except (InputError, OSError):
        raise
    except Exception as error:  # a file made to mislead can fail in any way
        raise InputError(
            f"{path} is not a file that torch.save wrote in its usual way, or it was made to "
            f"mislead ({type(error).__name__}); nothing in it was executed"
        ) from error


def _check_names(path: str | Path, names: list[str], table: Mapping[str, Any]) -> None:
    refused = sorted(set(names).difference(table))
    if refused:
        raise InputError(
            f"{path} asks to call {', '.join(refused)}; that was refused, and nothing in it was "
            "executed. If you know what these names are for and trust the file, pass them as "
            "`allow`"
        )


def _built(value: Any) -> Any:
    """The same value with stand-ins of arrays replaced by arrays, others by None."""
    if isinstance(value, _Array):
        array = value.numpy()
        return array[()] if array is not None and array.ndim == 0 else array
    if isinstance(value, dict):
        return {_built(k): _built(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_built(v) for v in value)
    return None if isinstance(value, _Ignored | _Type) else value
