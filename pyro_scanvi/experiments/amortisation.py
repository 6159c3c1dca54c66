r"""How much the encoders lose against a posterior of each cell's own, with decoders fixed.

For the bound L of a guide q, and the best member q* of a family that has parameters of each cell
(Cremer et al. 2018, ICML, arXiv 1801.03558, eqs. 5 and 6),

.. math::

    \log p(x) - \mathcal L(q) = \underbrace{\log p(x) - \mathcal L(q^*)}_{\text{approximation}}
        + \underbrace{\mathcal L(q^*) - \mathcal L(q)}_{\text{amortisation}} .

The families are q(z) q(y | z) q(u | z, y) with, for each cell, a Normal for z, logits of y that are
linear in z, and for each label a Normal for u whose mean is linear in z; covariances are diagonal,
or full. The networks of the guide are not linear in z, so a family need not hold the guide as it
is, and the amortisation gap may fall a little below 0.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyro
import torch
from matplotlib.axes import Axes
from pyro.distributions import MultivariateNormal, Normal, OneHotCategorical, TorchDistribution
from torch import Tensor, nn

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.estimator.scanvi import SCANVI
from pyro_scanvi.experiments.intervals import check_seeds, summary, tidy
from pyro_scanvi.experiments.plotting import of_metric, points
from pyro_scanvi.experiments.running import (
    apart,
    clock,
    copy_of,
    some_cells,
    tracked,
)
from pyro_scanvi.model.objective import SemiSupervisedELBO
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import parts
from pyro_scanvi.posterior.importance import log_joint
from pyro_scanvi.validation import InputError, check_at_least, check_flags, check_positive

AMORTISED = "amortised"
N_START = 200  # draws of the guide, whose moments a family starts from
N_PER_PASS = 50  # draws of the bound at a time
N_INNER = 5


class Diagonal(nn.Module):
    """Normals with independent dimensions; scales (..., K)."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.log_scale = nn.Parameter(scale.log())

    def forward(self, loc: Tensor, select: Callable[[Tensor], Tensor]) -> TorchDistribution:
        """Around `loc`, with those scales that `select` takes of all."""
        return Normal(loc, select(self.log_scale).exp()).to_event(1)


class FullCovariance(nn.Module):
    """Multivariate Normals; triangles (..., K, K), made of their logarithmic diagonal and rest."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.log_diagonal = nn.Parameter(scale.log())
        self.below = nn.Parameter(torch.zeros(*scale.shape, scale.shape[-1]).to(scale))

    def forward(self, loc: Tensor, select: Callable[[Tensor], Tensor]) -> TorchDistribution:
        """Around `loc`, with those triangles that `select` takes of all."""
        tril = self.below.tril(-1) + self.log_diagonal.exp().diag_embed()
        return MultivariateNormal(loc, scale_tril=select(tril), validate_args=False)


Family = Callable[[Tensor], nn.Module]
FAMILIES: dict[str, Family] = {"diagonal": Diagonal, "full covariance": FullCovariance}


class PerCell(nn.Module):
    """q(z), q(y | z) and q(u | z, y) with parameters of each cell.

    They start at the mean and the standard deviations of what the guide of `vae` draws.

    Parameters
    ----------
    vae
        Whose guide they replace.
    cells
        N cells, all of them in each minibatch.
    family
        From scales (N, ..., K) to a module that is called with locations and a selection.
    """

    def __init__(self, vae: SCANVAE, cells: Cells, family: Family):
        super().__init__()
        with torch.no_grad():
            z = vae.q_z(cells).sample((N_START,))
            point = z.mean(0)
            label = torch.eye(vae.n_labels).to(point).unsqueeze(1).expand(-1, len(cells), -1)
            u = vae.q_u(point, label, cells).sample((N_START,)).movedim(2, 1)  # S, N, L, K
            logits = vae.q_y(point, cells).logits
        n, n_labels, width = len(cells), vae.n_labels, u.shape[-1]
        self.z_loc, self.z_spread = nn.Parameter(point.clone()), family(z.std(0))
        self.u_loc, self.u_spread = nn.Parameter(u.mean(0)), family(u.std(0))
        zeros = point.new_zeros
        self.u_slope = nn.Parameter(zeros(n, n_labels, width, point.shape[-1]))
        self.y_logit, self.y_slope = (
            nn.Parameter(logits.clone()),
            nn.Parameter(zeros(n, n_labels, point.shape[-1])),
        )

    def q_z(self, cells: Cells) -> TorchDistribution:
        """q(z) of each cell; batch (N,) event (K,)."""
        return self.z_spread(self.z_loc, lambda scales: scales)

    def q_y(self, z: Tensor, cells: Cells) -> OneHotCategorical:
        """q(y | z), logits linear in z; batch (..., N) event (L,)."""
        slope = torch.einsum("nlk,...nk->...nl", self.y_slope, z - self.z_loc)
        return OneHotCategorical(logits=self.y_logit + slope)

    def q_u(self, z: Tensor, y: Tensor, cells: Cells) -> TorchDistribution:
        """q(u | z, y), its mean linear in z for each label; batch (..., N) event (K,)."""
        slope = torch.einsum("...nl,nljk,...nk->...nj", y, self.u_slope, z - self.z_loc)

        def of_label(scales: Tensor) -> Tensor:
            taken = torch.einsum("...nl,nlk->...nk", y, scales.flatten(2))
            return taken.unflatten(-1, scales.shape[2:])

        return self.u_spread(of_label(self.u_loc) + slope, of_label)


def with_guide(vae: SCANVAE, guide: PerCell) -> SCANVAE:
    """A copy of `vae`, its weights fixed, whose factors q_z, q_y and q_u are those of each cell."""
    free = copy.deepcopy(vae).requires_grad_(False)
    for name in ("q_z", "q_y", "q_u"):
        setattr(free, name, getattr(guide, name))
    return free


@dataclass(frozen=True)
class Fit:
    """How the free posteriors are fitted, and bounds measured.

    Attributes
    ----------
    n_steps, lr, num_particles
        Of Adam; the rate falls to 0 along a cosine.
    n_draws
        Of each bound, and of log p(x) from each proposal.
    """

    n_steps: int = 1000
    lr: float = 0.03
    num_particles: int = 5
    n_draws: int = 1000

    def __post_init__(self) -> None:
        sizes = {"num_particles": self.num_particles, "n_draws": self.n_draws}
        check_at_least(1, n_steps=self.n_steps, **sizes)
        check_positive(lr=self.lr)

    def guide(self, vae: SCANVAE, cells: Cells, family: Family) -> SCANVAE:
        """The model with the fitted posteriors for a guide."""
        guide = PerCell(vae, cells, family)
        free = with_guide(vae, guide)
        bound = SemiSupervisedELBO(None, num_particles=self.num_particles)(free.model, free.guide)
        optimiser = torch.optim.Adam(guide.parameters(), lr=self.lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.n_steps)
        for _ in range(self.n_steps):
            optimiser.zero_grad(set_to_none=True)
            bound(cells).backward()
            optimiser.step()
            falling.step()
        return free

    def elbos(self, vae: SCANVAE, cells: Cells) -> Tensor:
        """The ELBO of each cell, (N,), the mean over draws."""
        total = torch.zeros(len(cells), dtype=torch.float64)
        with torch.no_grad():
            for n in parts(self.n_draws, N_PER_PASS):
                elbo = SemiSupervisedELBO(None, closed_form=(), num_particles=n)
                total += n * elbo.parts(vae.model, vae.guide, cells).elbo().double().cpu()
        return total / self.n_draws

    def log_likelihood(self, proposals: Sequence[SCANVAE], cells: Cells) -> Tensor:
        """log p(x) of each cell, (N,): importance sampling, the mean over all proposals.

        Each is unbiased, so the mean is; it is as good as the best of them, to log of their number.
        """
        with torch.no_grad():
            each = [log_joint(vae, cells, self.n_draws, N_INNER).logsumexp(-1) for vae in proposals]
        return torch.stack(each).logsumexp(0).cpu() - np.log(len(each))


DEFAULT_FIT = Fit()


def amortisation_gaps(
    model: SCANVI,
    families: Mapping[str, Family] = FAMILIES,
    *,
    positions: Sequence[int] | None = None,
    n_cells: int = 8,
    seeds: Sequence[int] = (0, 1, 2),
    fit: Fit = DEFAULT_FIT,
    progress_bar: bool = True,
) -> pd.DataFrame:
    """Gaps of approximation and of amortisation of some cells, in nats.

    Labels are taken as unknown. The model stays as it is.

    Parameters
    ----------
    model
        With the decoders that are fixed, and the guide that is asked about.
    families
        From a name to what makes its scales into Normals: :data:`FAMILIES`, and one's own.
    positions, n_cells
        Which cells of the training data, or how many, drawn at random, the same for all seeds.
    seeds
        Of fits and draws.
    fit
        Steps, rates and draws.
    progress_bar
        Show one.

    Returns
    -------
    DataFrame
        ``seed``, ``setting`` (a family, or "amortised"), ``cell`` (name in obs), ``metric``,
        ``value``. "elbo"; "log_likelihood"; "approximation_gap", log p(x) minus the ELBO, which for
        "amortised" is the whole gap; "amortisation_gap" of a family; "seconds" of its fit, for each
        cell an equal share.

    Raises
    ------
    InputError
        For no cells or more than there are, numbers below 1, seeds that come twice, a model with
        sites that all cells share.
    """
    check_at_least(1, n_cells=n_cells)
    check_flags(progress_bar=progress_bar)
    seeds = check_seeds(seeds)
    _check_families(model.module, families)
    names, cells = some_cells(model, positions, n_cells)
    vae = copy_of(model)
    rows: list[dict] = []
    for seed in tracked(seeds, len(seeds), "posteriors of cells", progress_bar):
        with apart(seed), pyro.validation_enabled(False):
            for setting, metric, values in _gaps(vae, cells, families, fit):
                common = {"seed": seed, "setting": setting, "metric": metric}
                of_cells = zip(names, values.tolist(), strict=True)
                rows += [common | {"cell": name, "value": value} for name, value in of_cells]
    return tidy(rows)


def plot_amortisation_gaps(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Both gaps of each family: mean over cells, and its t interval over cells."""
    gaps = frame[frame["metric"].isin(["approximation_gap", "amortisation_gap"])]
    of_metric(frame, "approximation_gap")
    axis = points(summary(gaps, unit="cell"), colour="metric", ax=ax)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set(xlabel="nats per cell")
    return axis


def _gaps(
    vae: SCANVAE, cells: Cells, families: Mapping[str, Family], fit: Fit
) -> Iterator[tuple[str, str, Tensor]]:
    """Setting, metric, and its value for each cell."""
    guides, seconds = {AMORTISED: vae}, {}
    for name, family in families.items():
        now = clock(cells.x.device)
        guides[name] = fit.guide(vae, cells, family)
        seconds[name] = now() / len(cells)
    elbos = {name: fit.elbos(guide, cells) for name, guide in guides.items()}
    log_likelihood = fit.log_likelihood(list(guides.values()), cells)
    yield "importance", "log_likelihood", log_likelihood
    for name, elbo in elbos.items():
        yield name, "elbo", elbo
        yield name, "approximation_gap", log_likelihood - elbo
    for name in families:
        yield name, "amortisation_gap", elbos[name] - elbos[AMORTISED]
        yield name, "seconds", torch.full((len(cells),), seconds[name])


def _check_families(vae: SCANVAE, families: Mapping[str, Family]) -> None:
    if not families or AMORTISED in families or not all(map(callable, families.values())):
        raise InputError(
            f"families={families!r}, expected callables from scales to a module by name, such as "
            f"{{'diagonal': Diagonal}}; {AMORTISED!r} is the guide's own name"
        )
    shared = vae.p_shared()
    if shared:
        raise InputError(
            f"the cells of this model share {', '.join(shared)}, so that no cell has a posterior "
            "of its own; fix them in a subclass first"
        )
