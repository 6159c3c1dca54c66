"""What an AnnData says of labels beside one exact label a cell.

Labels that are named without labelling any cell, names of sets of labels or of nodes of a tree, a
second column of coarser labels, soft labels, and the labels of further annotators.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import issparse

from pyro_scanvi.data.columns import (
    MISSING,
    UNSEEN,
    check_keys,
    check_meant,
    codes_of,
    column_of,
    listed_keys,
    names_of_cells,
    one_key,
    refuse_unseen,
)
from pyro_scanvi.data.minibatches import LOG_IMPOSSIBLE, UNLABELED
from pyro_scanvi.names import first, listed, name_of, names_of
from pyro_scanvi.validation import InputError

Sets = dict[str, tuple[str, ...]]
SMALLEST_SUM = 1e-6  # of a soft label; less is none


@dataclass(frozen=True)
class LabelSources:
    """Where else labels stand, and which sets of labels have a name.

    Attributes
    ----------
    labels
        Names of labels that may not label any cell.
    set_names, set_members
        Names of sets of labels, and the labels in each of them.
    coarse_key
        Column of ``obs`` with coarser labels, read where the label is not known; empty is none.
    coarse_names, coarse_members
        What stands in that column, and the labels that each stands for.
    soft_key
        Matrix of ``obsm`` with a probability of each label; read where nothing else is known.
    annotator_keys
        Columns of ``obs`` with the labels of further annotators.
    """

    labels: tuple[str, ...] = ()
    set_names: tuple[str, ...] = ()
    set_members: tuple[tuple[str, ...], ...] = ()
    coarse_key: str = ""
    coarse_names: tuple[str, ...] = ()
    coarse_members: tuple[tuple[str, ...], ...] = ()
    soft_key: str = ""
    annotator_keys: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        labels: Iterable | None = None,
        label_sets: Mapping[str, Iterable] | None = None,
        label_parents: Mapping[str, str] | None = None,
        coarse_labels_key: str | None = None,
        soft_labels_key: str | None = None,
        annotator_keys: Iterable[str] | None = None,
    ) -> "LabelSources":
        """As :meth:`pyro_scanvi.SCANVI.setup_anndata` is given them; raises InputError.

        Examples
        --------
        >>> tree = LabelSources.of(label_parents={"CD4": "T", "CD8": "T", "T": "lymphoid"})
        >>> tree.set_names, tree.set_members
        (('T', 'lymphoid'), (('CD4', 'CD8'), ('CD4', 'CD8')))
        """
        sets = _leaves(_joined(_checked_sets(label_sets), _children(label_parents)))
        named = _checked_names("labels", labels)
        both = [name for name in named if name in sets]
        if both:
            raise InputError(
                f"labels names {listed(both)}, which is also a set of labels; name its labels only"
            )
        return cls(
            labels=named,
            set_names=tuple(sets),
            set_members=tuple(sets.values()),
            coarse_key=one_key("coarse_labels_key", coarse_labels_key),
            soft_key=one_key("soft_labels_key", soft_labels_key),
            annotator_keys=listed_keys("annotator_keys", annotator_keys),
        )

    @property
    def sets(self) -> Sets:
        """All sets of labels that have a name, and the labels in each."""
        coarse = dict(zip(self.coarse_names, self.coarse_members, strict=True))
        return coarse | dict(zip(self.set_names, self.set_members, strict=True))

    @property
    def refines(self) -> bool:
        """Whether a cell may be known by more than one exact label."""
        return bool(self.set_names or self.coarse_key or self.soft_key)

    def found(self, adata: ad.AnnData, labels_key: str, unlabeled: str) -> "LabelSources":
        """The same with the sets that the coarser labels of an AnnData stand for.

        A coarser label is the set of those labels that stand beside it in cells that have both.

        Raises
        ------
        InputError
            If a column is missing, a coarser label stands beside none, or the unlabelled category
            is named as a label.
        """
        if labels_key in self.annotator_keys:
            raise InputError(
                f"annotator_keys names {labels_key!r}, which is labels_key, the first annotator; "
                "leave it out"
            )
        coarse = [self.coarse_key] if self.coarse_key else []
        check_keys(adata, [*coarse, *self.annotator_keys])
        if self.soft_key and self.soft_key not in adata.obsm:
            raise InputError(
                f"obsm has no {self.soft_key!r}, which soft_labels_key names; there are: "
                f"{', '.join(adata.obsm) or 'none'}"
            )
        self._check_not_unlabeled(adata, unlabeled)
        for key in (*coarse, *self.annotator_keys):
            check_meant(names_of_cells(column_of(adata, key), None), key, unlabeled)
        if not coarse:
            return self
        sets = self._coarse_sets(adata, labels_key, unlabeled)
        return replace(self, coarse_names=tuple(sets), coarse_members=tuple(sets.values()))

    def _check_not_unlabeled(self, adata: ad.AnnData, unlabeled: str) -> None:
        """Refuse a label or a set that is called as the cells that have none."""
        places = {
            "labels": self.labels,
            "label_sets or label_parents": [*self.set_names, *itertools.chain(*self.set_members)],
            f"obsm[{self.soft_key!r}]": _soft_columns(adata, self.soft_key),
        }
        for place, names in places.items():
            if unlabeled in names:
                raise InputError(
                    f"{place} names {unlabeled!r}, which is unlabeled_category: that the label is "
                    "not known; leave it out, or call the label otherwise"
                )

    def _coarse_sets(self, adata: ad.AnnData, labels_key: str, unlabeled: str) -> Sets:
        names = [_names_in(adata, key, unlabeled) for key in (self.coarse_key, labels_key)]
        pairs = pd.DataFrame(dict(zip(("coarse", "fine"), names, strict=True)))
        known = pairs.dropna()[~pairs.dropna()["fine"].isin(self.set_names)]
        found = known.groupby("coarse")["fine"].unique()
        named = dict(zip(self.set_names, self.set_members, strict=True))
        sets = {str(name): named.get(name, tuple(sorted(fine))) for name, fine in found.items()}
        alone = [
            name
            for name in pairs["coarse"].dropna().unique()
            if name not in {*sets, *self.set_names, *self.labels}
        ]
        if alone:
            raise InputError(
                f"obs[{self.coarse_key!r}] holds {listed(alone)}, beside which no cell has a "
                f"label in obs[{labels_key!r}]; say which labels it stands for: label_sets="
                f"{{{alone[0]!r}: [...]}}, or that it is a label itself: labels=[{alone[0]!r}]"
            )
        return sets

    def named(self, adata: ad.AnnData, unlabeled: str) -> list[str]:
        """All labels that are named here or by other columns than that of the labels."""
        members = [name for labels in self.set_members for name in labels]
        given = [
            name
            for key in self.annotator_keys
            for name in _names_in(adata, key, unlabeled).dropna().unique()
        ]
        names = [*self.labels, *members, *_soft_columns(adata, self.soft_key), *given]
        return [name for name in dict.fromkeys(names) if name not in self.set_names]

    def read(
        self, adata: ad.AnnData, codes: np.ndarray, classes: np.ndarray, unlabeled: str
    ) -> dict[str, np.ndarray | None]:
        """Labels, evidence and annotations of cells, as of CellData.

        Parameters
        ----------
        adata
            The cells; what it lacks is not known of them.
        codes
            Of their labels, (N,): of a set the number of labels and the number of the set.
        classes
            Names of the labels.
        unlabeled
            The category of labels that are not known.
        """
        n_labels = len(classes)
        label = np.where(codes < n_labels, codes, UNLABELED)
        annotations = self._annotations(adata, classes, unlabeled)
        if not self.refines:
            return {"label": label, "annotations": annotations}
        labels = names_of(classes)
        allowed = _allowed(codes, labels, [*((label,) for label in labels), *self.set_members])
        unknown = codes == UNLABELED
        allowed[unknown] = self._coarse(adata, classes, unlabeled)[unknown]
        evidence = np.where(allowed, 0.0, LOG_IMPOSSIBLE).astype(np.float32)
        unknown &= allowed.all(1)
        evidence[unknown] = self._soft(adata, classes)[unknown]
        sure = (evidence > LOG_IMPOSSIBLE).sum(1) == 1
        label = np.where(sure, evidence.argmax(1), label)
        return {"label": label, "evidence": evidence, "annotations": annotations}

    def _coarse(self, adata: ad.AnnData, classes: np.ndarray, unlabeled: str) -> np.ndarray:
        """Which labels the coarser label of each cell allows, (N, L)."""
        labels = names_of(classes)
        if not self.coarse_key or self.coarse_key not in adata.obs:
            return np.ones((adata.n_obs, len(labels)), dtype=bool)
        # A name of the column itself comes before a set or a label of the same name.
        meant: Sets = {label: (label,) for label in labels}
        meant |= dict(zip(self.set_names, self.set_members, strict=True))
        meant |= dict(zip(self.coarse_names, self.coarse_members, strict=True))
        codes = _known(adata, self.coarse_key, list(meant), unlabeled)
        return _allowed(codes, labels, list(meant.values()))

    def _soft(self, adata: ad.AnnData, classes: np.ndarray) -> np.ndarray:
        """Log probability of each label, (N, L); zeros where there is none."""
        shape = (adata.n_obs, len(classes))
        if not self.soft_key or self.soft_key not in adata.obsm:
            return np.zeros(shape, dtype=np.float32)
        columns, where = _soft_columns(adata, self.soft_key), f"obsm[{self.soft_key!r}]"
        refuse_unseen(
            pd.Series(columns)[~np.isin(columns, names_of(classes))], classes, where, "labels"
        )
        columns = columns or names_of(classes)
        values = _soft_values(adata.obsm[self.soft_key], where)
        _check_soft(values, columns, shape[1], adata, self.soft_key)
        probabilities = np.zeros(shape)
        probabilities[:, [names_of(classes).index(name) for name in columns]] = values
        total = probabilities.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            logarithm = np.log(probabilities / total)
        logarithm = np.maximum(logarithm, LOG_IMPOSSIBLE)
        return np.where(total > SMALLEST_SUM, logarithm, 0.0).astype(np.float32)

    def _annotations(
        self, adata: ad.AnnData, classes: np.ndarray, unlabeled: str
    ) -> np.ndarray | None:
        """Codes of the labels of further annotators, (N, A)."""
        if not self.annotator_keys:
            return None
        columns = [
            _known(adata, key, names_of(classes), unlabeled)
            if key in adata.obs
            else np.full(adata.n_obs, UNLABELED)
            for key in self.annotator_keys
        ]
        return np.stack(columns, 1)


def _allowed(codes: np.ndarray, labels: list[str], meant: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Which labels are meant by the code of each cell, (N, L); all of them where there is none."""
    table = np.array([[label in names for label in labels] for names in meant])
    return np.where((codes == UNLABELED)[:, None], True, table[codes])


def _known(adata: ad.AnnData, key: str, names: list[str], unlabeled: str) -> np.ndarray:
    """Position of each cell's label among the names, ``UNLABELED`` where there is none."""
    column = column_of(adata, key)
    codes = codes_of(column, [*names, unlabeled])
    unseen = names_of_cells(column, codes == UNSEEN)
    check_meant(unseen, key, unlabeled)
    refuse_unseen(unseen, names, f"obs[{key!r}]", "labels")
    return np.where((codes == len(names)) | (codes == MISSING), UNLABELED, codes)


def _names_in(adata: ad.AnnData, key: str, unlabeled: str) -> pd.Series:
    """The label of each cell by name; missing where it is not known."""
    values = adata.obs[key].astype(object)
    names = values.where(values.isna(), values.map(name_of))
    return names.where(names != unlabeled)


def _soft_columns(adata: ad.AnnData, key: str) -> list[str]:
    """Names of the columns of soft labels; none of an array."""
    found = adata.obsm.get(key) if key else None
    return names_of(getattr(found, "columns", []))


def _soft_values(found: Any, where: str) -> np.ndarray:
    """Soft labels as a matrix in float64."""
    try:
        values = np.asarray(found.toarray() if issparse(found) else found, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where} does not hold numbers; give probabilities of labels") from None
    if values.ndim != 2:
        raise InputError(f"{where} has shape {values.shape}, expected cells by labels")
    return values


def _check_soft(
    values: np.ndarray, columns: list[str], n_labels: int, adata: ad.AnnData, key: str
) -> None:
    if values.shape[1] != len(columns):
        raise InputError(
            f"obsm[{key!r}] has {values.shape[1]} columns without names, expected {n_labels}, one "
            "for each label in the order of the labels; a DataFrame names them"
        )
    if len(set(columns)) < len(columns):
        raise InputError(f"obsm[{key!r}] has several columns of one label: {listed(columns)}")
    wrong = (np.nan_to_num(values) < 0).any(1) | np.isinf(values).any(1)
    partly = np.isnan(values).any(1) & ~np.isnan(values).all(1)
    if (wrong | partly).any():
        raise InputError(
            f"obsm[{key!r}] holds soft labels that are negative, infinite or partly missing"
            f"{first(adata.obs_names[wrong | partly])}; give probabilities, and NaN or zeros "
            "throughout where nothing is known"
        )


def _checked_names(argument: str, names: Iterable | None) -> tuple[str, ...]:
    if isinstance(names, str):
        raise InputError(f"{argument}={names!r}, expected a list: [{names!r}]")
    if names is not None and not isinstance(names, Iterable):
        raise InputError(f"{argument}={names!r}, expected a list of names")
    return tuple(names_of(() if names is None else names))


def _checked_sets(sets: Mapping[str, Iterable] | None) -> Sets:
    if sets is not None and not isinstance(sets, Mapping):
        raise InputError(f"label_sets={sets!r}, expected a dict from the name of a set to labels")
    checked = {
        name_of(name): _checked_names(f"label_sets[{name!r}]", members)
        for name, members in (sets or {}).items()
    }
    for name, members in checked.items():
        if not members:
            raise InputError(f"label_sets[{name!r}] is empty; name the labels in it")
    return checked


def _children(parents: Mapping[str, str] | None) -> Sets:
    """Sets from a map of each label, or node, to the node above it."""
    if parents is not None and not isinstance(parents, Mapping):
        raise InputError(f"label_parents={parents!r}, expected a dict from a label to its parent")
    children: dict[str, tuple[str, ...]] = {}
    known = {c: p for c, p in (parents or {}).items() if not pd.isna(p)}  # without one: a root
    for child, parent in known.items():
        children[name_of(parent)] = (*children.get(name_of(parent), ()), name_of(child))
    return children


def _joined(sets: Sets, tree: Sets) -> Sets:
    for name in sets.keys() & tree.keys():
        raise InputError(
            f"{name!r} is a set in label_sets and a parent in label_parents; say it in one of them"
        )
    return sets | tree


def _leaves(sets: Mapping[str, tuple[str, ...]]) -> Sets:
    """The labels of each set, where members may be sets themselves."""
    return {name: tuple(dict.fromkeys(_leaves_of(name, sets, ()))) for name in sets}


def _leaves_of(
    name: str, sets: Mapping[str, tuple[str, ...]], above: tuple[str, ...]
) -> Iterable[Any]:
    if name in above:
        raise InputError(f"the set of labels {name!r} holds itself, by {' > '.join(above)}")
    if name not in sets:
        return [name]
    return [leaf for member in sets[name] for leaf in _leaves_of(member, sets, (*above, name))]
