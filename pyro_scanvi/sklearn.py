"""SCANVI as a classifier of scikit-learn: arrays of counts, for its pipelines and searches.

The file is called as those of other packages with such a layer; ``import sklearn`` is still
scikit-learn, whatever stands beside it.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.random import RandomState
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    check_non_negative,
    validate_data,
)

from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.names import name_of, names_of
from pyro_scanvi.storage.parts import parts_in

#: The checks of scikit-learn that fail, and why; as ``check_estimator`` takes them.
EXPECTED_FAILED_CHECKS = {
    "check_classifiers_classes": "it labels cells -1, which says here that the label is not known, "
    "as it does in sklearn.semi_supervised; with unlabeled_category=None the check passes",
}


class SCANVIClassifier(
    ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator
):
    """:class:`~pyro_scanvi.SCANVI` behind the interface of scikit-learn.

    X holds counts, cells by genes, as an array, a sparse matrix or a DataFrame; y a label for each
    cell, or -1 where it is not known. It passes scikit-learn's ``check_estimator`` but for
    ``EXPECTED_FAILED_CHECKS``; the fractions that it is fed there are made into counts by
    `to_counts`.

    Parameters
    ----------
    n_latent
        Dimensions of the latent space.
    max_epochs
        Passes over the data; None is what :meth:`~pyro_scanvi.SCANVI.train` takes.
    method
        How labels are found, see :meth:`~pyro_scanvi.SCANVI.predict`; None is the model's choice.
    unlabeled_category
        The value of y where the label is not known: -1 as in scikit-learn's semi_supervised, or a
        name such as "Unknown". None: every cell is labelled.
    to_counts
        Called with X, wherever it comes, after it was checked; what it returns is read as counts.
        ``np.rint`` is for corrected counts. None: X holds counts, and SCANVI refuses what looks
        normalised, and rounds other fractions with a warning.
    model_kwargs
        Further arguments of :class:`~pyro_scanvi.SCANVI`: ``{"n_hidden": 64}``.
    train_kwargs
        Further arguments of :meth:`~pyro_scanvi.SCANVI.train`: ``{"batch_size": 512}``.
    random_state
        Of weights, split, shuffling and draws: an integer, a RandomState, or None for numpy's own.

    Attributes
    ----------
    model_
        The trained :class:`~pyro_scanvi.SCANVI`, which answers all its other questions. Its genes
        are called as the columns of X, or by their numbers; labels are ``obs["y"]``.
    classes_
        The labels, sorted, (L,).
    n_features_in_, feature_names_in_
        Number of genes, and their names where X was a DataFrame.

    Notes
    -----
    A pickle holds the model as :meth:`~pyro_scanvi.SCANVI.save` writes it, with its cells, so that
    later versions open it as they open saved models. As any pickle, it is to be opened only where
    its sender is trusted; ``model_.save(folder)`` has none.

    Examples
    --------
    >>> import numpy as np
    >>> from pyro_scanvi import datasets
    >>> from pyro_scanvi.sklearn import SCANVIClassifier
    >>> adata = datasets.pbmc68k_counts()
    >>> y = adata.obs["cell_type"].to_numpy(dtype=object)
    >>> y[::2] = -1
    >>> classifier = SCANVIClassifier(max_epochs=1, random_state=0)  # more in earnest
    >>> classifier.fit(adata.X, y).predict_proba(adata.X).shape  # cells by types
    (700, 10)
    >>> classifier.transform(adata.X).shape
    (700, 20)
    """

    def __init__(
        self,
        n_latent: int = 20,
        max_epochs: int | None = None,
        *,
        method: str | None = None,
        unlabeled_category: Any = -1,
        to_counts: Callable[[Any], Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        train_kwargs: Mapping[str, Any] | None = None,
        random_state: int | RandomState | None = None,
    ):
        self.n_latent = n_latent
        self.max_epochs = max_epochs
        self.method = method
        self.unlabeled_category = unlabeled_category
        self.to_counts = to_counts
        self.model_kwargs = model_kwargs
        self.train_kwargs = train_kwargs
        self.random_state = random_state

    def fit(self, X: Any, y: Any, batch: Sequence | None = None) -> "SCANVIClassifier":
        """Train a new model.

        Parameters
        ----------
        X
            Counts, (N, G).
        y
            Label of each cell, or `unlabeled_category`, (N,).
        batch
            Biological batch of each cell, (N,), which the latent space is freed of;
            ``cross_validate(..., params={"batch": batch})`` hands it on. New cells come without
            one, so that ``encode_covariates`` and ``method="bayes"``, which read it, are refused.

        Raises
        ------
        InputError, ValueError
            For what is not counts, for labels that are no labels, and lengths that differ.
        """
        X, y = validate_data(self, X, y, accept_sparse="csr", ensure_min_samples=2)
        adata = self._cells(X)
        adata.obs["y"] = self._labels(y)
        if batch is not None:
            check_consistent_length(X, batch)
            adata.obs["batch"] = np.asarray(batch)
        with warnings.catch_warnings():  # a classifier of labelled cells is what is usual here
            warnings.filterwarnings("ignore", "'.*' does not occur in .*: all", UserWarning)
            SCANVI.setup_anndata(
                adata,
                labels_key="y",
                unlabeled_category=str(self.unlabeled_category),
                batch_key=None if batch is None else "batch",
            )
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        arguments = {"seed": seed, "n_latent": self.n_latent, **(self.model_kwargs or {})}
        settings = {"max_epochs": self.max_epochs, "progress_bar": False}
        model = SCANVI(adata, **arguments).train(**{**settings, **(self.train_kwargs or {})})
        self.model_, self.classes_ = model, model.fields.classes
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Label of each cell, (N,)."""
        codes = self.predict_proba(X).argmax(axis=1)
        return self.classes_[codes]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each of ``classes_``, (N, L)."""
        cells, seed = self._known_genes(X), self.model_.seed
        return self.model_.predict(cells, soft=True, method=self.method, seed=seed).to_numpy()

    def transform(self, X: Any) -> np.ndarray:
        """Latent state of each cell, the mean of q(z | x), (N, n_latent)."""
        cells = self._known_genes(X)
        return self.model_.get_latent_representation(cells, seed=self.model_.seed)

    def _known_genes(self, X: Any) -> ad.AnnData:
        """Cells to ask about; NotFittedError, or ValueError where X has other columns."""
        check_is_fitted(self)
        return self._cells(validate_data(self, X, reset=False, accept_sparse="csr"))

    def _cells(self, X: Any) -> ad.AnnData:
        """Checked X as an AnnData, genes by name."""
        check_non_negative(X, type(self).__name__)
        counts = X if self.to_counts is None else self.to_counts(X)
        genes = getattr(self, "feature_names_in_", np.arange(X.shape[1]).astype(str))
        cells = np.arange(X.shape[0]).astype(str)
        return ad.AnnData(counts, pd.DataFrame(index=cells), pd.DataFrame(index=genes))

    def _labels(self, y: np.ndarray) -> pd.Categorical:
        """The labels of y, NaN where they are not known."""
        unknown = np.array(names_of(y)) == name_of(self.unlabeled_category)
        known = np.array(y[~unknown].tolist())  # of numbers or of strings, where y has objects
        check_classification_targets(known)
        labels = y.astype(object)
        labels[unknown] = np.nan
        return pd.Categorical(labels, categories=np.unique(known))

    @property
    def _n_features_out(self) -> int:
        return self.model_.module.n_latent

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = tags.input_tags.positive_only = True
        tags.transformer_tags.preserves_dtype = []  # latent states are float32
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "model_": _Folder.of(self.model_)} if "model_" in state else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {"model_": state["model_"].opened()} if "model_" in state else {}
        super().__setstate__({**state, **opened})


@dataclass(frozen=True)
class _Folder:
    """A saved model, file by file, and what its folder does not hold: its code, by reference."""

    files: dict[str, bytes]
    module_class: type[SCANVAE]
    parts: dict[str, Any]

    @classmethod
    def of(cls, model: SCANVI) -> "_Folder":
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "model")
            model.save(folder, save_anndata=True)
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return cls(files, type(model.module), parts_in(model.vae_arguments))

    def opened(self) -> SCANVI:
        with tempfile.TemporaryDirectory() as place:
            for name, data in self.files.items():
                Path(place, name).write_bytes(data)
            return SCANVI.load(place, module_class=self.module_class, parts=self.parts)
