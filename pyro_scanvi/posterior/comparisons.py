"""Which cells are compared with which: from columns of obs, masks or queries to positions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pyro_scanvi.names import name_of, names_of, several
from pyro_scanvi.validation import InputError, check_known, positions_of

REST = "Rest"


@dataclass(frozen=True)
class Comparison:
    """Positions of the cells of two groups, and their names; None where they have none."""

    cells1: np.ndarray
    cells2: np.ndarray
    names: tuple[Any, Any] | None = None

    def columns(self) -> dict[str, Any]:
        """What a table says about the groups: nothing of groups without names."""
        if self.names is None:
            return {}
        one, two = self.names
        return {"comparison": f"{one} vs {two}", "group1": one, "group2": two}


def find_comparisons(
    obs: pd.DataFrame,
    groupby: str | None = None,
    group1: Any = None,
    group2: Any = None,
    idx1: Any = None,
    idx2: Any = None,
) -> list[Comparison]:
    """The comparisons asked for, by a column of `obs` or by cells.

    Parameters
    ----------
    obs
        One row a cell.
    groupby
        Column with the groups.
    group1
        One of its values, or several, each compared on its own; None is all.
    group2
        One of its values; None is all other cells.
    idx1, idx2
        Instead: a mask, positions, or a query of `obs`; idx2=None is all other cells.

    Raises
    ------
    InputError
        For unknown names, groups that are empty or share cells, or both ways at once.
    """
    by_group = {"groupby": groupby, "group1": group1, "group2": group2}
    if idx1 is not None:
        _refuse(by_group, "idx1 already says which cells are compared")
        return [_between(obs, _mask(obs, idx1, "idx1"), idx2)]
    _refuse({"idx2": idx2}, "there is no idx1 to compare with")
    if groupby is None:
        raise InputError("give groupby, a column of obs, or idx1, the cells of the first group")
    return _by_group(obs, groupby, group1, group2)


def decoded_batches(
    batches: Iterable, batch_correction: bool, batchid1: Any = None, batchid2: Any = None
) -> tuple[Sequence[int | None], Sequence[int | None]]:
    """Codes of the batches that the cells of each group are decoded in; [None] is their own.

    Parameters
    ----------
    batches
        Names of the batches, in the order of their codes.
    batch_correction
        Whether to decode in given batches.
    batchid1, batchid2
        Names for each group; None is all.

    Raises
    ------
    InputError
        For unknown names, names without batch_correction, or sets that meet but are not equal.
    """
    if not batch_correction:
        given = {"batchid1": batchid1, "batchid2": batchid2}
        _refuse(given, "batch_correction is False, so that each cell stays in its own batch")
        return [None], [None]
    one = _batches_named(batchid1, batches, "batchid1")
    two = _batches_named(batchid2, batches, "batchid2")
    if one != two and set(one) & set(two):
        raise InputError(
            "batchid1 and batchid2 share batches but are not the same (None is all of them); give "
            "the same for both, to compare within each, or two sets that do not meet"
        )
    return one, two


def _batches_named(names: Any, batches: Iterable, argument: str) -> list[int]:
    """Codes of the named batches, each once and in their own order; None is all."""
    return sorted({*positions_of(batches if names is None else names, batches, argument)})


def _by_group(obs: pd.DataFrame, groupby: str, group1: Any, group2: Any) -> list[Comparison]:
    groups = _groups(obs, groupby)
    if len(groups) == 1:
        raise InputError(f"obs[{groupby!r}] has one group, {next(iter(groups))!r}; compare two")
    firsts = list(groups) if group1 is None else names_of(several(group1))
    seconds = [] if group2 is None else [name_of(group2)]
    if group1 is None:
        firsts = [name for name in firsts if name not in seconds]
    check_known([*firsts, *seconds], groups, f"a group of obs[{groupby!r}]", InputError)
    if not firsts:
        raise InputError("group1 names no group; None is all of them")
    if set(firsts) & set(seconds):
        raise InputError(f"group1 and group2 are both {group2!r}; compare two groups")
    if not seconds:
        _check_rest(obs, groupby)
    column = _names_of_cells(obs[groupby])
    return [_of_names(column, groups, first, *seconds) for first in dict.fromkeys(firsts)]


def _of_names(
    column: np.ndarray, groups: Mapping[str, Any], first: str, second: str | None = None
) -> Comparison:
    others = column != first if second is None else column == second
    names = groups[first], REST if second is None else groups[second]
    return Comparison(np.flatnonzero(column == first), np.flatnonzero(others), names)


def _groups(obs: pd.DataFrame, groupby: str) -> dict[str, Any]:
    """The values that occur, by how they read."""
    check_known([groupby], obs.columns, "a column of obs", InputError)
    if obs[groupby].ndim > 1:
        raise InputError(f"obs has several columns {groupby!r}; keep one")
    values = obs[groupby].astype("category").cat.remove_unused_categories().cat.categories
    return {name_of(value): value for value in values}


def _names_of_cells(column: pd.Series) -> np.ndarray:
    """The group of each cell by name, None where it has none; (N,)."""
    cells = column.astype("category").cat
    return np.array([*names_of(cells.categories), None], dtype=object)[cells.codes]


def _check_rest(obs: pd.DataFrame, groupby: str) -> None:
    """Cells without a value are in no group, and would be in no rest either."""
    missing = obs[groupby].isna().sum()
    if missing:
        raise InputError(
            f"obs[{groupby!r}] has no value in {missing} cells, which are then in no group and "
            "not in the rest; fill them, name group2, or give idx1 and idx2"
        )


def _between(obs: pd.DataFrame, first: np.ndarray, idx2: Any) -> Comparison:
    second = ~first if idx2 is None else _mask(obs, idx2, "idx2")
    if not second.any():
        raise InputError("idx1 selects all cells; there is no other to compare with")
    shared = int((first & second).sum())
    if shared:
        raise InputError(f"idx1 and idx2 share {shared} cells; give groups that do not meet")
    return Comparison(np.flatnonzero(first), np.flatnonzero(second))


def _mask(obs: pd.DataFrame, given: Any, name: str) -> np.ndarray:
    """A mask of the cells, from a mask, positions or a query."""
    cells = _queried(obs, given, name) if isinstance(given, str) else np.asarray(given)
    if cells.dtype == bool and cells.shape != (len(obs),):
        raise InputError(f"{name} is a mask of shape {cells.shape}, expected ({len(obs)},)")
    if cells.dtype != bool and cells.size and cells.dtype.kind not in "iu":
        raise InputError(
            f"{name} holds {cells.dtype}, expected a mask, positions or a query of obs as a string"
        )
    if cells.dtype != bool:
        cells = _at_positions(cells.ravel().astype(int), len(obs), name)
    if not cells.any():
        raise InputError(f"{name} selects no cell")
    return cells


def _queried(obs: pd.DataFrame, query: str, name: str) -> np.ndarray:
    try:
        found = obs.query(query)
    except Exception as error:  # pandas raises whatever the query makes of itself
        raise InputError(f"{name}={query!r} is no query of obs: {error}") from None
    return obs.index.isin(found.index)


def _at_positions(positions: np.ndarray, n_cells: int, name: str) -> np.ndarray:
    if positions.size and not (-n_cells <= positions.min() and positions.max() < n_cells):
        raise InputError(
            f"{name} holds positions from {positions.min()} to {positions.max()}, but there are "
            f"{n_cells} cells"
        )
    mask = np.zeros(n_cells, dtype=bool)
    mask[positions] = True
    return mask


def _refuse(given: Mapping[str, Any], because: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} is given, but {because}; leave it out")
