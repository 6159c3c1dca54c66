"""What a trained model says about the counts: expression, parameters of the likelihood, draws.

Everything here is decoded at draws from the guide; tensors in, arrays out, minibatch by minibatch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_scanvi.data.minibatches import CellData, Cells
from pyro_scanvi.model.likelihoods import CountParameters, elementwise
from pyro_scanvi.model.pyro_internals import Site
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import (
    Draws,
    batch_codes,
    check_weights,
    mean_over_samples,
    minibatch_size,
    observed_sites,
    over_minibatches,
    passes,
    seeded,
    total,
)
from pyro_scanvi.posterior.trained import Trained
from pyro_scanvi.validation import (
    InputError,
    check_at_least,
    check_known,
    check_positive,
    look_up,
    plain_arguments,
    positions_of,
)

SCALES: dict[str, Callable[[CountParameters], Tensor]] = {"latent": lambda p: p.mu}


class Expression(Trained):
    """Questions of the counts that a cell would have, and of what they are drawn from."""

    @plain_arguments
    def get_normalized_expression(
        self,
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
            As in :meth:`~pyro_scanvi.SCANVI.predict`.
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
        batches = batch_codes(transform_batch, self.fields.batches)
        genes = _gene_positions(gene_list, self.fields.genes)
        size = minibatch_size(batch_size)
        data, names = self.encoded(adata, indices, extra=False)
        with seeded(seed):
            if n_samples_overall is not None:
                chosen = torch.randint(len(data), (n_samples_overall,)).numpy()
                data, names = data.subset(chosen), names[chosen]
            values = normalized_expression(
                self.module, data, size, scale, batches, genes, n_samples, return_mean
            )
        if return_numpy or values.ndim == 3:
            return values
        return pd.DataFrame(values, index=names, columns=self.fields.genes[genes])

    @plain_arguments
    def get_likelihood_parameters(
        self,
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
            As in :meth:`~pyro_scanvi.SCANVI.predict`.
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
            a structural zero, where it has a gate. A likelihood of one's own tells the mean of its
            distribution, or what its ``parameters`` say.

        Raises
        ------
        InputError
            For cells that do not fit the model, or `n_samples` below 1.
        """
        check_at_least(1, n_samples=n_samples)
        data, _ = self.encoded(adata, indices)
        size = minibatch_size(batch_size)
        with seeded(seed):
            return likelihood_parameters(self.module, data, size, n_samples, give_mean)

    @plain_arguments
    def posterior_predictive_sample(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | None = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        *,
        site: str = "x",
        seed: int | None = None,
    ) -> np.ndarray:
        r"""Counts from :math:`p(x' \mid x) = \int p(x' \mid z, l)\, q(z, l \mid x)\, dz\, dl`.

        The result is a dense array of float32, 4 bytes for each cell, gene and draw; choose cells
        or genes where that is too much.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`~pyro_scanvi.SCANVI.predict`.
        transform_batch
            Draw as if every cell were of this batch; None is the cell's own.
        n_samples
            Draws for each cell, each at its own draw of z and l.
        gene_list
            Genes to return, in this order; None is all.
        site
            Of the model: "x", the counts, or a further one that is observed (of a model of one's
            own; see ``SCANVAE.observed``), which has no genes to choose.
        seed
            Of the draws; None draws on from torch's generator.

        Returns
        -------
        array
            (N, genes), or the columns of another site; with more than one draw (N, genes,
            n_samples).

        Raises
        ------
        InputError
            For unknown batches, genes or sites, naming the nearest; more than one batch; genes of
            another site; `n_samples` below 1.
        """
        check_at_least(1, n_samples=n_samples)
        batches = batch_codes(transform_batch, self.fields.batches)
        genes = _gene_positions(gene_list, self.fields.genes)
        if len(batches) > 1:
            raise InputError(
                f"transform_batch names {len(batches)} batches, but a cell can be drawn as of one "
                "only (a mean of counts is no count); ask for each batch in turn"
            )
        if site != "x" and gene_list is not None:
            raise InputError(f"gene_list is given, but site={site!r} has no genes; leave it out")
        size = minibatch_size(batch_size)
        data, _ = self.encoded(adata, indices)
        with seeded(seed):
            drawn = predictive_sample(self.module, data, size, batches[0], genes, n_samples, site)
        return drawn[..., 0] if n_samples == 1 else drawn


def _gene_positions(names: Sequence[str] | None, genes: Iterable[str]) -> slice | list[int]:
    """Where the named genes stand; None is all."""
    if names is None:
        return slice(None)
    if np.ndim(names) == 0:
        raise InputError(f"gene_list={names!r}, expected a list of names of genes")
    return positions_of(names, genes, "gene_list")


def _expression_scale(library_size: float | str) -> Callable[[CountParameters], Tensor]:
    """From count parameters to expression at the size that was asked for."""
    scale = look_up(SCALES, library_size, "library_size")
    if callable(scale):
        return scale
    check_positive(library_size=scale)
    return lambda p: p.rho * scale


def _check_sampling(n_samples: int, n_samples_overall: int | None, weights: str | None) -> None:
    check_at_least(1, n_samples=n_samples)
    check_weights(weights)
    if n_samples_overall is None:
        return
    check_at_least(1, n_samples_overall=n_samples_overall)
    if n_samples != 1:
        raise InputError("n_samples and n_samples_overall are both given; choose one")


def normalized_expression(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    scale: Callable[[CountParameters], Tensor],
    batches: Sequence[int | None],
    genes: slice | Sequence[int],
    n_samples: int,
    mean: bool,
) -> np.ndarray:
    """Expression at draws for each cell, averaged over batches, (N, G) or (S, N, G).

    Parameters
    ----------
    scale
        From the count parameters to expression, (S, N, G).
    batches
        Codes of the batches to decode each draw as; None is the cell's own.
    genes
        Positions.
    n_samples, mean
        Number S of draws, and whether to return their mean.
    """

    def expression(cells: Cells, n: int) -> Tensor:
        draws = Draws(vae, cells, n)
        decoded = (scale(draws.decode(b))[..., genes] for b in batches)
        return total(decoded) / len(batches)

    return _at_samples(vae, data, batch_size, expression, n_samples, mean)


def likelihood_parameters(
    vae: SCANVAE, data: CellData, batch_size: int, n_samples: int, mean: bool
) -> dict[str, np.ndarray]:
    """What the likelihood says of itself at the site x of the model, (N, G) or (S, N, G) each."""
    names: list[str] = []

    def parameters(cells: Cells, n: int) -> Tensor:
        p_x = elementwise(Draws(vae, cells, n).replay()["x"]["fn"])
        told = vae.likelihood.parameters(p_x)
        names[:] = told
        return torch.stack(list(told.values()), dim=1)  # S, P, N, G

    found = _at_samples(vae, data, batch_size, parameters, n_samples, mean)
    return dict(zip(names, np.moveaxis(found, -3, 0), strict=True))


def predictive_sample(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    batch: int | None,
    genes: slice | Sequence[int],
    n_samples: int,
    site: str = "x",
) -> np.ndarray:
    """From p(x' | x): one draw of an observed site at each draw of the guide, (N, G, S)."""

    def counts(cells: Cells) -> Tensor:
        sizes = passes(n_samples, cells.x.numel())
        drawn = [_observed_site(Draws(vae, cells, n).replay(batch), site) for n in sizes]
        return torch.cat([p.sample()[..., genes] for p in drawn]).movedim(0, -1)

    return over_minibatches(vae, data, batch_size, counts)


def _observed_site(model: Mapping[str, Site], name: str) -> Distribution:
    """The distribution of an observed site; other sites are refused."""
    check_known([name], observed_sites(model), "an observed site of the model", InputError)
    return model[name]["fn"]


def _at_samples(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    ask: Callable[[Cells, int], Tensor],
    n_samples: int,
    mean: bool,
) -> np.ndarray:
    """What `ask` answers at S draws, (S, ..., N, G); without S for a mean or a single draw."""

    def answer(cells: Cells) -> Tensor:
        size = cells.x.numel()
        if mean or n_samples == 1:
            return mean_over_samples(n_samples, size, lambda n: ask(cells, n))
        return torch.cat([ask(cells, n) for n in passes(n_samples, size)])

    return over_minibatches(vae, data, batch_size, answer, dim=-2)
