r"""Marginal likelihood of cells, and their labels by Bayes' rule, by importance sampling.

The guide proposes, the model weighs. With S draws :math:`z_s, l_s` of :math:`q(z \mid x)\,
q(l \mid x)`, and for each of them M draws :math:`u_m` of :math:`q(u \mid z_s, y)`,

.. math::

    \hat p(x, y) &= \frac1S \sum_s p(y)\,
        \frac{p(x \mid z_s, l_s, y)\, p(l_s)}{q(z_s \mid x)\, q(l_s \mid x)}\, \hat p(z_s \mid y),
    \\
    \hat p(z \mid y) &= \frac1M \sum_m \frac{p(u_m)\, p(z \mid u_m, y)}{q(u_m \mid z, y)}.

The inner mean is unbiased, so the outer one is too (nested importance sampling; Naesseth et al.
2015, ICML, arXiv 1502.02536). Its logarithm lies below :math:`\log p(x, y)` in expectation, above
the ELBO, and rises with S and with M (Burda et al. 2016, ICLR, arXiv 1509.00519, theorem 1).

What is read are the factors ``p_*`` and ``q_*`` of the model and what it has ``observed``, all
modalities together. Sites outside the plate of cells are drawn from their posterior: the density
is that of new cells, :math:`p(x \mid \text{data})`. A model or guide of one's own is refused.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_scanvi.data.minibatches import CellData, Cells
from pyro_scanvi.model.pyro_internals import element_log_prob, elements
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import (
    LARGEST_PASS,
    at_once,
    at_shared_points,
    evaluating,
    over_minibatches,
    parts,
    total,
)
from pyro_scanvi.validation import InputError

N_INNER_SAMPLES = 5
# Numbers in the largest tensor of a pass, 4 MB in float32; a likelihood makes about 15 such.
PASS_ELEMENTS = LARGEST_PASS // 4


def marginal_log_likelihood(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    n_samples: int,
    n_inner_samples: int = N_INNER_SAMPLES,
    feed_labels: bool = False,
) -> np.ndarray:
    r"""Estimate of :math:`\log p(x)` of each cell, (N,), in nats.

    With `feed_labels`, of :math:`\log p(x, y)` where the label y is known.
    """

    def log_likelihood(cells: Cells, log_p: Tensor) -> Tensor:
        log_evidence = log_p.logsumexp(-1)
        if not feed_labels:
            return log_evidence
        at_label = log_p.gather(-1, cells.label.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(cells.labelled, at_label, log_evidence)

    return _over_log_joint(vae, data, batch_size, n_samples, n_inner_samples, log_likelihood)


def label_posterior(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    n_samples: int,
    n_inner_samples: int = N_INNER_SAMPLES,
) -> np.ndarray:
    r"""Bayes' rule, :math:`p(y \mid x) = p(x, y) / \sum_{y'} p(x, y')` of each cell, (N, L)."""

    def probabilities(cells: Cells, log_p: Tensor) -> Tensor:
        return log_p.softmax(-1)

    return _over_log_joint(vae, data, batch_size, n_samples, n_inner_samples, probabilities)


def log_joint(
    vae: SCANVAE,
    cells: Cells,
    n_samples: int,
    n_inner_samples: int,
    n_per_pass: int | None = None,
) -> Tensor:
    r"""Estimate of :math:`\log p(x, y)` for every label y of each cell.

    Known labels are not read. The same draws of z and l serve all labels, so their noise mostly
    cancels in the odds of two labels.

    Parameters
    ----------
    vae
        The model, in eval mode.
    cells
        A minibatch, with a value of what all cells share; see over_minibatches.
    n_samples, n_inner_samples
        Draws of z and l for each cell, S, and of u for each of them and each label, M.
    n_per_pass
        Draws of z to work on at a time, which bounds memory; None chooses.

    Returns
    -------
    Tensor
        (N, L) in nats, float64: sums over thousands of genes lose digits in float32.
    """
    y = _every_label(vae, len(cells))  # L, 1, N, L
    if n_per_pass is None:
        n_per_pass = at_once(_numbers_per_draw(vae, cells, n_inner_samples), PASS_ELEMENTS)
    log_sum = torch.full((), -math.inf, dtype=torch.float64, device=y.device)
    for drawn, z, library, log_weight in _proposals(vae, cells, n_samples, n_per_pass):
        log_p_y = _log_prob(vae.p_y(drawn), y)  # L, 1, N, or L, S, N
        seen = vae.observed(z, library, y, drawn).values()
        log_p_x = total(_log_prob(p, value) for p, value in seen)  # S, N, or L, S, N
        log_p_z = log_state_density(vae, z, y, drawn, n_inner_samples)  # L, S, N
        log_p = log_p_y + log_weight + log_p_x + log_p_z
        log_sum = torch.logaddexp(log_sum, log_p.logsumexp(-2))  # L, N
    return (log_sum - math.log(n_samples)).T


def log_state_density(vae: SCANVAE, z: Tensor, y: Tensor, cells: Cells, n_samples: int) -> Tensor:
    r"""Log of an unbiased estimate of :math:`p(z \mid y) = \int p(u)\, p(z \mid u, y)\, du`.

    Parameters
    ----------
    vae
        The model, in eval mode.
    z, y
        Cell states (S, N, K), and labels as one-hot (L, 1, N, L).
    cells
        The minibatch, with draws of what all cells share.
    n_samples
        Draws of u, M.

    Returns
    -------
    Tensor
        (L, S, N) in nats, float64.
    """
    y = y.unsqueeze(1)  # L, 1, 1, N, L
    q_u = vae.q_u(z, y, cells)
    shape = torch.broadcast_shapes(q_u.batch_shape, (n_samples, *z.shape[:-1]))
    q_u = q_u.expand(shape)
    u = q_u.sample()  # L, M, S, N, K
    log_ratio = (
        _log_prob(vae.p_u(cells), u) + _log_prob(vae.p_z(u, y, cells), z) - _log_prob(q_u, u)
    )
    return log_ratio.logsumexp(-3) - math.log(n_samples)


def _proposals(
    vae: SCANVAE, cells: Cells, n_samples: int, n_per_pass: int
) -> Iterator[tuple[Cells, Tensor, Tensor, Tensor]]:
    """For each pass cells with shared draws, z, l, and log p(l) - log q(l | x) - log q(z | x).

    z is (S, N, K), the weights are (S, N). Shared sites are drawn from their posterior, and not
    weighted: the answer is about new cells, given what training has seen. What proposes z and l
    sees them as `cells` has them.
    """
    q_z, with_library = vae.q_z(cells), _libraries(vae, cells)
    for n in parts(n_samples, n_per_pass):
        z = q_z.sample((n,))
        shared = {name: q.sample((n, 1)) for name, q in vae.q_shared().items()}
        drawn = replace(cells, shared=shared)
        yield drawn, z, *with_library(drawn, -_log_prob(q_z, z))


def _libraries(vae: SCANVAE, cells: Cells) -> Callable[[Cells, Tensor], tuple[Tensor, Tensor]]:
    """From cells and log weights of draws (S, N) to l, and weights with that of l if drawn."""
    known = vae.observed_library(cells)
    if known is not None:
        return lambda _, log_weight: (known, log_weight)
    q_l = vae.q_l(cells)

    def drawn(cells: Cells, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        library = q_l.sample(log_weight.shape[:1])
        log_p, log_q = _log_prob(vae.p_l(cells), library), _log_prob(q_l, library)
        return library, log_weight + log_p - log_q

    return drawn


def _check_story(vae: SCANVAE) -> None:
    """Refuse a model or a guide of another shape than the one that is summed and integrated."""
    own = [n for n in ("model", "guide") if getattr(type(vae), n) is not getattr(SCANVAE, n)]
    if own:
        raise InputError(
            f"{type(vae).__name__} has a {' and a '.join(own)} of its own, and marginal likelihood "
            "and Bayes' rule integrate u, z, l and y of SCANVAE's; put sites that all cells share "
            "into p_shared and q_shared, and what is seen of a cell into observed, or take get_elbo"
        )


def _every_label(vae: SCANVAE, n_cells: int) -> Tensor:
    """All labels as one-hot, for each cell, (L, 1, N, L); the second dimension is for draws."""
    one_hots = torch.eye(vae.n_labels, dtype=vae.y_prior.dtype, device=vae.y_prior.device)
    return one_hots[:, None, None].expand(-1, 1, n_cells, -1)


def _over_log_joint(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    n_samples: int,
    n_inner_samples: int,
    answer: Callable[[Cells, Tensor], Tensor],
) -> np.ndarray:
    """What `answer` makes of the log joints of each minibatch, joined."""

    def ask(cells: Cells) -> Tensor:
        return answer(cells, log_joint(vae, cells, n_samples, n_inner_samples))

    _check_story(vae)
    batch_size = min(batch_size, _cells_per_pass(vae, data, n_inner_samples))
    return over_minibatches(vae, data, batch_size, ask)


def _cells_per_pass(vae: SCANVAE, data: CellData, n_inner_samples: int) -> int:
    """How many cells keep the tensors of one draw of z within `PASS_ELEMENTS`."""
    with evaluating(vae):
        cell = at_shared_points(vae, data[np.arange(1)].to(vae.y_prior.device))
        return at_once(_numbers_per_draw(vae, cell, n_inner_samples), PASS_ELEMENTS)


def _numbers_per_draw(vae: SCANVAE, cells: Cells, n_inner_samples: int) -> int:
    """Size of the largest tensor of one draw of z for each cell."""
    z = vae.y_prior.new_zeros(1, len(cells), vae.n_latent)
    p_x = vae.p_x(z, torch.ones_like(z[..., :1]), _every_label(vae, len(cells)), cells)
    # The batch shape has L times the cells where p(x) depends on the label.
    counts = p_x.batch_shape.numel() * vae.n_input
    return max(counts, len(cells) * vae.n_labels * n_inner_samples * vae.n_hidden)


def _log_prob(distribution: Distribution, value: Tensor) -> Tensor:
    """Log probability of events, summed over their dimensions in float64."""
    event_dims = len(distribution.event_shape) - len(elements(distribution)[0].event_shape)
    log_prob = element_log_prob(distribution, value)
    if not event_dims:
        return log_prob.double()
    return log_prob.sum(tuple(range(-event_dims, 0)), dtype=torch.float64)
