"""Further data of each cell, by name: a layer, a matrix of obsm or a column of obs.

A place is written "layers/KEY", "obsm/KEY" or "obs/KEY". What is read is a copy in float32, (N, D).
Numbers are finite; a row of ``obsm`` that is NaN throughout says that the cell was not measured.
"""

import keyword
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse

from pyro_scanvi.data.columns import check_keys
from pyro_scanvi.data.counts import check_format, copied, position_of, values_of
from pyro_scanvi.data.minibatches import Counts
from pyro_scanvi.data.on_disk import stays_on_disk
from pyro_scanvi.names import first, listed, nearest
from pyro_scanvi.validation import InputError

EXPECTED = "expected 'layers/KEY', 'obsm/KEY' or 'obs/KEY', such as {'protein': 'obsm/protein'}"


@dataclass(frozen=True)
class Extra:
    """Data of each cell that stand at a place of the AnnData.

    Attributes
    ----------
    name
        What the model calls them, ``cells.extra[name]``.
    place
        "layers/KEY", "obsm/KEY" or "obs/KEY".
    n_columns
        Number of columns, D; of a layer those that its AnnData had, not all of which are read.
    columns
        Their names; none where the place has none of its own.
    """

    name: str
    place: str
    n_columns: int = 0
    columns: tuple[str, ...] = ()

    @classmethod
    def find(cls, adata: ad.AnnData, name: str, place: str) -> "Extra":
        """The data at a place that is there; its columns are noted. Raises InputError."""
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise InputError(
                f"extra names {name!r}, expected a name as of a variable, such as 'protein'"
            )
        extra = cls(name, _checked_place(place))
        found = extra._held(adata)
        named = isinstance(found, pd.DataFrame) and not extra.layer
        columns = tuple(map(str, found.columns)) if named else ()
        if len(set(columns)) < len(columns):
            twice = [c for c in columns if columns.count(c) > 1]
            raise InputError(f"{extra.where} has two columns {twice[0]!r}; name each once")
        return cls(name, extra.place, found.shape[1], columns)

    @property
    def where(self) -> str:
        """The place as one writes it in Python."""
        kind, key = self._parts()
        return f"{kind}[{key!r}]"

    @property
    def layer(self) -> str:
        """The layer that they stand in; empty is none."""
        return self._parts()[1] if self._of_genes() else ""

    def width(self, n_genes: int) -> int:
        """Number of columns that a model of so many genes reads."""
        return n_genes if self._of_genes() else self.n_columns

    def names(self, genes: np.ndarray) -> np.ndarray:
        """Name of each column that a model of such genes reads; its number where it has none."""
        if self._of_genes():
            return genes
        return np.array(self.columns or range(self.n_columns), dtype=str)

    def read(self, adata: ad.AnnData, genes: np.ndarray) -> Counts:
        """A float32 copy, (N, D), CSR where it is sparse; of a layer the given genes, in order.

        Raises
        ------
        InputError
            If the place is not there or lacks columns, and for what is no finite number; it names
            the cell and the column.
        """
        found = self._held(adata)
        if self._of_genes():
            values = copied(_numbers(found, self.where), self._gene_positions(adata, genes))
            self._check_finite(values, adata.obs_names, self.names(genes))
            return values
        names = self._columns_of(found)
        values = copied(_numbers(found, self.where), self._positions(found, names))
        self._check_finite(values, adata.obs_names, self.names(genes))
        return values

    def put(self, adata: ad.AnnData, values: Counts) -> None:
        """Put such values, (N, D), in their place; of a layer those of the AnnData's genes."""
        kind, key = self._parts()
        named: Any = values
        if self.columns:
            dense = values if isinstance(values, np.ndarray) else values.toarray()
            named = pd.DataFrame(dense, index=adata.obs_names, columns=list(self.columns))
        getattr(adata, kind)[key] = values[:, 0] if kind == "obs" else named

    def check_measured(self, values: Counts) -> None:
        """Refuse data that no cell has."""
        if _unmeasured(values).all():
            raise InputError(f"{self.where} is NaN in all cells: there is nothing to learn from it")

    def _parts(self) -> tuple[str, str]:
        kind, _, key = self.place.partition("/")
        return kind, key

    def _of_genes(self) -> bool:
        return self._parts()[0] == "layers"

    def _may_lack(self) -> bool:
        return self._parts()[0] == "obsm"

    def _held(self, adata: ad.AnnData) -> Any:
        """What stands there, two-dimensional: an array, a sparse matrix or a DataFrame."""
        kind, key = self._parts()
        return HELD[kind](self, adata, key)

    def _column(self, adata: ad.AnnData, key: str) -> pd.DataFrame:
        if key not in adata.obs:
            self._refuse_missing(adata.obs.columns, "obs")
        check_keys(adata, [key])
        if not _is_number(adata.obs[key].dtype):
            raise InputError(
                f"{self.where} holds {adata.obs[key].dtype} and no numbers; a column of "
                "categories goes into categorical_covariate_keys, or give codes of your own, such "
                f"as adata.obs[{key!r}].astype('category').cat.codes"
            )
        return adata.obs[[key]]

    def _matrix(self, adata: ad.AnnData, key: str) -> Any:
        kind = self._parts()[0]
        held = getattr(adata, kind)
        if key not in held:
            self._refuse_missing(held.keys(), kind)
        found = held[key]
        if stays_on_disk(found):
            raise InputError(
                f"{self.where} stays on the disk, and extra data are held in memory; read it: "
                f"adata.{self.where} = adata.{self.where}[:]"
            )
        if issparse(found):
            check_format(found, self.where)
        elif not isinstance(found, pd.DataFrame):
            found = np.asarray(found)
        if found.ndim != 2 or not found.shape[1]:
            raise InputError(
                f"{self.where} has shape {found.shape}, expected a column for each thing measured"
            )
        return found

    def _refuse_missing(self, there: Iterable, kind: str) -> None:
        key = self._parts()[1]
        names = [str(name) for name in there]
        hint = nearest(key, names, f"there are: {listed(names) or 'none'}", cutoff=0.6)
        lacking = f"; {self._fill()}" if self._may_lack() and self.n_columns else ""
        raise InputError(
            f"{kind} has no {key!r}, which the model reads as {self.name!r}; {hint}{lacking}"
        )

    def _fill(self) -> str:
        """The line that says that no cell was measured."""
        columns = f"model.fields.extra_of({self.name!r}).columns"
        named = f"np.full((adata.n_obs, {self.n_columns}), np.nan)"
        if self.columns:
            named = f"pd.DataFrame(np.nan, adata.obs_names, list({columns}))"
        return f"where these cells were not measured, say so: adata.{self.where} = {named}"

    def _columns_of(self, found: Any) -> tuple[str, ...]:
        return tuple(map(str, getattr(found, "columns", range(found.shape[1]))))

    def _positions(self, found: Any, names: tuple[str, ...]) -> np.ndarray | None:
        """Where the columns of the model stand; None is as they come."""
        if not self.columns:
            if found.shape[1] != self.n_columns:
                raise InputError(
                    f"{self.where} has {found.shape[1]} columns, expected {self.n_columns}: those "
                    "that the model was set up with, in their order"
                )
            return None
        if not hasattr(found, "columns"):
            raise InputError(
                f"{self.where} has no names of columns, and the model knows them by name "
                f"({listed(self.columns)}); give a DataFrame with these columns"
            )
        if names == self.columns:
            return None
        return _found_by_name(names, self.columns, self.where, "columns")

    def _gene_positions(self, adata: ad.AnnData, genes: np.ndarray) -> np.ndarray | None:
        if len(genes) == adata.n_vars and (adata.var_names == genes).all():
            return None
        return _found_by_name(adata.var_names, genes, self.where, "genes of the model")

    def _check_finite(self, values: Counts, cells: pd.Index, columns: np.ndarray) -> None:
        """Refuse what is no finite number; rows of NaN alone are none where cells may lack it."""
        wrong = ~np.isfinite(values_of(values))
        if not wrong.any():
            return
        if self._may_lack():
            wrong &= ~_of_rows(values, _unmeasured(values))
        if not wrong.any():
            return
        cell, column = position_of(values, wrong)
        value = values_of(values)[wrong][0]
        lacks = self._may_lack() and np.isnan(value)
        whole = "; where a cell was not measured, the whole row is NaN" if lacks else ""
        raise InputError(
            f"{self.where} is not finite: {value} in cell {cells[cell]!r}, column "
            f"{str(columns[column])!r}; expected numbers that float32 can hold{whole}"
        )


HELD: dict[str, Callable[[Extra, ad.AnnData, str], Any]] = {
    "layers": Extra._matrix,
    "obsm": Extra._matrix,
    "obs": Extra._column,
}


def find_extra(adata: ad.AnnData, given: Mapping[str, str] | None) -> tuple[Extra, ...]:
    """The data at the places that are named; raises InputError."""
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"extra={given!r}; {EXPECTED}")
    return tuple(Extra.find(adata, name, place) for name, place in (given or {}).items())


def _checked_place(place: Any) -> str:
    kind, _, key = place.partition("/") if isinstance(place, str) else ("", "", "")
    if kind not in HELD or not key:
        raise InputError(f"extra names the place {place!r}; {EXPECTED}")
    return place


def _is_number(dtype: Any) -> bool:
    types = pd.api.types
    return bool(types.is_numeric_dtype(dtype) and not types.is_complex_dtype(dtype))


def _numbers(found: Any, where: str) -> Any:
    """A matrix of numbers, which may be shared with the AnnData; InputError for other types."""
    if isinstance(found, pd.DataFrame):
        other = [str(c) for c, dtype in found.dtypes.items() if not _is_number(dtype)]
        if other:
            raise InputError(f"{where} holds columns that are no numbers{first(other)}")
        return found.to_numpy(dtype=np.float64, na_value=np.nan)
    if not _is_number(found.dtype):
        raise InputError(f"{where} holds {found.dtype}, expected real numbers")
    return found


def _found_by_name(names: Iterable[str], known: Iterable, where: str, what: str) -> np.ndarray:
    positions = pd.Index(names).get_indexer(list(known))
    missing = [name for name, at in zip(known, positions, strict=True) if at < 0]
    if missing:
        raise InputError(f"{where} lacks {len(missing)} {what}{first(missing)}; add them")
    return positions


def _unmeasured(values: Counts) -> np.ndarray:
    """Whether a row is NaN throughout, (N,)."""
    if isinstance(values, np.ndarray):
        return np.asarray(np.isnan(values).all(axis=1))
    lacking = csr_matrix((np.isnan(values.data), values.indices, values.indptr), values.shape)
    return np.asarray(lacking.sum(axis=1)).ravel() == values.shape[1]


def _of_rows(values: Counts, chosen: np.ndarray) -> np.ndarray:
    """Whether each entry, as :func:`values_of` has them, stands in a chosen row."""
    if isinstance(values, np.ndarray):
        return np.broadcast_to(chosen[:, None], values.shape)
    return np.repeat(chosen, np.diff(values.indptr))
