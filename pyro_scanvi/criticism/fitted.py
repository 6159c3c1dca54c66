"""Simulation-based calibration of what all cells share, by a training on each simulated data set.

Everything random is drawn from the prior, what all cells share too; a model is fitted to the
simulated cells, and the truth is ranked among draws of its posterior q. The weights of what the
model reads are the same in simulation and inference: they have no prior, so a fit that changes
them is no inference under the model that simulates, and its ranks mean nothing.

Ranks of what is shared do not see a posterior that is the prior; give `quantities` that depend on
the data, such as a log likelihood (Modrák et al. 2023, arXiv 2211.02383).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from rich.progress import track
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_scanvi.criticism.calibration import Quantity, elements_of
from pyro_scanvi.criticism.ranks import Calibration, ranks_of, tidy
from pyro_scanvi.criticism.story import Values, shared_draws, tell, with_data
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.objective import SemiSupervisedELBO
from pyro_scanvi.model.pyro_internals import own_sites
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import evaluating, seeded
from pyro_scanvi.posterior.traces import site_log_prob
from pyro_scanvi.validation import (
    InputError,
    check_at_least,
    check_not_negative,
    check_positive,
    plain_arguments,
)

Fit = Callable[[SCANVAE, Cells], SCANVAE]


@dataclass(frozen=True)
class FitGuide:
    """Train what the guide alone reads, by Adam on the ELBO of all cells at once.

    In eval mode: without dropout, and batch norm with its statistics as they are.

    Parameters
    ----------
    n_steps
        Number of steps.
    lr
        Learning rate of the first; it falls to 0 along a cosine.
    num_particles
        Draws of each cell's sites for a step.
    """

    n_steps: int = 500
    lr: float = 0.02
    num_particles: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, n_steps=self.n_steps, num_particles=self.num_particles)
        check_positive(lr=self.lr)

    def __call__(self, vae: SCANVAE, cells: Cells) -> SCANVAE:
        """The same model, fitted."""
        trained = parameters_of_guide(vae, cells)
        elbo = SemiSupervisedELBO(None, num_particles=self.num_particles)
        loss = elbo(vae.model, vae.guide)
        optimiser = Adam(trained, lr=self.lr)
        schedule = CosineAnnealingLR(optimiser, self.n_steps)
        for _ in range(self.n_steps):
            optimiser.zero_grad()
            loss(cells).backward()
            optimiser.step()
            schedule.step()
        return vae


@plain_arguments
def calibration_of_fits(
    vae: SCANVAE,
    fit: Fit,
    n_cells: int,
    n_labelled: int = 0,
    n_simulations: int = 100,
    n_draws: int = 99,
    batch: int = 0,
    library: float | Tensor | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    seed: int | None = None,
    progress_bar: bool = True,
) -> Calibration:
    """Ranks of what all cells share among draws of the posterior that was fitted to their data.

    Parameters
    ----------
    vae
        What simulates; each fit gets a copy of it, in eval mode and with its weights.
    fit
        From such a copy and the simulated cells to the fitted model, as ``FitGuide()``.
    n_cells, n_labelled
        Cells of each data set, and how many of them, the first, have a label, drawn as the model's
        label noise says; without noise the true one.
    n_simulations
        Number of data sets, each with a fit of its own.
    n_draws, batch, library, seed, progress_bar
        As in :func:`~pyro_scanvi.criticism.calibration.simulation_based_calibration`.
    quantities
        More to be ranked, by name: from values (1 + S, ...) of what is shared, by site, and the
        cells, to (1 + S,).

    Returns
    -------
    Calibration
        Of each element of each shared site, and of `quantities`.

    Raises
    ------
    InputError
        If nothing is shared, or for sizes that are none.
    """
    check_at_least(1, n_cells=n_cells, n_simulations=n_simulations, n_draws=n_draws)
    check_not_negative(n_labelled=n_labelled)
    if not vae.p_shared():
        raise InputError(
            f"{type(vae).__name__} has no site that all cells share (p_shared), so there is "
            "nothing to rank; simulation_based_calibration ranks the states of cells"
        )
    copied, start = copy.deepcopy(vae).eval(), vae.state_dict()
    found: list[dict[tuple[str, str], Tensor]] = []
    with seeded(seed), evaluating(vae):
        for _ in track(range(n_simulations), "calibrating", disable=not progress_bar):
            truth, cells = _simulated(vae, vae.unseen(n_cells, batch, library), n_labelled)
            copied.load_state_dict(start)
            with torch.enable_grad():
                fitted = fit(copied, cells)
            found.append(_ranked(truth, _shared(fitted, cells, n_draws), cells, quantities))
    ranks = {name: torch.stack([r[name] for r in found]).cpu().numpy() for name in found[0]}
    return Calibration(tidy(ranks), n_draws)


def parameters_of_guide(vae: SCANVAE, cells: Cells) -> list[Parameter]:
    """Those that the model does not read: changing them changes q alone.

    Raises
    ------
    InputError
        If there is none.
    """
    guide = poutine.trace(vae.guide).get_trace(cells)
    for site in own_sites(guide).values():
        site["value"] = site["value"].detach()
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(cells)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    log_p = sum((site_log_prob(s).sum() for s in own_sites(model).values()), torch.zeros(()))
    # The addend makes a graph where the model reads no parameter at all.
    log_p = log_p + torch.zeros((), requires_grad=True)
    gradients = torch.autograd.grad(log_p, parameters, allow_unused=True)
    free = [p for p, g in zip(parameters, gradients, strict=True) if g is None]
    if not free:
        raise InputError("the model reads all trainable parameters, so its guide has none to fit")
    return free


def noisy_labels(vae: SCANVAE, y: Tensor, cells: Cells) -> Tensor:
    """A label given for each cell of true label y, one-hot (N, L), as the label noise says; (N,).

    The probability of label k is exp of the evidence that it would be.
    """
    codes = range(y.shape[-1])
    each = [replace(cells, label=torch.full_like(cells.label, k)) for k in codes]
    logits = torch.stack([(y * vae.evidence(c)).sum(-1) for c in each], -1)
    return torch.distributions.Categorical(logits=logits).sample()


def _simulated(vae: SCANVAE, cells: Cells, n_labelled: int) -> tuple[Values, Cells]:
    """What all cells share, and cells with data, of which the first have a label."""
    states, shared, seen = tell(vae, cells)
    cells = with_data(cells, seen)
    if n_labelled:
        label = noisy_labels(vae, states["y"], replace(cells, shared=shared))
        hidden = torch.arange(len(cells), device=label.device) >= n_labelled
        cells = replace(cells, label=torch.where(hidden, cells.label, label))
    return shared, cells


def _shared(vae: SCANVAE, cells: Cells, n: int) -> Values:
    """Draws of what all cells share, (n, ...) each."""
    return {name: v.squeeze(1) for name, v in shared_draws(vae.guide, cells, n).items()}


def _ranked(
    truth: Values, draws: Values, cells: Cells, quantities: Mapping[str, Quantity] | None
) -> dict[tuple[str, str], Tensor]:
    both = {name: torch.cat([truth[name][None], draws[name]]) for name in truth}
    found = elements_of({name: value[:, None] for name, value in both.items()}, set())
    for name, of in (quantities or {}).items():
        found["own", name] = of(both, cells)[:, None]
    return {name: _rank(value) for name, value in found.items()}


def _rank(value: Tensor) -> Tensor:
    """Of the first among the others, (1 + S, 1); no draw is the truth itself."""
    same = torch.zeros_like(value[1:], dtype=torch.bool)
    uniform = torch.rand(1, device=value.device)
    return ranks_of(value[0], value[1:], same, uniform)[0]
