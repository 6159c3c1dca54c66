"""Differential expression: which cells, their draws, and the test of every gene between them."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from rich.progress import track
from sklearn.covariance import EllipticEnvelope
from torch import Tensor

from pyro_scanvi.data.minibatches import CellData, Cells
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.comparisons import decoded_batches, find_comparisons
from pyro_scanvi.posterior.draws import (
    Draws,
    check_weights,
    minibatch_size,
    over_minibatches,
    seeded,
)
from pyro_scanvi.posterior.fold_changes import Settings, compare
from pyro_scanvi.posterior.trained import Trained
from pyro_scanvi.validation import check_at_least, plain_arguments

N_DRAWS = 5000


class DifferentialExpression(Trained):
    """The question of which genes differ between groups of cells."""

    @plain_arguments
    def differential_expression(
        self,
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
        n_samples_overall: int = N_DRAWS,
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
        check_weights(weights)
        settings = Settings(mode, delta, pseudocounts, test_mode, fdr_target, all_stats)
        batches = decoded_batches(self.fields.batches, batch_correction, batchid1, batchid2)
        check_at_least(max(map(len, batches)), n_samples_overall=n_samples_overall)
        data, _ = self.encoded(adata, None, extra=False)
        obs = (self.adata if adata is None else adata).obs
        obs = self.fields.with_named_unlabeled(obs)
        comparisons = find_comparisons(obs, groupby, group1, group2, idx1, idx2)
        vae, genes, size = self.module, self.fields.genes, minibatch_size(batch_size)

        def drawn(cells: np.ndarray, codes: Sequence[int | None]) -> np.ndarray:
            if filter_outlier_cells:
                of_group = data.subset(cells)
                latent = over_minibatches(vae, of_group, size, lambda c: vae.q_z(c).mean)
                cells = without_outliers(cells, latent)
            return expression_draws(vae, data, cells, codes, n_samples_overall, size)

        one, two = (partial(drawn, codes=codes) for codes in batches)
        tables = []
        for comparison in track(comparisons, "Differential expression", disable=silent):
            with seeded(seed):
                tables.append(compare(comparison, (one, two), data.counts, genes, settings))
        return pd.concat(tables)


def expression_draws(
    vae: SCANVAE,
    data: CellData,
    cells: np.ndarray,
    batches: Sequence[int | None],
    n_draws: int,
    batch_size: int,
) -> np.ndarray:
    """Expression rho of a group of cells at draws of q(z | x), (n_draws, G).

    The cells come in random order, each as often as any other, or once more. An equal share of the
    draws, one after the other, is decoded as if of each of `batches`; None is a cell's own batch.
    """
    rounds = torch.randperm(len(cells)).repeat(-(-n_draws // len(cells)))[:n_draws]
    shares = np.array_split(cells[rounds[torch.randperm(n_draws)].numpy()], len(batches))

    def decoded(share: np.ndarray, batch: int | None) -> np.ndarray:
        def rho(minibatch: Cells) -> Tensor:
            return Draws(vae, minibatch, 1).decode(batch).rho[0]

        return over_minibatches(vae, data.subset(share), batch_size, rho)

    return np.concatenate([decoded(*pair) for pair in zip(shares, batches, strict=True)])


def without_outliers(cells: np.ndarray, latent: np.ndarray) -> np.ndarray:
    """Those of `cells` that lie within the ellipse of nine tenths of them in latent space.

    Parameters
    ----------
    cells
        Positions, (N,).
    latent
        Their states, (N, K).

    Warns
    -----
    UserWarning
        If there are too few to estimate a covariance (2 K at most); all are kept then.
    """
    if len(cells) <= 2 * latent.shape[1]:
        warnings.warn(
            f"{len(cells)} cells are too few to find outliers among them in {latent.shape[1]} "
            "latent dimensions; all are kept",
            stacklevel=2,
        )
        return cells
    return cells[EllipticEnvelope(random_state=0).fit_predict(latent) == 1]
