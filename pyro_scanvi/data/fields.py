"""From an AnnData to arrays: which columns mean what, their categories, and checks at the door."""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scanvi.data import counts, notes
from pyro_scanvi.data.columns import (
    MISSING,
    UNSEEN,
    categories,
    check_gene_names,
    check_keys,
    check_meant,
    check_names,
    codes_of,
    column_of,
    known_codes,
    listed_keys,
    names_of_cells,
    numbers_of,
    one_key,
    refuse_unseen,
)
from pyro_scanvi.data.counts import CountsPlace
from pyro_scanvi.data.extra import Extra, find_extra
from pyro_scanvi.data.label_sources import LabelSources
from pyro_scanvi.data.labels import check_not_ours, find_classes, unlabeled_name
from pyro_scanvi.data.minibatches import UNLABELED, CellData, Named
from pyro_scanvi.data.on_disk import CellsOnDisk, OnDisk
from pyro_scanvi.names import first
from pyro_scanvi.validation import InputError

CHOOSE_GENES = (
    "choose genes from cells in memory that have all labels and batches: "
    "sample = adata[positions].to_memory(); SCANVI.setup_anndata(sample, ..., n_top_genes=...); "
    "adata.uns['pyro_scanvi'] = sample.uns['pyro_scanvi'] sets all cells up with them"
)


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
    extra
        Further data of each cell, where they stand and their columns.
    sources
        Where else labels stand, and which sets of labels have a name.

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
    extra: tuple[Extra, ...] = ()
    sources: LabelSources = LabelSources()

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
        extra: Mapping[str, str] | None = None,
        sources: LabelSources = LabelSources(),  # noqa: B008  # frozen
    ) -> "Fields":
        """Check an AnnData and find the categories of its columns; raises InputError."""
        check_names(adata)
        unlabeled = unlabeled_name(unlabeled_category)
        labels, batch = one_key("labels_key", labels_key), one_key("batch_key", batch_key)
        size = one_key("size_factor_key", size_factor_key)
        categorical = listed_keys("categorical_covariate_keys", categorical_covariate_keys)
        continuous = listed_keys("continuous_covariate_keys", continuous_covariate_keys)
        check_not_ours(labels)
        check_keys(adata, [k for k in (labels, batch, size, *categorical, *continuous) if k])
        place = CountsPlace.find(adata, layer, use_raw)
        check_gene_names(place.genes(adata))
        sources = sources.found(adata, labels, unlabeled)
        fields = cls(
            labels_key=labels,
            unlabeled_category=unlabeled,
            layer=place.layer,
            batch_key=batch,
            size_factor_key=size,
            categorical_covariate_keys=categorical,
            continuous_covariate_keys=continuous,
            classes=find_classes(adata, labels, unlabeled, sources),
            batches=_batches(adata, batch),
            covariate_categories=tuple(categories(adata, key) for key in categorical),
            genes=place.genes(adata).to_numpy(dtype=str),
            use_raw=place.use_raw,
            extra=find_extra(adata, extra),
            sources=sources,
        )
        data = fields.encode(adata)
        for of_cells in fields.extra:
            of_cells.check_measured(data.extra[of_cells.name])
        if n_top_genes is None:
            return fields
        return fields._of_variable_genes(data, n_top_genes, adata)

    def _of_variable_genes(self, data: CellData, n_top_genes: int, adata: ad.AnnData) -> "Fields":
        """The same fields with the most variable genes only, which leave no cell empty."""
        data.check_in_memory("n_top_genes", CHOOSE_GENES)
        chosen = counts.variable_genes(data.counts, data.batch, n_top_genes)
        where = f" in the {len(chosen)} genes that were chosen"
        advice = f"{where}; raise n_top_genes, or drop those cells"
        counts.check_not_empty(data.counts[:, chosen], adata.obs_names, advice)
        return replace(self, genes=self.genes[chosen])

    @property
    def place(self) -> CountsPlace:
        """Where the counts stand."""
        return CountsPlace(self.layer, self.use_raw)

    @classmethod
    def from_uns(cls, adata: ad.AnnData) -> "Fields":
        """Those that an AnnData was set up with; InputError if it was not."""
        return cls(**notes.from_uns(adata))

    def to_uns(self) -> dict[str, Any]:
        """A plain dict of strings and arrays, which ``write_h5ad`` keeps."""
        return notes.to_uns(asdict(self))

    def note(self, adata: ad.AnnData) -> None:
        """Note these fields in ``adata.uns``; they have been found in it."""
        notes.note(adata, asdict(self))

    def noted(self, adata: ad.AnnData) -> AbstractContextManager[None]:
        """Note them, unless what is done under this fails; then all is as it was."""
        return notes.noted(adata, asdict(self))

    def labelled_by(self, adata: ad.AnnData, labels_key: str, unlabeled_category: str) -> "Fields":
        """The same fields with the labels of another column."""
        check_names(adata)
        unlabeled = unlabeled_name(unlabeled_category)
        check_keys(adata, [one_key("labels_key", labels_key)])
        classes = find_classes(adata, labels_key, unlabeled)
        return replace(self, labels_key=labels_key, unlabeled_category=unlabeled, classes=classes)

    def extra_of(self, name: str) -> Extra:
        """Where the data of that name stand; KeyError if there are none."""
        return {extra.name: extra for extra in self.extra}[name]

    @property
    def extra_layers(self) -> list[str]:
        """Names of the layers that extra data stand in."""
        return [extra.layer for extra in self.extra if extra.layer]

    def columns(self) -> dict[str, np.ndarray]:
        """Names of the columns of the counts, "x", and of extra data."""
        return {"x": self.genes} | {extra.name: extra.names(self.genes) for extra in self.extra}

    def encode(
        self,
        adata: ad.AnnData,
        labels: bool = True,
        covariates: bool = True,
        extra: bool = True,
    ) -> CellData:
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
        extra
            Whether extra data are read; otherwise those that cannot be read are left out, and the
            InputError is that of whoever reads them after all.

        Raises
        ------
        InputError
            For missing genes, columns and extra data, unseen categories, and what is not counts.
        """
        check_names(adata)
        columns = self._gene_positions(adata)
        read = self._read_covariates if covariates else self._read_covariates_if_possible
        found = self.place.counts(adata, columns)
        kind: Any = CellsOnDisk if isinstance(found, OnDisk) else CellData
        return kind(
            counts=found,
            extra=self._extra_data(adata, extra),
            **(self._labels(adata) if labels else {"label": np.full(adata.n_obs, UNLABELED)}),
            **read(adata),
        )

    def check_labels_unchanged(self, adata: ad.AnnData, data: CellData) -> None:
        """Refuse an AnnData whose labels are no longer those of `data`."""
        if self.labels_key not in adata.obs:
            return
        now = self._labels(adata)
        changed = np.zeros(adata.n_obs, dtype=bool)
        for name, values in now.items():
            changed |= differ(getattr(data, name), values)
        if changed.any():
            others = " (or what else says labels)" if self.sources != LabelSources() else ""
            raise InputError(
                f"obs[{self.labels_key!r}]{others} has changed in {changed.sum()} cells"
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

    def with_data(self, adata: ad.AnnData, data: CellData) -> ad.AnnData:
        """The cells of an AnnData with these counts and extra data, and with their genes only."""
        genes = pd.DataFrame(index=self.genes)
        cells = ad.AnnData(data.counts, adata.obs, genes, uns=adata.uns, obsm=dict(adata.obsm))
        if self.layer:
            cells.layers[self.layer] = data.counts
        if self.use_raw:
            cells.raw = cells
        for extra in self.extra:
            extra.put(cells, data.extra[extra.name])
        return cells

    def sizes(self) -> dict[str, Any]:
        """The arguments of the model that genes, columns and categories give."""
        sizes: dict[str, Any] = {
            "n_input": len(self.genes),
            "n_batch": len(self.batches),
            "n_labels": len(self.classes),
            "n_continuous_cov": len(self.continuous_covariate_keys),
            "n_cats_per_cov": [len(c) for c in self.covariate_categories],
            "use_size_factor_key": bool(self.size_factor_key),
        }
        if self.sources.annotator_keys:
            sizes["n_annotators"] = 1 + len(self.sources.annotator_keys)
        if self.extra:  # a class that knows of none is not asked to take them
            sizes["n_extra"] = {extra.name: extra.width(len(self.genes)) for extra in self.extra}
        return sizes

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

    def _labels(self, adata: ad.AnnData) -> dict[str, Any]:
        """What is known of labels: codes, evidence and annotations, as CellData has them."""
        codes = self._label_codes(adata)
        return self.sources.read(adata, codes, self.classes, self.unlabeled_category)

    def _label_codes(self, adata: ad.AnnData) -> np.ndarray:
        """Codes of labels, (N,); after those the number of a set of labels."""
        if self.labels_key not in adata.obs:  # new cells may come without labels
            return np.full(adata.n_obs, UNLABELED)
        column = column_of(adata, self.labels_key)
        known = [*self.classes, *self.sources.set_names]
        codes = codes_of(column, [*known, self.unlabeled_category])
        unseen = names_of_cells(column, codes == UNSEEN)
        check_meant(unseen, self.labels_key, self.unlabeled_category)
        refuse_unseen(unseen, self.classes, f"obs[{self.labels_key!r}]", "labels")
        return np.where((codes == len(known)) | (codes == MISSING), UNLABELED, codes)

    def _read_covariates(self, adata: ad.AnnData) -> dict[str, Any]:
        keys = [self.batch_key, self.size_factor_key]
        keys += [*self.categorical_covariate_keys, *self.continuous_covariate_keys]
        check_keys(adata, [k for k in keys if k])
        return {
            "batch": self._batch_codes(adata),
            "continuous": self._continuous(adata),
            "categorical": self._categorical(adata),
            "size_factor": self._size_factor(adata),
        }

    def _read_covariates_if_possible(self, adata: ad.AnnData) -> dict[str, Any]:
        try:
            return self._read_covariates(adata)
        except InputError:  # None and not a number: whoever reads them after all fails
            return dict.fromkeys(("batch", "continuous", "categorical", "size_factor"))

    def _extra_data(self, adata: ad.AnnData, needed: bool) -> Named:
        values, unread = {}, {}
        for extra in self.extra:
            try:
                values[extra.name] = extra.read(adata, self.genes)
            except InputError as error:
                if needed:
                    raise
                unread[extra.name] = str(error)
        return Named(values, unread)

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


def differ(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray:
    """Whether the entries of each cell differ, (N,), or of two Nones, which are equal."""
    if one is None or other is None:
        return np.array(one is not other)
    return (one != other).reshape(len(one), -1).any(1)


def _batches(adata: ad.AnnData, batch_key: str) -> np.ndarray:
    if not batch_key:
        return np.array(["all cells"])
    batches = categories(adata, batch_key)
    if len(batches) == 1:
        message = f"obs[{batch_key!r}] has one value, {batches[0]!r}: the batch explains nothing"
        warnings.warn(message, stacklevel=3)
    return batches
