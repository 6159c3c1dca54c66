"""ArviZ, where it is needed: an extra of the package."""

import warnings
from importlib import import_module
from types import ModuleType


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{name} is not installed; it comes with pip install "pyro-scanvi[arviz]"'
        ) from error


def arviz_base() -> ModuleType:
    """ArviZ's data: ``arviz_base``."""
    return _imported("arviz_base")


def arviz_stats() -> ModuleType:
    """ArviZ's statistics: ``arviz_stats``."""
    return _imported("arviz_stats")


def arviz_plots() -> ModuleType:
    """ArviZ's plots, ``arviz_plots``.

    Its releases for Python 3.11 look for ``matplotlib.style.core``, which matplotlib no longer
    imports by itself since 3.11 and drops in 3.13; and they register a scale in a way that it
    warns of.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _imported("matplotlib.style.core")
        plots = _imported("arviz_plots")
        _imported("arviz_plots.backend.matplotlib")
    return plots
