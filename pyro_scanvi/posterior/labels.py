"""Which label has a cell, how surely, and has it one? By rules, the classifier or Bayes' rule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import anndata as ad
import numpy as np
import pandas as pd
from torch import Tensor

from pyro_scanvi.annotation.conformal import label_sets, thresholds_by_label, thresholds_overall
from pyro_scanvi.annotation.consensus import Consensus
from pyro_scanvi.annotation.strangers import warn_of_strangers
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
CONSENSUS, CLASSIFIER = "consensus", "classifier"  # methods
UNASSIGNED = "Unassigned"  # of a cell that looks like none of the labelled ones


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
        method: str | None = None,
        keep_observed: bool = False,
        n_mc_samples: int = 100,
        seed: int | None = None,
        *,
        confidence: float | None = None,
        reject: float | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Label of each cell.

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
            Look at the mean of q(z | x), not at a sample.
        method
            "consensus" is that of two linear rules, of the counts and of z, with a temperature: the
            most often right, and calibrated (:mod:`pyro_scanvi.annotation.consensus`). It is
            learned from the labelled cells the first time that it is asked for, and saved with the
            model. "classifier" is q(y | z). "bayes" is p(y | x), the posterior of the model itself,
            by importance sampling (:mod:`pyro_scanvi.posterior.importance`); it never asks the
            classifier. "states" is p(y | z, x), the model's too, averaged over draws of the guide
            without weights: less noise, if q(z | x) is taken for the posterior of z. None is
            :attr:`label_method`: "consensus" where the model has one or can learn it, else
            "classifier".
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
            category.
        reject
            Answer "Unassigned" for cells that lie farther from the labelled ones than all but this
            share of those, such as .05, in latent space: the share of cells of known types that are
            lost. See :meth:`get_novelty`.

        Returns
        -------
        ndarray or DataFrame
            Labels or names of sets, (N,); with `soft` probabilities, (N, L).

        Raises
        ------
        InputError
            If the AnnData is not what the model was set up with; for an unknown method, a number
            of draws below 1, a negative seed, or a confidence or a share to reject that is no share
            or comes with `soft`; if the model has no consensus, and it is asked for. Bayes' rule
            refuses a ``model`` or ``guide`` of one's own with a site that cannot be weighed, or
            without a y (:mod:`pyro_scanvi.posterior.traces`).
        """
        check_at_least(1, n_mc_samples=n_mc_samples)
        check_share("confidence", confidence, soft)
        check_share("reject", reject, soft)
        methods = methods_of(self.consensus, use_posterior_mean, keep_observed, n_mc_samples)
        ask = look_up(methods, self.label_method if method is None else method, "method")()
        covariates, extra = ask.reads_covariates(self.module), ask.reads_extra
        data, names = self.encoded(adata, indices, keep_observed, covariates, extra)
        n_at_once = minibatch_size(batch_size)
        with seeded(seed):
            probabilities = ask(self.module, data, n_at_once)
        if soft:
            return pd.DataFrame(probabilities, index=names, columns=self.fields.classes)
        if confidence is None:
            answers = self.fields.classes[probabilities.argmax(1)]
        else:
            sets, unsure = self.fields.sources.sets, self.fields.unlabeled_category
            answers = partial_answers(probabilities, self.fields.classes, sets, confidence, unsure)
        if reject is None:
            return answers
        rank = self.consensus().novelty.rank(latent_points(self.module, data, n_at_once))
        return np.where(rank > 1 - reject - ROUNDING, UNASSIGNED, answers)

    @plain_arguments
    def predict_sets(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        coverage: float = 0.9,
        by_type: bool = False,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Labels that a cell may have: sets that hold the true one as often as they promise.

        Conformal sets of the consensus (:mod:`pyro_scanvi.annotation.conformal`).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.
        coverage
            Share of the cells whose true label is in their set, between 0 and 1.
        by_type
            Of the cells of each type, not only of all cells. It takes c / (1 - c) labelled cells of
            a type, 9 for .9; a label with fewer is in every set.

        Returns
        -------
        DataFrame
            Booleans, cells by classes. The most probable label is always in.

        Raises
        ------
        InputError
            If the model has no consensus, the coverage is no share, or the cells do not fit.

        Examples
        --------
        >>> from pyro_scanvi import SCANVI, datasets
        >>> adata = datasets.pbmc68k_counts()
        >>> adata.obs["given"] = datasets.hide_labels(adata.obs["cell_type"], 10, seed=0)
        >>> SCANVI.setup_anndata(adata, "given", "Unknown")
        >>> model = SCANVI(adata).train(1, progress_bar=False)  # more in earnest
        >>> sets = model.predict_sets(coverage=0.9)
        >>> len(sets), bool((sets.sum(axis=1) >= 1).all())
        (700, True)
        """
        check_share("coverage", coverage, False)
        known = self.consensus()
        ask = ByConsensus(known, use_posterior_mean=True)
        covariates = ask.reads_covariates(self.module)
        data, names = self.encoded(adata, indices, False, covariates, False)
        soft = ask(self.module, data, minibatch_size(batch_size)).astype(float)
        if by_type:
            limits = thresholds_by_label(known.score, known.label, soft.shape[1], coverage)
        else:
            limits = thresholds_overall(known.score, known.label, soft.mean(0), coverage)
        return pd.DataFrame(label_sets(soft, limits), index=names, columns=self.fields.classes)

    @plain_arguments
    def get_novelty(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> pd.Series:
        """How unlike the labelled cells each cell is, between 0 and 1.

        The share of labelled cells that lie nearer to the others of a label than this cell does, in
        latent space (:mod:`pyro_scanvi.annotation.novelty`): of cells like the labelled ones 5 % at
        most have more than .95. It ranks better than it rejects: cells of a query, which the
        encoder has not seen, lie nearer the middle, so that fewer are rejected, new ones too.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`predict`.

        Raises
        ------
        InputError
            If the model has no consensus, or the cells do not fit.
        """
        novelty, covariates = self.consensus().novelty, self.module.encode_covariates
        data, names = self.encoded(adata, indices, False, covariates, False)
        latent = latent_points(self.module, data, minibatch_size(batch_size))
        return pd.Series(novelty.rank(latent), index=names, name="novelty")


def methods_of(
    consensus: Callable[[], Consensus],
    use_posterior_mean: bool,
    keep_observed: bool,
    n_mc_samples: int,
) -> "dict[str, Callable[[], Method]]":
    """How each way to find labels is made; `consensus` is called where it is asked for alone."""
    at_mean, drawn = (use_posterior_mean, keep_observed), (n_mc_samples, keep_observed)
    return {
        CONSENSUS: lambda: ByConsensus(consensus(), *at_mean),
        CLASSIFIER: lambda: ByClassifier(*at_mean),
        "bayes": lambda: ByBayesRule(*drawn),
        "states": lambda: ByBayesRule(*drawn, label_posterior_of_states),
    }


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


def check_share(name: str, share: float | None, soft: bool) -> None:
    """Refuse what is no share, and an answer of two kinds."""
    if share is None:
        return
    if not (is_number(share) and 0 < share <= 1):
        raise InputError(f"{name}={share!r}, expected a share above 0 and up to 1, such as 0.9")
    if soft:
        raise InputError(f"soft=True gives probabilities and {name}= names; ask for one of them")


def latent_points(vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
    """The point of q(z | x) of each cell, (N, K)."""
    return over_minibatches(vae, data, batch_size, lambda cells: state_of(vae, cells, True))


def state_of(vae: SCANVAE, cells: Cells, use_posterior_mean: bool) -> Tensor:
    """The state at which labels are asked for, (N, K): the point of q(z | x), or a sample."""
    q_z = vae.q_z(cells)
    return vae.latent_point(q_z) if use_posterior_mean else q_z.sample()


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
            z = state_of(vae, cells, self.use_posterior_mean)
            return ask(z, cells).probs

        return over_minibatches(vae, data, batch_size, probabilities)


@dataclass(frozen=True)
class ByConsensus:
    """The rules of the labelled cells, of counts and z; with what is known of y times p(e | y).

    It warns of cells that look like no labelled ones.
    """

    consensus: Consensus
    use_posterior_mean: bool
    feed_labels: bool = False
    reads_extra: ClassVar[bool] = False

    def reads_covariates(self, vae: SCANVAE) -> bool:
        return vae.encode_covariates

    def __call__(self, vae: SCANVAE, data: CellData, batch_size: int) -> np.ndarray:
        def probabilities(cells: Cells) -> Tensor:
            z = state_of(vae, cells, self.use_posterior_mean)
            found = self.consensus(cells.x.cpu().numpy(), z.cpu().double().numpy())
            soft = cells.x.new_tensor(found)
            return (soft.log() + vae.evidence(cells)).softmax(-1) if self.feed_labels else soft

        warn_of_strangers(self.consensus, data.counts, stacklevel=4)  # above the check of arguments
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
