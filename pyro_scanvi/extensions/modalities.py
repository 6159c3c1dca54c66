r"""A second modality beside the counts: proteins on the surface of the same cells (CITE-seq)."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal, TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.construction import encoder
from pyro_scanvi.model.distributions import NegativeBinomial
from pyro_scanvi.model.growth import ByBatch, grows
from pyro_scanvi.model.likelihoods import elementwise
from pyro_scanvi.model.networks import Head, HiddenLayers
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError, check_known, plain_arguments


class Proteins(SCANVAE):
    r"""Counts of proteins as a mixture of background and foreground, after totalVI.

    .. math::

        p(t_d \mid z, s) = \pi_d(z)\, \mathrm{NB}(t_d; b_{sd}, \theta_d)
            + (1 - \pi_d(z))\, \mathrm{NB}(t_d; b_{sd}\,(1 + e^{f_d(z)}), \theta_d)

    Gayoso et al. (2021), Nat Methods 18:272, eq. 4 to 7. The background b of each protein and batch
    is a parameter here, where totalVI has a LogNormal of each cell. Cells whose row is NaN were not
    measured and count 0. A new batch of a query starts with the geometric mean of the backgrounds.

    With ``encode=True`` the posterior of a cell reads the proteins too, by a network of its own
    whose Normal is multiplied in, and left out where a cell was not measured (product of experts,
    Wu and Goodman 2018, NeurIPS, arXiv 1802.05335):

    .. math:: q(z \mid x, t) \propto q(z \mid x)\, q(z \mid t)

    Questions then need the proteins of the cells they are asked of, a row of NaN where there are
    none.

    Parameters
    ----------
    extra_name
        Name of the proteins in ``setup_anndata(extra={"protein": "obsm/..."})``, and of their site.
    background
        Counts of the background at the start, a number or one for each protein; near to the truth
        it is learned sooner.
    encode
        The encoder of z sees them.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        If there are no such data, the background is not positive, or with ``encode=True`` the
        posterior of z has dependent dimensions.
    """

    @plain_arguments
    def __init__(
        self,
        *args: Any,
        extra_name: str = "protein",
        background: float | Sequence[float] = 10.0,
        encode: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_known([extra_name], self.n_extra, "a name of setup_anndata(extra=)", InputError)
        self.extra_name, n = extra_name, self.n_extra[extra_name]
        hidden = HiddenLayers(self.n_latent, self.n_hidden)
        self.protein_decoder = nn.Sequential(hidden, Head(self.n_hidden, 2 * n))
        start = _log_background(background, n)
        self.log_background = nn.Parameter(start.repeat(self.n_batch, 1))
        self.protein_log_theta = nn.Parameter(torch.zeros(n))
        grows(self, log_background=ByBatch(dim=0))
        if encode:  # no batch norm: cells that were not measured have no statistics
            hidden = HiddenLayers(
                n, self.n_hidden, batch_norm=False, dropout_rate=self.dropout_rate
            )
            self.protein_encoder = encoder(hidden, self.n_latent)
        self.encode = encode

    def p_protein(self, z: Tensor, cells: Cells) -> TorchDistribution:
        """p(t | z, s), the counts of each protein; batch (..., N) event (D,)."""
        logits, log_fold = self.protein_decoder(self.state(z)).chunk(2, -1)
        background = self.log_background[cells.batch].expand_as(log_fold)
        means = torch.stack([background, background + softplus(log_fold)], -1).exp()
        parts = NegativeBinomial(means, self.protein_log_theta.exp().unsqueeze(-1))
        weights = torch.stack([logits, -logits], -1) / 2  # a sigmoid as a softmax
        return MixtureSameFamily(Categorical(logits=weights), parts).to_event(1)

    def observed(
        self, z: Tensor, library: Tensor, y: Tensor, cells: Cells
    ) -> dict[str, tuple[TorchDistribution, Tensor]]:
        """The proteins beside what is seen else; masked where they were not measured."""
        counts, measured = self._proteins(cells)
        p = self.p_protein(z, cells).mask(measured)
        return super().observed(z, library, y, cells) | {self.extra_name: (p, counts)}

    def q_z(self, cells: Cells) -> TorchDistribution:
        """q(z | x, s, c), times q(z | t) with ``encode=True``; batch (N,) event (K,)."""
        q = super().q_z(cells)
        if not self.encode:
            return q
        if elementwise(q).event_shape:
            raise InputError(
                f"encode=True multiplies Normals of independent dimensions, and q_z gives a "
                f"{type(q).__name__}; leave encode out, or the other posterior"
            )
        counts, measured = self._proteins(cells)
        loc, scale = self.protein_encoder(counts.log1p())
        own, other = measured.unsqueeze(-1) / scale.square(), q.variance.reciprocal()
        precision = own + other
        return Normal((own * loc + other * q.mean) / precision, precision.rsqrt()).to_event(1)

    def _proteins(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """Counts, 0 where they were not measured, (N, D), and whether they were, (N,)."""
        counts = cells.extra[self.extra_name]
        return counts.nan_to_num(), ~counts.isnan().all(-1)


def _log_background(background: float | Sequence[float], n_proteins: int) -> Tensor:
    """Of each protein, (D,); InputError for what are no positive numbers, or too many."""
    given = torch.as_tensor(background, dtype=torch.get_default_dtype())
    if (
        given.shape not in {(), (n_proteins,)}
        or not (given > 0).all()
        or not given.isfinite().all()
    ):
        raise InputError(
            f"background={background!r}, expected a positive number of counts, or one for each of "
            f"the {n_proteins} proteins"
        )
    return given.log().expand(n_proteins)
