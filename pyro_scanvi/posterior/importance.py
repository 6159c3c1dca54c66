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

Where few of the draws of z carry all the weight, so do they the labels. With q(z | x) taken for the
posterior of z no weights are needed, :func:`label_posterior_of_states`:

.. math:: \mathbb E_{q(z, l \mid x)}\, p(y \mid z, l, x), \qquad
    p(y \mid z, l, x) \propto p(y)\, p(z \mid y)\, p(x \mid z, l, y).

What is read are the factors ``p_*`` and ``q_*`` of the model and what it has ``observed``, all
modalities together. Sites outside the plate of cells are drawn from their posterior: the density
is that of new cells, :math:`p(x \mid \text{data})`. Of a model or guide of one's own the sites are
read, not the factors: see :mod:`pyro_scanvi.posterior.traces`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_scanvi.data.minibatches import CellData, Cells
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import (
    LARGEST_PASS,
    at_once,
    evaluating,
    log_prob_of_events,
    over_minibatches,
    parts,
    total,
)
from pyro_scanvi.posterior.traces import TraceWeights

N_INNER_SAMPLES = 5
# Numbers in the largest tensor of a pass, 4 MB in float32; a likelihood makes about 15 such.
PASS_ELEMENTS = LARGEST_PASS // 4


class Estimate(Protocol):
    """A way to estimate log p(x, y)."""

    def numbers_per_draw(self, cells: Cells) -> int:
        """Size of the largest tensor of one draw of `cells`; the story is checked."""

    def log_joint(self, cells: Cells, n_samples: int, n_per_pass: int) -> Tensor:
        """(N, L) in nats, float64; (N, 1) where there are no labels."""

    def label_given_states(
        self, cells: Cells, n_samples: int, n_per_pass: int, evidence: Tensor
    ) -> Tensor:
        """Mean of p(y | z, l, x, e) over draws of the guide, (N, L), float64; from log p(e | y)."""


@dataclass(frozen=True)
class Nested:
    """Nested sampling of the sites of SCANVAE, with M draws of u for each of z."""

    vae: SCANVAE
    n_inner_samples: int

    def numbers_per_draw(self, cells: Cells) -> int:
        return _numbers_per_draw(self.vae, cells, self.n_inner_samples)

    def log_joint(self, cells: Cells, n_samples: int, n_per_pass: int) -> Tensor:
        return log_joint(self.vae, cells, n_samples, self.n_inner_samples, n_per_pass)

    def label_given_states(
        self, cells: Cells, n_samples: int, n_per_pass: int, evidence: Tensor
    ) -> Tensor:
        known = evidence.T.unsqueeze(-2)  # L, 1, N
        draws = _of_draws(self.vae, cells, n_samples, self.n_inner_samples, n_per_pass)
        return total((log_p + known).softmax(0).sum(-2) for _, log_p in draws).T / n_samples


def marginal_log_likelihood(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    n_samples: int,
    n_inner_samples: int = N_INNER_SAMPLES,
    feed_labels: bool = False,
) -> np.ndarray:
    r"""Estimate of :math:`\log p(x)` of each cell, (N,), in nats.

    With `feed_labels`, of :math:`\log p(x, e)` with what is known of the label, e.
    """

    estimate = _estimate(vae, n_inner_samples, by_label=feed_labels)

    def ask(cells: Cells, n_per_pass: int) -> Tensor:
        log_p = estimate.log_joint(cells, n_samples, n_per_pass)
        return (log_p + _known(vae, cells, feed_labels)).logsumexp(-1)

    return _over_passes(vae, data, batch_size, estimate, ask)


def label_posterior(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    n_samples: int,
    n_inner_samples: int = N_INNER_SAMPLES,
    feed_labels: bool = False,
) -> np.ndarray:
    r"""Bayes' rule, :math:`p(y \mid x) = p(x, y) / \sum_{y'} p(x, y')` of each cell, (N, L).

    With `feed_labels` :math:`p(y \mid x, e)`, with what is known of the label, e.
    """

    estimate = _estimate(vae, n_inner_samples, by_label=True)

    def ask(cells: Cells, n_per_pass: int) -> Tensor:
        log_p = estimate.log_joint(cells, n_samples, n_per_pass)
        return (log_p + _known(vae, cells, feed_labels)).softmax(-1)

    return _over_passes(vae, data, batch_size, estimate, ask)


def label_posterior_of_states(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    n_samples: int,
    n_inner_samples: int = N_INNER_SAMPLES,
    feed_labels: bool = False,
) -> np.ndarray:
    r"""The mean of :math:`p(y \mid z, l, x)` over draws of the guide, of each cell, (N, L).

    With `feed_labels` of :math:`p(y \mid z, l, x, e)`, with what is known of the label, e.

    Raises
    ------
    InputError
        For a ``model`` or ``guide`` of one's own, whose factors are not known.
    """
    estimate = _estimate(vae, n_inner_samples, by_label=True)

    def ask(cells: Cells, n_per_pass: int) -> Tensor:
        evidence = _known(vae, cells, feed_labels)
        return estimate.label_given_states(cells, n_samples, n_per_pass, evidence)

    return _over_passes(vae, data, batch_size, estimate, ask)


def log_joint(
    vae: SCANVAE,
    cells: Cells,
    n_samples: int,
    n_inner_samples: int,
    n_per_pass: int | None = None,
) -> Tensor:
    r"""Estimate of :math:`\log p(x, y)` for every label y of each cell.

    What is known of labels is not read. The same draws of z and l serve all labels, so their noise
    mostly cancels in the odds of two labels.

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
    if n_per_pass is None:
        n_per_pass = at_once(_numbers_per_draw(vae, cells, n_inner_samples), PASS_ELEMENTS)
    log_sum = torch.full((), -math.inf, dtype=torch.float64, device=cells.x.device)
    for log_weight, log_p in _of_draws(vae, cells, n_samples, n_inner_samples, n_per_pass):
        log_sum = torch.logaddexp(log_sum, (log_weight + log_p).logsumexp(-2))  # L, N
    return (log_sum - math.log(n_samples)).T


def _of_draws(
    vae: SCANVAE, cells: Cells, n_samples: int, n_inner_samples: int, n_per_pass: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each pass the weights of its draws, (S, N), and log p(y) p(x | z, l, y) p(z | y)."""
    y = _every_label(vae, len(cells))  # L, 1, N, L
    for drawn, z, library, log_weight in _proposals(vae, cells, n_samples, n_per_pass):
        log_p_y = log_prob_of_events(vae.p_y(drawn), y)  # L, 1, N, or L, S, N
        seen = vae.observed(z, library, y, drawn).values()
        log_p_x = total(log_prob_of_events(p, value) for p, value in seen)  # S, N, or L, S, N
        log_p_z = log_state_density(vae, z, y, drawn, n_inner_samples)  # L, S, N
        yield log_weight, log_p_y + log_p_x + log_p_z


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
        log_prob_of_events(vae.p_u(cells), u)
        + log_prob_of_events(vae.p_z(u, y, cells), z)
        - log_prob_of_events(q_u, u)
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
        yield drawn, z, *with_library(drawn, -log_prob_of_events(q_z, z))


def _libraries(vae: SCANVAE, cells: Cells) -> Callable[[Cells, Tensor], tuple[Tensor, Tensor]]:
    """From cells and log weights of draws (S, N) to l, and weights with that of l if drawn."""
    known = vae.observed_library(cells)
    if known is not None:
        return lambda _, log_weight: (known, log_weight)
    q_l = vae.q_l(cells)

    def drawn(cells: Cells, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        library = q_l.sample(log_weight.shape[:1])
        log_p, log_q = log_prob_of_events(vae.p_l(cells), library), log_prob_of_events(q_l, library)
        return library, log_weight + log_p - log_q

    return drawn


def _estimate(vae: SCANVAE, n_inner_samples: int, by_label: bool) -> Estimate:
    """By nested sampling of the sites of SCANVAE, or of another story by weights of traces."""
    story = type(vae).model, type(vae).guide
    if story == (SCANVAE.model, SCANVAE.guide):
        return Nested(vae, n_inner_samples)
    return TraceWeights(vae, by_label)


def _every_label(vae: SCANVAE, n_cells: int) -> Tensor:
    """All labels as one-hot, for each cell, (L, 1, N, L); the second dimension is for draws."""
    one_hots = torch.eye(vae.n_labels, dtype=vae.y_prior.dtype, device=vae.y_prior.device)
    return one_hots[:, None, None].expand(-1, 1, n_cells, -1)


def _known(vae: SCANVAE, cells: Cells, feed_labels: bool) -> Tensor:
    """log p(e | y), (N, L); 0, (N, 1), where it is not to be read."""
    return vae.evidence(cells) if feed_labels else vae.y_prior.new_zeros(len(cells), 1)


def _over_passes(
    vae: SCANVAE,
    data: CellData,
    batch_size: int,
    estimate: Estimate,
    ask: Callable[[Cells, int], Tensor],
) -> np.ndarray:
    """What `ask` answers of each minibatch, so many draws at a time, joined."""
    numbers = _numbers_of_a_cell(vae, data, estimate)

    def bounded(cells: Cells) -> Tensor:
        return ask(cells, at_once(numbers * len(cells), PASS_ELEMENTS))

    return over_minibatches(vae, data, min(batch_size, at_once(numbers, PASS_ELEMENTS)), bounded)


def _numbers_of_a_cell(vae: SCANVAE, data: CellData, estimate: Estimate) -> int:
    """Size of the largest tensor of one draw of one cell."""
    with evaluating(vae, data), torch.random.fork_rng():
        cell = vae.at_shared_points(data[np.arange(1)].to(vae.y_prior.device))
        return estimate.numbers_per_draw(cell)


def _numbers_per_draw(vae: SCANVAE, cells: Cells, n_inner_samples: int) -> int:
    """Size of the largest tensor of one draw of z for each cell."""
    z = vae.y_prior.new_zeros(1, len(cells), vae.n_latent)
    p_x = vae.p_x(z, torch.ones_like(z[..., :1]), _every_label(vae, len(cells)), cells)
    # The batch shape has L times the cells where p(x) depends on the label.
    counts = p_x.batch_shape.numel() * vae.n_input
    return max(counts, len(cells) * vae.n_labels * n_inner_samples * vae.n_hidden)
