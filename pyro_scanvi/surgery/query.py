"""New cells for a trained reference: brought to its genes, with room for their new categories."""

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse

from pyro_scanvi.annotation.consensus import Consensus
from pyro_scanvi.data.columns import categories, check_gene_names, check_keys, check_names
from pyro_scanvi.data.fields import Fields
from pyro_scanvi.model.growth import grown_label_prior
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.names import first, names_of, reads_unlabeled
from pyro_scanvi.validation import InputError

SMALLEST_OVERLAP = 0.8
LIBRARY_PRIOR = ("library_log_means", "library_log_vars")  # arguments, and buffers


@dataclass(frozen=True)
class Reference:
    """What is read of a reference: model, columns, arguments, seed, training, label rules."""

    vae: SCANVAE
    fields: Fields
    arguments: Mapping[str, Any]
    seed: int
    is_trained: bool
    consensus: Consensus | None = None

    def grown_arguments(self, n_labels: int) -> dict[str, Any]:
        """Arguments for a model of more labels; those that depend on batches are left out."""
        arguments = copy.deepcopy(dict(self.arguments))
        for name in LIBRARY_PRIOR:  # of old batches from the weights, of new ones from the data
            arguments.pop(name, None)
        if n_labels > self.vae.n_labels and arguments.get("labels_groups") is not None:
            raise InputError(
                "extend_labels cannot be used with labels_groups: the group of a new label is not "
                "known; train a model with the new labels and their groups from scratch"
            )
        if n_labels > self.vae.n_labels and self.vae.label_noise.is_matrix:
            raise InputError(
                f"extend_labels cannot be used here: label_noise of the reference is a confusion "
                f"matrix of its {self.vae.n_labels} labels; train a reference that knows the names "
                "of the new ones, SCANVI.setup_anndata(..., labels=[...]), or one with "
                "label_noise='rate', which takes new labels"
            )
        if arguments.get("y_prior") is not None:
            arguments["y_prior"] = grown_label_prior(self.vae.y_prior, n_labels).tolist()
        return arguments


def prepare(adata: ad.AnnData, fields: Fields) -> ad.AnnData:
    """A new AnnData of the same cells with the genes of `fields`; zeros where one is missing."""
    check_names(adata)
    fields.place.matrix(adata)
    genes = pd.Index(fields.genes)
    names = fields.place.genes(adata)
    check_gene_names(names)
    positions = names.get_indexer(genes)
    _check_overlap(genes[positions < 0], genes)
    prepared = ad.AnnData(
        obs=adata.obs.copy(),
        var=pd.DataFrame({"in_query": positions >= 0}, index=genes),
        obsm={name: value.copy() for name, value in adata.obsm.items()},
        obsp={name: value.copy() for name, value in adata.obsp.items()},
        uns=copy.deepcopy(dict(adata.uns)),
    )
    if fields.use_raw:  # X may hold anything of other genes
        prepared.X = _columns(adata.raw.X, positions)
        prepared.raw = prepared
        own = adata.var_names.get_indexer(genes)
        for name in fields.extra_layers:  # which have the genes of X
            if name in adata.layers:
                prepared.layers[name] = _columns(adata.layers[name], own)
        return prepared
    prepared.X = None if adata.X is None else _columns(adata.X, positions)
    for name, matrix in adata.layers.items():
        prepared.layers[name] = _columns(matrix, positions)
    return prepared


def extended(
    fields: Fields, adata: ad.AnnData, extend_labels: Iterable, extend_categories: bool
) -> Fields:
    """The fields with new labels, and with those batches and categories that they lack."""
    check_names(adata)
    fields.check_genes(adata)
    labels = _checked_labels(fields, extend_labels)
    _say_untaught(fields, adata, labels)
    fields = replace(fields, classes=_appended(fields.classes, labels))
    if not extend_categories:
        return fields
    batch_keys = [fields.batch_key] if fields.batch_key else []
    check_keys(adata, [*batch_keys, *fields.categorical_covariate_keys])
    known = zip(fields.categorical_covariate_keys, fields.covariate_categories, strict=True)
    covariates = tuple(_with_unseen(values, adata, key) for key, values in known)
    batches = [_with_unseen(fields.batches, adata, key) for key in batch_keys] or [fields.batches]
    return replace(fields, batches=batches[0], covariate_categories=covariates)


def check_grown(old: Fields, new: Fields) -> None:
    """Refuse a model whose categories do not begin with those of the reference."""
    olds = [old.classes, old.batches, *old.covariate_categories]
    news = [new.classes, new.batches, *new.covariate_categories]
    same = np.array_equal(old.genes, new.genes) and len(olds) == len(news)
    if not same or not all(map(_begins_with, news, olds)):
        raise InputError(
            "genes, labels or batches do not begin with those of the reference: this model did "
            "not grow out of it"
        )


def _begins_with(names: np.ndarray, start: np.ndarray) -> bool:
    return names_of(names)[: len(start)] == names_of(start)


def _columns(matrix: Any, positions: np.ndarray) -> csr_matrix | np.ndarray:
    """Columns at `positions`, zeros where -1; sparse ones become CSR and never dense."""
    there = np.flatnonzero(positions >= 0)
    shape = (matrix.shape[0], len(positions))
    if not issparse(matrix):
        filled = np.zeros(shape, dtype=matrix.dtype)
        filled[:, there] = np.asarray(matrix)[:, positions[there]]
        return filled
    chosen = csr_matrix(matrix)[:, positions[there]]
    placed = csr_matrix((chosen.data, there[chosen.indices], chosen.indptr), shape=shape)
    placed.sort_indices()
    return placed


def _check_overlap(missing: pd.Index, genes: pd.Index) -> None:
    if len(missing) == len(genes):
        raise InputError(
            f"none of the reference's {len(genes)} genes{first(genes)} is in the "
            "query; name its genes in the same way (symbols or identifiers, upper or lower case)"
        )
    if len(genes) - len(missing) < SMALLEST_OVERLAP * len(genes):
        warnings.warn(
            f"{len(missing)} of the reference's {len(genes)} genes are missing in the query"
            f"{first(missing)} and count as zero; predictions may be poor",
            stacklevel=4,
        )


def _checked_labels(fields: Fields, extend_labels: Iterable) -> list:
    if isinstance(extend_labels, str):
        raise InputError(f"extend_labels={extend_labels!r}, expected a list: [{extend_labels!r}]")
    labels = list(extend_labels)
    known, names = names_of(fields.classes), names_of(labels)
    for i, name in enumerate(names):
        clashes = {
            "is a label of the reference": name in known,
            "is a set of labels of the reference": name in fields.sources.set_names,
            "is the unlabelled category": name == fields.unlabeled_category,
            f"reads like the unlabelled category {fields.unlabeled_category!r}": reads_unlabeled(
                name, fields.unlabeled_category
            ),
            "is named twice": name in names[:i],
        }
        for clash in (what for what, holds in clashes.items() if holds):
            raise InputError(
                f"extend_labels: {labels[i]!r} {clash}; name labels that are new, once"
            )
    return labels


def _say_untaught(fields: Fields, adata: ad.AnnData, labels: list) -> None:
    """Warn of new labels that no cell teaches, or that nothing tells from the known ones."""
    if not labels:
        return
    shown = _names_shown(adata, fields.labels_key)
    untaught = [name for name in names_of(labels) if name not in shown]
    if untaught:
        message = (
            f"no cell of the query is labelled {', '.join(untaught)}: nothing teaches the model "
            "these new labels"
        )
    elif not shown & set(names_of(fields.classes)):
        message = (
            "no cell of the query has a label of the reference: nothing tells the new labels from "
            "the known ones, and they will be given to cells of known types; label some of those"
        )
    else:
        return
    warnings.warn(message, stacklevel=4)


def _names_shown(adata: ad.AnnData, key: str) -> set[str]:
    """The labels that occur."""
    return set(names_of(adata.obs[key].dropna().unique())) if key in adata.obs else set()


def _with_unseen(known: np.ndarray, adata: ad.AnnData, key: str) -> np.ndarray:
    found = categories(adata, key)
    return _appended(known, found[~np.isin(names_of(found), names_of(known))])


def _appended(known: np.ndarray, new: Iterable) -> np.ndarray:
    """All of them in one array; as strings where one type of numbers does not hold them."""
    values = [*known.tolist(), *new]
    together = np.array(values) if len(values) > len(known) else known
    same = names_of(together) == names_of(values)
    return together if same else np.array(names_of(values), dtype=object)
