"""Which label has a cell? The classifier's answer, or that of Bayes' rule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import anndata as ad
import numpy as np
import pandas as pd
from torch import Tensor

from pyro_scanvi.data.minibatches import CellData, Cells
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import minibatch_size, over_minibatches, seeded
from pyro_scanvi.posterior.importance import label_posterior, label_posterior_of_states
from pyro_scanvi.posterior.trained import Trained
from pyro_scanvi.validation import (
    InputError,
    check_at_least,
    is_number,
    look_up,
    plain_arguments,
)

ROUNDING = 1e-6  # of a sum of probabilities in float32


class Labels(Trained):
    """The question of the label of a cell."""

    @plain_arguments
    def predict(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        soft: bool = False,
        batch_size: int | None = None,
        use_posterior_mean: bool = True,
        method: str = "classifier",
        keep_observed: bool = False,
        n_mc_samples: int = 100,
        seed: int | None = None,
        *,
        confidence: float | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Label of each cell, by the classifier or by Bayes' rule.

        Parameters
        ----------
        adata
            Cells with the genes of the training data; None is the training data.
        indices
            Positions of the cells; None is all.
        soft
            Return probabilities, a DataFrame of cells by classes.
        batch_size
            Cells in a minibatch at most; changes speed and memory, and which numbers are drawn.
        use_posterior_mean
            Classify the mean of q(z | x), not a sample.
        method
            "classifier" is q(y | z). "bayes" is p(y | x), the posterior of the model itself, by
            importance sampling (:mod:`pyro_scanvi.posterior.importance`); it never asks the
            classifier. "states" is p(y | z, x), the model's too, averaged over draws of the guide
            without weights: less noise, if q(z | x) is taken for the posterior of z.
        keep_observed
            Take in what is known of the label of each cell: q(y | z, e) or p(y | x, e). An exact
            label is kept with probability 1; within a set of labels the model chooses; of a label
            that may be wrong (``label_noise``) it is the posterior of the label, not the noise.
        n_mc_samples
            Draws of z for each cell; read by "bayes" and "states".
        seed
            Of what is drawn; None draws on from torch's generator.
        confidence
            Answer with the smallest of the labels, and of the sets of labels that were set up
            (``label_sets``, ``label_parents``, ``coarse_labels_key``), that has this probability at
            least: the parent where the leaf is unsure. Where none has, with the unlabelled
            category. The probabilities are the model's, which may be overconfident.

        Returns
        -------
        ndarray or DataFrame
            Labels or names of sets, (N,); with `soft` probabilities, (N, L).

        Raises
        ------
        InputError
            If the AnnData is not what the model was set up with; for an unknown method, a number
            of draws below 1, a negative seed, or a confidence that is no share or comes with
            `soft`. Bayes' rule refuses a ``model`` or ``guide`` of
            one's own with a site that cannot be weighed, or without a y
            (:mod:`pyro_scanvi.posterior.traces`).
        """
        check_at_least(1, n_mc_samples=n_mc_samples)
        check_confidence(confidence, soft)
        methods: dict[str, Method] = {
            "classifier": ByClassifier(use_posterior_mean, keep_observed),
            "bayes": ByBayesRule(n_mc_samples, keep_observed),
            "states": ByBayesRule(n_mc_samples, keep_observed, label_posterior_of_states),
        }
        ask = look_up(methods, method, "method")
        covariates, extra = ask.reads_covariates(self.module), ask.reads_extra
        data, names = self.encoded(adata, indices, keep_observed, covariates, extra)
        with seeded(seed):
            probabilities = ask(self.module, data, minibatch_size(batch_size))
        if soft:
            return pd.DataFrame(probabilities, index=names, columns=self.fields.classes)
        if confidence is not None:
            sets, unsure = self.fields.sources.sets, self.fields.unlabeled_category
            return partial_answers(probabilities, self.fields.classes, sets, confidence, unsure)
        return self.fields.classes[probabilities.argmax(1)]


def partial_answers(
    probabilities: np.ndarray,
    classes: Iterable,
    sets: Mapping[str, Sequence[str]],
    confidence: float,
    unsure: str,
) -> np.ndarray:
    """The smallest label or set of labels of each cell that has a probability.

    Of sets of one size it is the more probable one.

    Parameters
    ----------
    probabilities
        Of each label, (N, L).
    classes
        The labels, L.
    sets
        The labels in each set, by its name.
    confidence
        The probability.
    unsure
        The answer where nothing has it.

    Returns
    -------
    ndarray
        Names, (N,).

    Examples
    --------
    >>> p = np.array([[0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [0.4, 0.1, 0.5]])
    >>> partial_answers(p, ["CD4", "CD8", "B"], {"T": ["CD4", "CD8"]}, 0.9, "Unknown")
    array(['CD4', 'T', 'Unknown'], dtype=object)
    """
    leaves = [str(name) for name in classes]
    members = np.vstack([np.eye(len(leaves)), *(np.isin(leaves, sets[name]) for name in sets)])
    names = np.array([*leaves, *sets, unsure], dtype=object)
    of_sets = probabilities.astype(float) @ members.T  # cells by labels and sets
    # Sizes differ by 1 at least, and probabilities by less than 2.
    cost = 2 * members.sum(1) - of_sets
    sure = of_sets >= confidence - ROUNDING
    best = np.where(sure, cost, np.inf).argmin(1)
    return names[np.where(sure.any(1), best, len(names) - 1)]


def check_confidence(confidence: float | None, soft: bool) -> None:
    """Refuse what is no probability, and an answer of two kinds."""
    if confidence is None:
        return
    if not (is_number(confidence) and 0 < confidence <= 1):
        raise InputError(f"confidence={confidence!r}, expected a probability, such as 0.9")
    if soft:
        raise InputError("soft=True gives probabilities and confidence= names; ask for one of them")


class Method(Protocol):
    """A way to find labels, and what it reads of the cells."""

    reads_extra: ClassVar[bool]  # extra data, which are observed

    def reads_covariates(self, vae: SCANVAE) -> bool:
        """Whether it reads batch, covariates and size factors."""

    def __call__(self, vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
        """Probability of each label, (N, L)."""


@dataclass(frozen=True)
class ByClassifier:
    """q(y | z) at the mean of q(z | x), or at a sample; q(y | z, e) with what is known of y."""

    use_posterior_mean: bool
    feed_labels: bool = False
    reads_extra: ClassVar[bool] = False

    def reads_covariates(self, vae: SCANVAE) -> bool:
        return vae.encode_covariates

    def __call__(self, vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
        ask = vae.q_y_given if self.feed_labels else vae.q_y

        def probabilities(cells: Cells) -> Tensor:
            q_z = vae.q_z(cells)
            z = vae.latent_point(q_z) if self.use_posterior_mean else q_z.sample()
            return ask(z, cells).probs

        return over_minibatches(vae, data, batch_size, probabilities)


@dataclass(frozen=True)
class ByBayesRule:
    """p(y | x) from the factors of the model, at some draws of z for each cell."""

    n_mc_samples: int
    feed_labels: bool = False
    posterior: Callable[..., np.ndarray] = label_posterior
    reads_extra: ClassVar[bool] = True

    def reads_covariates(self, vae: SCANVAE) -> bool:
        return True

    def __call__(self, vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
        return self.posterior(
            vae, data, batch_size, self.n_mc_samples, feed_labels=self.feed_labels
        )
