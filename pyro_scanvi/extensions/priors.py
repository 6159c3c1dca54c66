r"""Priors of the state within a type, p(u), richer than N(0, I).

Their KL from q(u | z, y) has no closed form and is taken at draws.
"""

from typing import Any

import numpy as np
import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal, TorchDistribution
from torch import Tensor, nn

from pyro_scanvi import validation
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.growth import ByLabel, grows
from pyro_scanvi.model.networks import frozen_statistics
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError

SMALLEST_VARIANCE = 1e-4  # that of the encoders: no component becomes a point
SMALLEST_COUNT = 0.05  # where a pseudo cell has none, whose logarithm would not move


class MixturePrior(SCANVAE):
    r"""p(u) is a mixture of Gaussians with learned weights, means and scales.

    .. math:: p(u) = \sum_{c=1}^C w_c \prod_k \mathcal N(u_k \mid m_{ck}, s_{ck}^2 + 10^{-4})

    Means start at draws of N(0, I / K), about 1 from the centre whatever K is, scales at 1 and
    weights equal: p(u) starts near N(0, I), and each component has a share of every cell. (Draws of
    N(0, I) lie so far apart in 10 dimensions that some would have next to none, and hardly move.)
    Dilokthanakul et al. (2016), arXiv 1611.02648.

    Parameters
    ----------
    n_components
        C.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        For a number of components below 1.
    """

    def __init__(self, *args: Any, n_components: int = 10, **kwargs: Any):
        super().__init__(*args, **kwargs)
        validation.check_at_least(1, n_components=n_components)
        shape = n_components, self.n_latent
        self.component_logits = nn.Parameter(torch.zeros(n_components))
        self.component_means = nn.Parameter(torch.randn(shape) / self.n_latent**0.5)
        self.component_log_vars = nn.Parameter(torch.zeros(shape))

    def p_u(self, cells: Cells) -> TorchDistribution:
        """The mixture; batch () event (K,)."""
        scales = (self.component_log_vars.exp() + SMALLEST_VARIANCE).sqrt()
        components = Normal(self.component_means, scales).to_event(1)
        return MixtureSameFamily(Categorical(logits=self.component_logits), components)


class VampPrior(SCANVAE):
    r"""p(u) is the mean of q(u | z, y) at learned cells and labels.

    .. math:: p(u) = \frac1P \sum_{p=1}^P q(u \mid \bar z(x_p), y_p)

    with :math:`\bar z` the mean of q(z | x). Pseudo cells :math:`x_p` have learned counts, and
    learned probabilities of the labels in the place of :math:`y_p`. They are no cells of the
    minibatch: batch norms neither read nor move its statistics. Where the encoder reads covariates
    (``encode_covariates``), pseudo cell p is of batch p modulo their number, likewise of each
    category, and continuous ones are 0. Tomczak and Welling (2018), AISTATS, arXiv 1705.07120.

    Parameters
    ----------
    n_pseudo
        P; not read where there are `pseudo_counts`.
    pseudo_counts
        Counts that the pseudo cells start from, (P, G), such as those of some cells of the data.
        None draws them: log counts from N(0, 1), at all genes alike.
    *args, **kwargs
        As for :class:`~pyro_scanvi.SCANVAE`.

    Raises
    ------
    InputError
        For `pseudo_counts` that are no counts of all genes, or a number of pseudo cells below 1.
    """

    pseudo_batch: Tensor
    pseudo_categorical: Tensor

    def __init__(self, *args: Any, n_pseudo: int = 50, pseudo_counts: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        validation.check_at_least(1, n_pseudo=n_pseudo)
        start = torch.randn(n_pseudo, self.n_input)
        if pseudo_counts is not None:
            start = checked_counts(pseudo_counts, self.n_input).clamp(min=SMALLEST_COUNT).log()
        self.pseudo_log_counts = nn.Parameter(start)
        self.pseudo_labels = nn.Parameter(torch.randn(len(start), self.n_labels))
        grows(self, pseudo_labels=ByLabel(dim=1))
        turn = torch.arange(len(start))
        categories = [turn % n for n in self.n_cats_per_cov]
        self.register_buffer("pseudo_batch", turn % self.n_batch)
        self.register_buffer("pseudo_categorical", torch.stack([turn, *categories], -1)[:, 1:])

    def pseudo_cells(self) -> Cells:
        """What the encoders see in the place of cells, (P, G)."""
        counts = self.pseudo_log_counts.exp()
        return Cells.from_counts(
            counts,
            batch=self.pseudo_batch,
            continuous=counts.new_zeros(len(counts), self.n_continuous_cov),
            categorical=self.pseudo_categorical,
        )

    def p_u(self, cells: Cells) -> TorchDistribution:
        """The mean of q(u | z, y) at the pseudo cells; batch () event (K,)."""
        pseudo = self.pseudo_cells()
        with frozen_statistics(self):
            z = self.latent_point(self.q_z(pseudo))
            q_u = self.q_u(z, self.pseudo_labels.softmax(-1), pseudo)
        return MixtureSameFamily(Categorical(z.new_ones(len(pseudo))), q_u)


def checked_counts(counts: Any, n_genes: int) -> Tensor:
    """Counts of pseudo cells as (P, G); InputError if they are none."""
    try:
        found = torch.as_tensor(np.asarray(counts, dtype=np.float32))
    except (TypeError, ValueError):
        raise InputError(
            f"pseudo_counts is a {type(counts).__name__}, expected an array of numbers, a row for "
            "each pseudo cell; of a sparse matrix give its .toarray()"
        ) from None
    if found.ndim != 2 or found.shape[1] != n_genes or not len(found):
        raise InputError(
            f"pseudo_counts has shape {tuple(found.shape)}, expected a row for each pseudo cell "
            f"and a column for each of the {n_genes} genes"
        )
    if not found.isfinite().all() or (found < 0).any():
        raise InputError("pseudo_counts has numbers that are negative or not finite; give counts")
    return found
