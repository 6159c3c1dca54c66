"""What is asked of a trained model: the methods of SCANVI that answer, and change nothing.

SCANVI lists these functions as its methods. Each checks its arguments, encodes the AnnData, asks a
module that knows tensors only, and gives the answer the names of cells, genes and labels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import anndata as ad
import numpy as np
import pandas as pd
import torch
from rich.progress import track

from pyro_scanvi.data.fields import Fields
from pyro_scanvi.data.minibatches import CellData
from pyro_scanvi.model.likelihoods import CountParameters
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior import correlation, differential, draws, evidence, expression, importance
from pyro_scanvi.posterior.comparisons import decoded_batches, find_comparisons
from pyro_scanvi.validation import InputError, check_at_least, check_positive, look_up, positions_of

EVALUATION_BATCH_SIZE = 512


class Trained(Protocol):
    """What these functions read of a SCANVI."""

    module: SCANVAE
    fields: Fields
    adata: ad.AnnData

    def encoded(
        self,
        adata: ad.AnnData | None,
        indices: Sequence[int] | None,
        labels: bool = True,
        covariates: bool = True,
    ) -> tuple[CellData, pd.Index]:
        """What a question reads of some cells, and their names; None is the training data, all."""


def predict(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    soft: bool = False,
    batch_size: int | None = None,
    use_posterior_mean: bool = True,
    method: str = "classifier",
    keep_observed: bool = False,
    n_mc_samples: int = 100,
    seed: int | None = None,
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
        importance sampling (:mod:`pyro_scanvi.posterior.importance`); it never asks the classifier.
    keep_observed
        Cells whose label is known keep it, with probability 1.
    n_mc_samples
        Draws of z for each cell; read by "bayes".
    seed
        Of what is drawn; None draws on from torch's generator.

    Returns
    -------
    ndarray or DataFrame
        Labels, (N,); with `soft` probabilities, (N, L).

    Raises
    ------
    InputError
        If the AnnData is not what the model was set up with.
    ValueError
        For an unknown method, a number of draws below 1, or a negative seed.
    """
    check_at_least(1, n_mc_samples=n_mc_samples)
    ask = look_up(
        {
            "classifier": partial(draws.label_probabilities, use_posterior_mean=use_posterior_mean),
            "bayes": partial(importance.label_posterior, n_samples=n_mc_samples),
        },
        method,
        "method",
    )
    decodes = method != "classifier"
    covariates = decodes or self.module.encode_covariates
    data, names = self.encoded(adata, indices, labels=keep_observed, covariates=covariates)
    with draws.seeded(seed):
        probabilities = ask(self.module, data, _minibatch_size(batch_size))
    if keep_observed:
        probabilities = draws.with_known_labels(probabilities, data.label)
    if soft:
        return pd.DataFrame(probabilities, index=names, columns=self.fields.classes)
    return self.fields.classes[probabilities.argmax(1)]


def get_latent_representation(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    give_mean: bool = True,
    mc_samples: int = 5000,
    batch_size: int | None = None,
    return_dist: bool = False,
    *,
    seed: int | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """The batch-free state of each cell by q(z | x), (N, n_latent).

    Parameters
    ----------
    adata, indices, batch_size
        As in :meth:`predict`.
    give_mean
        Return the mean of the state, not a draw of it.
    mc_samples
        Draws for the mean of softmax(z) with ``latent_distribution="ln"``, which has no closed
        form; not read otherwise.
    return_dist
        Return mean and variance of q(z | x), each (N, n_latent), before any softmax.
    seed
        Of the draws; None draws on from torch's generator.

    Raises
    ------
    InputError
        For cells that do not fit the model, or `mc_samples` below 1.
    """
    check_at_least(1, mc_samples=mc_samples)
    covariates = self.module.encode_covariates
    data, _ = self.encoded(adata, indices, labels=False, covariates=covariates)
    size = _minibatch_size(batch_size)
    if return_dist:
        return draws.latent_moments(self.module, data, size)
    with draws.seeded(seed):
        if give_mean:
            return draws.latent_mean(self.module, data, size, mc_samples)
        return draws.latent_sample(self.module, data, size)


def get_normalized_expression(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    transform_batch: str | Sequence[str] | None = None,
    gene_list: Sequence[str] | None = None,
    library_size: float | str = 1,
    n_samples: int = 1,
    n_samples_overall: int | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    return_mean: bool = True,
    return_numpy: bool | None = None,
    *,
    seed: int | None = None,
) -> np.ndarray | pd.DataFrame:
    r"""Decoded expression :math:`\rho` of each gene at draws from the guide.

    .. math:: \frac1{|B|} \sum_{s \in B} \mathrm{size} \cdot \rho_g(z, s, c),
        \qquad z \sim q(z \mid x)

    Without size factors the proportions :math:`\rho_g` of a cell sum to 1 (Lopez et al. 2018).

    Parameters
    ----------
    adata, indices, batch_size
        As in :meth:`predict`.
    transform_batch
        Batches B to decode every cell as, at the same draws; a name or several, which are
        averaged over. None is the cell's own batch.
    gene_list
        Genes to return, in this order; None is all.
    library_size
        A number that multiplies :math:`\rho`, or "latent": the cell's own library l, so that
        the result is the mean count :math:`\mu = l \rho`.
    n_samples
        Draws for each cell.
    n_samples_overall
        Draw so many cells with replacement, and one sample for each of them.
    weights
        None or "uniform": cells are drawn with equal probability.
    return_mean
        Average over the draws of a cell.
    return_numpy
        Return an array, not a DataFrame.
    seed
        Of the draws; None draws on from torch's generator.

    Returns
    -------
    DataFrame or array
        Cells by genes. With ``n_samples > 1`` and ``return_mean=False`` always an array,
        (n_samples, N, genes).

    Raises
    ------
    InputError
        For unknown batches or genes, naming the nearest; sizes that are no positive numbers;
        both kinds of `n_samples`; a DataFrame of three dimensions.
    """
    scale = _expression_scale(library_size)
    _check_sampling(n_samples, n_samples_overall, weights)
    if n_samples > 1 and not return_mean and return_numpy is False:
        raise InputError(
            "return_numpy=False, but n_samples > 1 with return_mean=False gives three "
            "dimensions, which a DataFrame does not have; leave return_numpy out"
        )
    batches, genes = _batch_codes(self, transform_batch), _gene_positions(self, gene_list)
    size = _minibatch_size(batch_size)
    data, names = self.encoded(adata, indices)
    with draws.seeded(seed):
        if n_samples_overall is not None:
            chosen = torch.randint(len(data), (n_samples_overall,)).numpy()
            data, names = data.subset(chosen), names[chosen]
        values = expression.normalized_expression(
            self.module, data, size, scale, batches, genes, n_samples, return_mean
        )
    if return_numpy or values.ndim == 3:
        return values
    return pd.DataFrame(values, index=names, columns=self.fields.genes[genes])


def get_likelihood_parameters(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    n_samples: int = 1,
    give_mean: bool = False,
    batch_size: int | None = None,
    *,
    seed: int | None = None,
) -> dict[str, np.ndarray]:
    r"""Parameters of :math:`p(x \mid z, l, y, s, c)` at draws from the guide.

    Parameters
    ----------
    adata, indices, batch_size
        As in :meth:`predict`.
    n_samples
        Draws for each cell.
    give_mean
        Average over the draws.
    seed
        Of the draws; None draws on from torch's generator.

    Returns
    -------
    dict
        Arrays (N, G), or (n_samples, N, G) for several draws without `give_mean`. "mean":
        :math:`\mu = l \rho` in counts, before any structural zeros. "dispersions": the inverse
        dispersion :math:`\theta`, where the likelihood has one. "dropout": the probability of
        a structural zero, where it has a gate.

    Raises
    ------
    InputError
        For cells that do not fit the model, or `n_samples` below 1.
    """
    check_at_least(1, n_samples=n_samples)
    data, _ = self.encoded(adata, indices)
    with draws.seeded(seed):
        return expression.likelihood_parameters(
            self.module, data, _minibatch_size(batch_size), n_samples, give_mean
        )


def get_latent_library_size(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    give_mean: bool = True,
    batch_size: int | None = None,
    *,
    seed: int | None = None,
) -> np.ndarray:
    r"""Library size l of each cell in counts, (N, 1).

    Parameters
    ----------
    adata, indices, batch_size
        As in :meth:`predict`.
    give_mean
        Return the mean :math:`\exp(m + v / 2)` of :math:`q(l \mid x)`; otherwise a draw of it,
        or what the model reads where the library is not latent: the total count or the given
        size factor.
    seed
        Of the draws; None draws on from torch's generator.

    Raises
    ------
    InputError
        If a mean is asked for and the library is not latent.
    """
    if give_mean and not self.module.latent_library:
        raise InputError(
            "the library of this model is not latent, so q(l | x) has no mean; "
            "give_mean=False returns the library that the model reads"
        )
    data, _ = self.encoded(adata, indices, labels=False)
    with draws.seeded(seed):
        return draws.library_size(self.module, data, _minibatch_size(batch_size), give_mean)


def posterior_predictive_sample(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    transform_batch: str | None = None,
    n_samples: int = 1,
    gene_list: Sequence[str] | None = None,
    batch_size: int | None = None,
    *,
    seed: int | None = None,
) -> np.ndarray:
    r"""Counts from :math:`p(x' \mid x) = \int p(x' \mid z, l)\, q(z, l \mid x)\, dz\, dl`.

    The result is a dense array of float32, 4 bytes for each cell, gene and draw; choose cells
    or genes where that is too much.

    Parameters
    ----------
    adata, indices, batch_size
        As in :meth:`predict`.
    transform_batch
        Draw as if every cell were of this batch; None is the cell's own.
    n_samples
        Draws for each cell, each at its own draw of z and l.
    gene_list
        Genes to return, in this order; None is all.
    seed
        Of the draws; None draws on from torch's generator.

    Returns
    -------
    array
        (N, genes); with more than one draw (N, genes, n_samples).

    Raises
    ------
    InputError
        For unknown batches or genes, naming the nearest; more than one batch; `n_samples`
        below 1.
    """
    check_at_least(1, n_samples=n_samples)
    batches, genes = _batch_codes(self, transform_batch), _gene_positions(self, gene_list)
    if len(batches) > 1:
        raise InputError(
            f"transform_batch names {len(batches)} batches, but a cell can be drawn as of one "
            "only (a mean of counts is no count); ask for each batch in turn"
        )
    size = _minibatch_size(batch_size)
    data, _ = self.encoded(adata, indices)
    with draws.seeded(seed):
        counts = expression.predictive_sample(self.module, data, size, batches[0], genes, n_samples)
    return counts[..., 0] if n_samples == 1 else counts


def get_feature_correlation_matrix(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    n_samples: int = 10,
    batch_size: int = 64,
    rna_size_factor: float = 1000,
    transform_batch: str | Sequence[str] | None = None,
    correlation_type: str = "spearman",
    *,
    seed: int | None = None,
) -> pd.DataFrame:
    r"""Correlation of genes over denoised expression, genes by genes.

    .. math:: w_g \sim \mathrm{Gamma}(\theta_g,\ \theta_g / (\mathrm{size} \cdot \rho_g(z))),
        \qquad z \sim q(z \mid x),

    the negative binomial at one size for all cells, without its Poisson noise and without
    structural zeros. A likelihood without :math:`\theta`, such as the Poisson, has no Gamma
    noise: :math:`w = \mathrm{size} \cdot \rho(z)`.

    Memory grows with genes squared. Ranks ("spearman") go through a temporary file of
    4 bytes x cells x `n_samples` x genes, and one gene at a time is held in memory.

    Parameters
    ----------
    adata, indices
        As in :meth:`predict`.
    n_samples
        Draws for each cell.
    batch_size
        Cells in a minibatch.
    rna_size_factor
        Size of every cell in counts.
    transform_batch
        Batches to decode every cell as; a name or several, whose matrices are averaged. None
        is the cell's own batch.
    correlation_type
        "spearman" or "pearson".
    seed
        Of the draws; None draws on from torch's generator.

    Returns
    -------
    DataFrame
        NaN for genes that do not vary.

    Raises
    ------
    InputError
        For unknown batches or types of correlation, a single draw in all, sizes that are no
        positive numbers, or a disk without place for the temporary file.
    """
    check_at_least(1, n_samples=n_samples, batch_size=batch_size)
    check_positive(rna_size_factor=rna_size_factor)
    correlate = look_up(correlation.CORRELATIONS, correlation_type, "correlation_type")
    batches = _batch_codes(self, transform_batch)
    data, _ = self.encoded(adata, indices)
    if n_samples * len(data) == 1:
        raise InputError("one draw of one cell has no correlation; choose more of either")
    with draws.seeded(seed):
        matrix = correlation.correlation_of_genes(
            self.module, data, batch_size, correlate, n_samples, rna_size_factor, batches
        )
    return pd.DataFrame(matrix, index=self.fields.genes, columns=self.fields.genes)


def get_elbo(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    return_mean: bool = True,
    feed_labels: bool = False,
    *,
    seed: int | None = None,
) -> float | np.ndarray:
    r"""Evidence lower bound in nats per cell; higher is better.

    .. math:: \mathbb E_q[\log p(x \mid z, l) + \log p(z \mid u, y) - \log q(z \mid x)]
        - \mathrm{KL}_u - \mathrm{KL}_y - \mathrm{KL}_l \le \log p(x)

    at KL weight 1, without the classification term; exact over y and at one draw of z
    (Xu et al. 2021, eq. 5; Kingma et al. 2014, eqs. 6 and 7).

    Parameters
    ----------
    adata, indices, batch_size
        As in :meth:`predict`.
    return_mean
        Return the mean over cells, a number; otherwise one number for each cell, (N,).
    feed_labels
        True: bound :math:`\log p(x, y)` where the label is known, and :math:`\log p(x)`
        elsewhere. False: bound :math:`\log p(x)` of every cell, as scvi-tools does.
    seed
        Of the draws; None draws on from torch's generator.

    Raises
    ------
    InputError
        For cells that do not fit the model.
    """
    ask = partial(evidence.cell_elbo, feed_labels=feed_labels)
    data, _ = self.encoded(adata, indices, labels=feed_labels)
    return _of_each_cell(self, ask, data, batch_size, return_mean, seed)


def get_reconstruction_error(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    return_mean: bool = True,
    *,
    seed: int | None = None,
) -> float | np.ndarray:
    r""":math:`-\mathbb E_q \log p(x \mid z, l, y)` in nats per cell; lower is better.

    It is exact over y and at one draw of z. scvi-tools returns a dict whose
    "reconstruction_loss" also holds :math:`\log q(z \mid x) - \log p(z \mid u, y)`; this is
    another quantity, and a number.

    Parameters
    ----------
    adata, indices, batch_size
        As in :meth:`predict`.
    return_mean
        Return the mean over cells, a number; otherwise one number for each cell, (N,).
    seed
        Of the draws; None draws on from torch's generator.

    Raises
    ------
    InputError
        For cells that do not fit the model.
    """
    data, _ = self.encoded(adata, indices, labels=False)
    return _of_each_cell(self, evidence.cell_reconstruction, data, batch_size, return_mean, seed)


def get_marginal_ll(
    self: Trained,
    adata: ad.AnnData | None = None,
    indices: Sequence[int] | None = None,
    n_mc_samples: int = 1000,
    batch_size: int | None = None,
    return_mean: bool = True,
    n_inner_samples: int = importance.N_INNER_SAMPLES,
    feed_labels: bool = False,
    seed: int | None = None,
) -> float | np.ndarray:
    r"""Marginal log likelihood :math:`\log p(x)`, estimated by importance sampling.

    The estimate lies between the ELBO and :math:`\log p(x)` in expectation, and rises with
    the draws; see :mod:`pyro_scanvi.posterior.importance`.

    Parameters
    ----------
    adata
        Cells with the genes of the training data; None is the training data.
    indices
        Positions of the cells; None is all.
    n_mc_samples
        Draws of z, and of a latent library, for each cell.
    batch_size
        Cells in a minibatch at most; changes speed and memory, and which numbers are drawn.
    return_mean
        Return the mean over cells, not the value of each.
    n_inner_samples
        Draws of u for each of them and each label.
    feed_labels
        A cell with a known label contributes :math:`\log p(x, y)`, as in the ELBO that
        ``feed_labels`` of the training plan chooses.
    seed
        Of what is drawn; None draws on from torch's generator.

    Returns
    -------
    float or ndarray
        Nats per cell; without `return_mean` (N,).

    Raises
    ------
    InputError
        If the AnnData is not what the model was set up with.
    ValueError
        For a number of draws below 1, or a negative seed.
    """
    check_at_least(1, n_mc_samples=n_mc_samples, n_inner_samples=n_inner_samples)
    ask = partial(
        importance.marginal_log_likelihood,
        n_samples=n_mc_samples,
        n_inner_samples=n_inner_samples,
        feed_labels=feed_labels,
    )
    data, _ = self.encoded(adata, indices, labels=feed_labels)
    return _of_each_cell(self, ask, data, batch_size, return_mean, seed)


def differential_expression(
    self: Trained,
    adata: ad.AnnData | None = None,
    groupby: str | None = None,
    group1: Any = None,
    group2: Any = None,
    idx1: Sequence[int] | Sequence[bool] | str | None = None,
    idx2: Sequence[int] | Sequence[bool] | str | None = None,
    mode: str = "change",
    delta: float | None = 0.25,
    batch_size: int | None = None,
    all_stats: bool = True,
    batch_correction: bool = False,
    batchid1: Sequence[str] | None = None,
    batchid2: Sequence[str] | None = None,
    fdr_target: float = 0.05,
    silent: bool = False,
    weights: str | None = "uniform",
    filter_outlier_cells: bool = False,
    n_samples_overall: int = differential.N_DRAWS,
    pseudocounts: float | None = None,
    test_mode: str = "three",
    seed: int | None = None,
) -> pd.DataFrame:
    r"""Test every gene between groups of cells, by the expression that the model decodes.

    .. math::

        r = \log_2(\rho_1 + c) - \log_2(\rho_2 + c), \qquad
        p_{de} = \max\{P(r \ge \delta),\ P(r \le -\delta)\}

    over pairs of draws: a cell of group 1 and one of group 2 at random, each decoded at a
    sample of q(z | x). The columns are those of scvi-tools. Mode "change": Boyeau et al.
    (2019), bioRxiv 794289. Mode "vanilla": Lopez et al. (2018), Nat Methods 15:1053.

    Parameters
    ----------
    adata
        Cells with the genes of the training data; None is the training data.
    groupby
        Column of ``obs`` with the groups. Of the labels, "unlabelled" is a group too.
    group1
        One group or several, each compared on its own; None is all.
    group2
        The group to compare with; None is the rest, all other cells alike, so that large groups
        make up most of it.
    idx1, idx2
        Cells instead of groups: a mask, positions, or a query of ``obs``; idx2=None is all
        other cells.
    mode
        "change", how probable is a fold change beyond `delta`; or "vanilla", how probable is it
        that expression is higher in group 1 by whatever amount. (scvi-tools' default is
        "vanilla".)
    delta
        Smallest log2 fold change that counts; None estimates it from the genes. Mode "change".
    batch_size
        Cells in a minibatch.
    all_stats
        Add raw_mean, non_zeros_proportion and raw_normalized_mean (per 10,000 counts).
    batch_correction
        Decode the cells of both groups as if of the same batch, an equal share of the draws in
        each, and pair draws of one batch. Without it a difference between batches is one
        between groups that lie in different batches. Other covariates are not corrected for.
    batchid1, batchid2
        Batches to decode each group in, by their names in ``obs``; None is all. The same for
        both, or sets that do not meet; then draws of different batches are paired.
    fdr_target
        ``is_de_fdr_*`` marks the most genes whose expected share of false calls,
        the mean of their ``proba_not_de``, is at most this. Mode "change".
    silent
        Show no progress bar.
    weights
        "uniform"; "importance" is refused, as those of scvi-tools assume another prior of z.
    filter_outlier_cells
        Draw only from the cells within an ellipse of nine tenths of their group in latent
        space (scikit-learn's EllipticEnvelope). Raw statistics are of all cells.
    n_samples_overall
        Pairs of draws, S. Each cell is drawn as often as any other of its group, or once more.
    pseudocounts
        c, added to expression before the logarithm in `p_de`; None estimates it from genes with
        a mean count below 0.01 in a group.
    test_mode
        "three" is the formula above; "two" is :math:`p_{de} = P(|r| \ge \delta)`, as in Boyeau
        et al., which counts up and down together: a gene that varies within both groups has
        large changes both ways, and comes near 1 without any difference between them.
    seed
        Of the draws. The table of a group is the same whichever others are asked for.

    Returns
    -------
    DataFrame
        One row for each gene and comparison, the surest first. Mode "change": proba_de,
        proba_not_de, bayes_factor (log odds, nats), scale1 and scale2 (mean expression),
        pseudocounts, delta, lfc_mean, lfc_median, lfc_std, lfc_min, lfc_max and, last,
        is_de_fdr_*. Mode "vanilla": proba_m1 (higher in group 1), proba_m2, bayes_factor,
        scale1, scale2. With groups: comparison, group1, group2.

    Raises
    ------
    InputError
        For unknown columns, groups, batches or settings, numbers out of range, groups that are
        empty or share cells.

    Notes
    -----
    As in scvi-tools, lfc_* are taken with a thousandth of the pseudocount, so that they can be
    large for genes that neither group expresses; and c is divided by the number of genes,
    which leaves little of it. Give `pseudocounts`, such as 1e-4, to count such genes less.

    The probabilities are about these cells and take the decoder for true. They do not say how
    other donors differ, and the share of false calls can be larger than `fdr_target`: in
    simulations of 400 cells and 100 genes it was 0.09 to 0.29 at 0.05 with delta=0.25, 0.05 to
    0.17 with delta=0.5. Where most calls are sure, the last ones can be genes of low `p_de`.
    """
    differential.check_weights(weights)
    settings = differential.Settings(mode, delta, pseudocounts, test_mode, fdr_target, all_stats)
    batches = decoded_batches(self.fields.batches, batch_correction, batchid1, batchid2)
    check_at_least(max(map(len, batches)), n_samples_overall=n_samples_overall)
    data, _ = self.encoded(adata, None)
    obs = (self.adata if adata is None else adata).obs
    obs = self.fields.with_named_unlabeled(obs)
    comparisons = find_comparisons(obs, groupby, group1, group2, idx1, idx2)
    batch_size = _minibatch_size(batch_size)

    def drawn(cells: np.ndarray, codes: Sequence[int | None]) -> np.ndarray:
        if filter_outlier_cells:
            latent = draws.over_minibatches(
                self.module, data.subset(cells), batch_size, lambda c: self.module.q_z(c).mean
            )
            cells = differential.without_outliers(cells, latent)
        return expression.expression_draws(
            self.module, data, cells, codes, n_samples_overall, batch_size
        )

    samplers = tuple(partial(drawn, codes=codes) for codes in batches)
    tables = []
    for comparison in track(comparisons, "Differential expression", disable=silent):
        with draws.seeded(seed):
            tables.append(
                differential.compare(comparison, samplers, data.counts, self.fields.genes, settings)
            )
    return pd.concat(tables)


def _batch_codes(model: Trained, names: str | Sequence[str] | None) -> list[int | None]:
    """Codes of the batches to decode cells as; None is the cell's own."""
    if names is None:
        return [None]
    names = [names] if np.ndim(names) == 0 else names
    return positions_of(names, model.fields.batches, "transform_batch")


def _gene_positions(model: Trained, names: Sequence[str] | None) -> slice | list[int]:
    """Where the named genes stand; None is all."""
    if names is None:
        return slice(None)
    if np.ndim(names) == 0:
        raise InputError(f"gene_list={names!r}, expected a list of names of genes")
    return positions_of(names, model.fields.genes, "gene_list")


def _minibatch_size(batch_size: int | None) -> int:
    if batch_size is None:
        return EVALUATION_BATCH_SIZE
    check_at_least(1, batch_size=batch_size)
    return batch_size


def _expression_scale(library_size: float | str) -> Callable[[CountParameters], torch.Tensor]:
    """From count parameters to expression at the size that was asked for."""
    scale = look_up(expression.SCALES, library_size, "library_size")
    if callable(scale):
        return scale
    check_positive(library_size=scale)
    return lambda p: p.rho * scale


def _check_sampling(n_samples: int, n_samples_overall: int | None, weights: str | None) -> None:
    check_at_least(1, n_samples=n_samples)
    if weights not in (None, "uniform"):
        raise InputError(
            f"weights={weights!r}, expected None or 'uniform'; importance weights are not offered"
        )
    if n_samples_overall is None:
        return
    check_at_least(1, n_samples_overall=n_samples_overall)
    if n_samples != 1:
        raise InputError("n_samples and n_samples_overall are both given; choose one")


def _of_each_cell(
    model: Trained,
    ask: Callable[[SCANVAE, CellData, int], np.ndarray],
    data: CellData,
    batch_size: int | None,
    mean: bool,
    seed: int | None,
) -> float | np.ndarray:
    """A number for each cell, (N,), or their mean."""
    with draws.seeded(seed):
        values = ask(model.module, data, _minibatch_size(batch_size))
    return float(values.mean(dtype=np.float64)) if mean else values
