"""From an AnnData to arrays: which columns mean what, their categories, and checks at the door."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi.data import counts
from pyro_scanvi.data.columns import (
    MISSING,
    UNSEEN,
    categories,
    check_keys,
    codes_of,
    column_of,
    known_codes,
    listed_keys,
    names_of_cells,
    numbers_of,
    one_key,
    refuse_unseen,
)
from pyro_scanvi.data.counts import Counts, CountsPlace
from pyro_scanvi.data.minibatches import UNLABELED, CellData
from pyro_scanvi.names import first, listed, name_of, names_of, reads_unlabeled, renaming
from pyro_scanvi.validation import InputError

UNS_KEY = "pyro_scanvi"
WRITTEN = ("scanvi_prediction", "scanvi_confidence")  # columns of obs


@dataclass(frozen=True)
class Fields:
    """The columns of an AnnData that the model reads, and their categories, frozen.

    Attributes
    ----------
    labels_key, unlabeled_category
        Column of ``obs`` with the labels, and its value where a label is not known.
    layer
        Layer with the counts; empty is ``X``.
    batch_key, size_factor_key
        Columns of ``obs``; empty is none.
    categorical_covariate_keys, continuous_covariate_keys
        Columns of ``obs``.
    classes, batches
        Categories in the order of their codes.
    covariate_categories
        Categories of each categorical covariate.
    genes
        Names of the genes that the model reads, in order; an AnnData may hold more.
    use_raw
        Whether the counts stand in ``raw``.

    Examples
    --------
    >>> obs = pd.DataFrame({"type": ["T", "B", "Unknown"]}, index=["c0", "c1", "c2"])
    >>> adata = ad.AnnData(np.ones((3, 2)), obs, pd.DataFrame(index=["g0", "g1"]))
    >>> fields = Fields.from_anndata(adata, "type", "Unknown")
    >>> fields.classes.tolist()
    ['B', 'T']
    >>> fields.encode(adata).label
    array([ 1,  0, -1])
    """

    labels_key: str
    unlabeled_category: str
    layer: str
    batch_key: str
    size_factor_key: str
    categorical_covariate_keys: tuple[str, ...]
    continuous_covariate_keys: tuple[str, ...]
    classes: np.ndarray
    batches: np.ndarray
    covariate_categories: tuple[np.ndarray, ...]
    genes: np.ndarray
    use_raw: bool = False

    @classmethod
    def from_anndata(
        cls,
        adata: ad.AnnData,
        labels_key: str,
        unlabeled_category: str,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Iterable[str] | None = None,
        continuous_covariate_keys: Iterable[str] | None = None,
        use_raw: bool = False,
        n_top_genes: int | None = None,
    ) -> "Fields":
        """Check an AnnData and find the categories of its columns; raises InputError."""
        check_names(adata)
        unlabeled = _unlabeled_name(unlabeled_category)
        one = {"labels_key": labels_key, "batch_key": batch_key, "size_factor_key": size_factor_key}
        several = {
            "categorical_covariate_keys": categorical_covariate_keys,
            "continuous_covariate_keys": continuous_covariate_keys,
        }
        keys = {name: one_key(name, key) for name, key in one.items()}
        lists = {name: listed_keys(name, given) for name, given in several.items()}
        _check_not_ours(labels_key)
        check_keys(adata, [k for k in (*keys.values(), *sum(lists.values(), ())) if k])
        place = CountsPlace.find(adata, layer, use_raw)
        check_gene_names(place.genes(adata))
        fields = cls(
            **keys,
            **lists,
            unlabeled_category=unlabeled,
            layer=place.layer,
            use_raw=place.use_raw,
            classes=find_classes(adata, labels_key, unlabeled),
            batches=_batches(adata, keys["batch_key"]),
            covariate_categories=tuple(
                categories(adata, key) for key in lists["categorical_covariate_keys"]
            ),
            genes=place.genes(adata).to_numpy(dtype=str),
        )
        data = fields.encode(adata)
        if n_top_genes is None:
            return fields
        chosen = counts.variable_genes(data.counts, data.batch, n_top_genes)
        chosen_ones = f" in the {len(chosen)} genes that were chosen"
        advice = f"{chosen_ones}; raise n_top_genes, or drop those cells"
        counts.check_not_empty(data.counts[:, chosen], adata.obs_names, advice)
        return replace(fields, genes=fields.genes[chosen])

    @property
    def place(self) -> CountsPlace:
        """Where the counts stand."""
        return CountsPlace(self.layer, self.use_raw)

    @classmethod
    def from_uns(cls, adata: ad.AnnData) -> "Fields":
        """Read what :meth:`to_uns` stored."""
        if "setup" not in adata.uns.get(UNS_KEY, {}):
            raise InputError(
                "this AnnData has not been set up; call SCANVI.setup_anndata(adata, labels_key, "
                "unlabeled_category, ...) first"
            )
        stored = dict(adata.uns[UNS_KEY]["setup"])
        by_number = stored["covariate_categories"]
        stored["covariate_categories"] = [by_number[str(i)] for i in range(len(by_number))]
        return cls.from_json(stored)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Fields":
        """From ``asdict`` of fields, its arrays and tuples as lists or arrays, which are copied."""
        keys = ("categorical_covariate_keys", "continuous_covariate_keys")
        arrays = {k: np.array(stored[k]) for k in ("classes", "batches", "genes")}
        tuples: dict[str, tuple] = {k: tuple(map(str, stored[k])) for k in keys}
        tuples["covariate_categories"] = tuple(map(np.array, stored["covariate_categories"]))
        use_raw = bool(stored.get("use_raw", False))  # not in old records
        return cls(**(stored | arrays | tuples | {"use_raw": use_raw}))

    def labelled_by(self, adata: ad.AnnData, labels_key: str, unlabeled_category: str) -> "Fields":
        """The same fields with the labels of another column."""
        check_names(adata)
        unlabeled = _unlabeled_name(unlabeled_category)
        check_keys(adata, [one_key("labels_key", labels_key)])
        classes = find_classes(adata, labels_key, unlabeled)
        return replace(self, labels_key=labels_key, unlabeled_category=unlabeled, classes=classes)

    @contextmanager
    def noted(self, adata: ad.AnnData) -> Iterator[None]:
        """Note these fields in ``adata.uns``; if what is done with them fails, take them back."""
        check_names(adata)
        before = adata.uns.get(UNS_KEY)
        self.note(adata)
        try:
            yield
        except BaseException:
            if before is None:
                del adata.uns[UNS_KEY]
            else:
                adata.uns[UNS_KEY] = before
            raise

    def note(self, adata: ad.AnnData) -> None:
        """Note these fields in ``adata.uns``; they have been found in it."""
        adata.uns[UNS_KEY] = {"setup": self.to_uns()}

    def to_uns(self) -> dict[str, Any]:
        """A plain dict of strings and arrays, which ``write_h5ad`` keeps."""
        stored = asdict(self)
        for key in ("categorical_covariate_keys", "continuous_covariate_keys"):
            stored[key] = np.array(stored[key], dtype=object)
        # By number, not by key: a file takes the slash in a key for a group.
        stored["covariate_categories"] = {
            str(i): values for i, values in enumerate(self.covariate_categories)
        }
        return stored

    def encode(self, adata: ad.AnnData, labels: bool = True, covariates: bool = True) -> CellData:
        """Arrays of an AnnData with these fields, which share no memory with it.

        Parameters
        ----------
        adata
            Cells with the genes of the model, among others and in any order.
        labels
            Whether they are read; otherwise all cells count as unlabelled.
        covariates
            Whether batch, covariates and size factors are read; otherwise they are None where
            `adata` lacks them or has unseen ones.

        Raises
        ------
        InputError
            For missing genes and columns, unseen categories, and what is not counts.
        """
        check_names(adata)
        columns = self._gene_positions(adata)
        read = self._read_covariates if covariates else self._read_covariates_if_possible
        return CellData(
            counts=self.place.own_counts(adata, columns),
            label=self._label_codes(adata) if labels else np.full(adata.n_obs, UNLABELED),
            **read(adata),
        )

    def check_labels_unchanged(self, adata: ad.AnnData, label: np.ndarray) -> None:
        """Refuse an AnnData whose labels are no longer those codes."""
        if self.labels_key not in adata.obs:
            return
        changed = self._label_codes(adata) != label
        if changed.any():
            raise InputError(
                f"obs[{self.labels_key!r}] has changed in {changed.sum()} cells"
                f"{first(adata.obs_names[changed])} since the model was made, which keeps the "
                "labels that it was made with; make a new model with SCANVI(adata), or put the "
                "labels back"
            )

    def with_named_unlabeled(self, obs: pd.DataFrame) -> pd.DataFrame:
        """The same columns, the unlabelled category where a label is missing."""
        if self.labels_key not in obs or not obs[self.labels_key].isna().any():
            return obs
        filled = obs[self.labels_key].astype(object).fillna(self.unlabeled_category)
        return obs.assign(**{self.labels_key: filled})

    def holds(self, adata: ad.AnnData, data: CellData) -> bool:
        """Whether an AnnData still has the counts and columns of `data`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.encode(adata)
        except InputError:
            return False
        return found.equals(data)

    def with_counts(self, adata: ad.AnnData, counts: Counts) -> ad.AnnData:
        """The cells of an AnnData with these counts in their place, and with their genes only."""
        genes = pd.DataFrame(index=self.genes)
        cells = ad.AnnData(counts, adata.obs, genes, uns=adata.uns, obsm=dict(adata.obsm))
        if self.layer:
            cells.layers[self.layer] = counts
        if self.use_raw:
            cells.raw = cells
        return cells

    def sizes(self) -> dict[str, Any]:
        """The arguments of the model that genes, columns and categories give."""
        return {
            "n_input": len(self.genes),
            "n_batch": len(self.batches),
            "n_labels": len(self.classes),
            "n_continuous_cov": len(self.continuous_covariate_keys),
            "n_cats_per_cov": [len(c) for c in self.covariate_categories],
            "use_size_factor_key": bool(self.size_factor_key),
        }

    def check_genes(self, adata: ad.AnnData) -> None:
        """Refuse cells that lack genes of the model, or name two of them alike."""
        self._gene_positions(adata)

    def _gene_positions(self, adata: ad.AnnData) -> np.ndarray | None:
        """Where the genes of the model stand; None where they are all that there is, in order."""
        found = self.place.genes(adata)
        check_gene_names(found)
        if len(found) == len(self.genes) and (found == self.genes).all():
            return None
        positions = found.get_indexer(self.genes)
        missing = self.genes[positions < 0]
        if len(missing):
            extra = found.difference(pd.Index(self.genes))
            raise InputError(
                f"the genes differ from those that the model was set up with: {len(missing)} of "
                f"{len(self.genes)} are missing{first(missing)}, {len(extra)} are new{first(extra)}"
                "; let SCANVI.prepare_query_anndata(adata, reference) fill them"
            )
        return positions

    def _label_codes(self, adata: ad.AnnData) -> np.ndarray:
        if self.labels_key not in adata.obs:  # new cells may come without labels
            return np.full(adata.n_obs, UNLABELED)
        column = column_of(adata, self.labels_key)
        codes = codes_of(column, [*self.classes, self.unlabeled_category])
        unseen = names_of_cells(column, codes == UNSEEN)
        _check_meant(unseen, self.labels_key, self.unlabeled_category)
        refuse_unseen(unseen, self.classes, f"obs[{self.labels_key!r}]", "labels")
        return np.where((codes == len(self.classes)) | (codes == MISSING), UNLABELED, codes)

    def _read_covariates(self, adata: ad.AnnData) -> dict[str, np.ndarray | None]:
        keys = [self.batch_key, self.size_factor_key]
        keys += [*self.categorical_covariate_keys, *self.continuous_covariate_keys]
        check_keys(adata, [k for k in keys if k])
        return {
            "batch": self._batch_codes(adata),
            "continuous": self._continuous(adata),
            "categorical": self._categorical(adata),
            "size_factor": self._size_factor(adata),
        }

    def _read_covariates_if_possible(self, adata: ad.AnnData) -> dict[str, np.ndarray | None]:
        try:
            return self._read_covariates(adata)
        except InputError:  # None and not a number: whoever reads them after all fails
            return dict.fromkeys(("batch", "continuous", "categorical", "size_factor"))

    def _batch_codes(self, adata: ad.AnnData) -> np.ndarray:
        if not self.batch_key:
            return np.zeros(adata.n_obs, dtype=np.int64)
        return known_codes(adata, self.batch_key, self.batches, "batches")

    def _categorical(self, adata: ad.AnnData) -> np.ndarray | None:
        pairs = zip(self.categorical_covariate_keys, self.covariate_categories, strict=True)
        codes = [known_codes(adata, key, known, "categories") for key, known in pairs]
        return np.stack(codes, axis=1) if codes else None

    def _continuous(self, adata: ad.AnnData) -> np.ndarray | None:
        columns = [numbers_of(adata, key) for key in self.continuous_covariate_keys]
        return np.stack(columns, axis=1) if columns else None

    def _size_factor(self, adata: ad.AnnData) -> np.ndarray | None:
        if not self.size_factor_key:
            return None
        values = numbers_of(adata, self.size_factor_key)
        if (values <= 0).any():
            raise InputError(
                f"obs[{self.size_factor_key!r}] holds size factors that are not positive, first "
                f"in cell {adata.obs_names[values <= 0][0]!r}; size factors multiply expression"
            )
        return values[:, None].copy()  # a float32 column would be shared with the AnnData


def _check_not_ours(labels_key: str) -> None:
    if labels_key in WRITTEN:
        raise InputError(
            f"obs[{labels_key!r}] is where predictions are written, replacing the labels; "
            "copy it to a column of another name"
        )


def check_names(adata: ad.AnnData) -> None:
    """Refuse what is no AnnData, has no cells or genes, or names cells not or twice."""
    if not isinstance(adata, ad.AnnData):
        raise InputError(f"got a {type(adata).__name__}, expected an AnnData")
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise InputError(f"the AnnData has {adata.n_obs} cells and {adata.n_vars} genes")
    _check_unique(adata.obs_names, "cells", "adata.obs_names_make_unique()")


def check_gene_names(names: pd.Index) -> None:
    """Refuse genes without a name, or of the same name."""
    _check_unique(names, "genes", "adata.var_names_make_unique()")


def _check_unique(names: pd.Index, what: str, mend: str) -> None:
    nameless = np.flatnonzero(names.isna() | names.astype(str).isin(["", "nan"]))
    if len(nameless):
        raise InputError(
            f"{len(nameless)} {what} have no name, at the positions{first(nameless)}; name them, "
            "or leave them out"
        )
    if not names.is_unique:
        twice = names[names.duplicated()].unique()
        raise InputError(f"{len(twice)} names of {what} occur twice{first(twice)}; {mend}")


def find_classes(adata: ad.AnnData, labels_key: str, unlabeled_category: str) -> np.ndarray:
    """The labels that occur, in the order of their categories, without the unlabelled one."""
    labels = column_of(adata, labels_key)
    _check_meant(names_of_cells(labels, None), labels_key, unlabeled_category)
    found = categories(adata, labels_key, complete=False)
    is_class = np.array(names_of(found)) != unlabeled_category
    classes, column = found[is_class], f"obs[{labels_key!r}]"
    if len(classes) == 0:
        raise InputError(f"no cell is labelled: {column} is {unlabeled_category!r} everywhere")
    if len(classes) == 1:
        raise InputError(
            f"{column} has a single class, {classes[0]!r}; there is nothing to tell apart"
        )
    if is_class.all() and not labels.isna().any():
        _say(
            f"{unlabeled_category!r} does not occur in {column}: all {adata.n_obs} cells count as "
            f"labelled, as {listed(classes)}"
        )
    return classes


def _check_meant(labels: pd.Series, labels_key: str, unlabeled: str) -> None:
    """Refuse labels that look as if they meant that the label is not known."""
    found = labels.value_counts()
    near = [n for n in found.index if n != unlabeled and reads_unlabeled(n, unlabeled)]
    if near:
        told = ", ".join(f"{found[name]} cells labelled {name!r}" for name in near)
        raise InputError(
            f"obs[{labels_key!r}] holds {told}, which reads as if the label were not known, and "
            f"unlabeled_category is {unlabeled!r}: they would be taken for a type. Rename them: "
            f"{renaming(dict.fromkeys(near, unlabeled), labels_key)}; or give "
            f"unlabeled_category={near[0]!r}; a type needs a name of its own",
            {"unlabeled_category": near[0]},
        )


def weights_of(adata: ad.AnnData, weights: str | Sequence[float] | None) -> np.ndarray | None:
    """Weight of each cell, a column of obs or numbers, scaled to a mean of 1; (N,)."""
    if weights is None:
        return None
    if isinstance(weights, str):
        check_keys(adata, [weights])
        weights = numbers_of(adata, weights)
    values = np.asarray(weights, dtype=np.float32)
    if values.shape != (adata.n_obs,):
        raise InputError(
            f"cell_weights has shape {values.shape}, expected one number for each of the "
            f"{adata.n_obs} cells"
        )
    wrong = ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        raise InputError(
            f"cell_weights holds {values[wrong][0]} for cell {adata.obs_names[wrong][0]!r}, "
            "expected positive numbers; leave cells out by adata[cells]"
        )
    return values / values.mean()


def _batches(adata: ad.AnnData, batch_key: str) -> np.ndarray:
    if not batch_key:
        return np.array(["all cells"])
    batches = categories(adata, batch_key)
    if len(batches) == 1:
        _say(f"obs[{batch_key!r}] has one value, {batches[0]!r}: the batch explains nothing")
    return batches


def _unlabeled_name(category: Any) -> str:
    """The unlabelled category as a name; "Unknown" where only missing values are unlabelled."""
    if not np.isscalar(category) and category is not None and category is not pd.NA:
        raise InputError(f"unlabeled_category={category!r}, expected one value")
    return "Unknown" if pd.isna(category) else name_of(category)


def _say(message: str) -> None:
    """Tell the user what is allowed but may not be meant."""
    warnings.warn(message, stacklevel=4)
