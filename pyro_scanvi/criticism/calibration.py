r"""Simulation-based calibration: is what infers a cell's state right about cells of the model?

Truth and data are drawn from the model, draws of the posterior given those data are compared with
the truth, and the rank of the truth among S draws is uniform if the draws are from the posterior
(Talts et al. 2018, arXiv 1804.06788). What is not a state is held fixed: the weights of all
networks, and one draw of what all cells share, for simulation and inference alike. So this asks of
the inference of a cell given a model, not of training; see
:mod:`pyro_scanvi.criticism.fitted` for the latter.

Ranks of states alone do not see a posterior that is the prior. Those of the log likelihood and of
the log joint density do, as they depend on data (Modrák et al. 2023, arXiv 2211.02383).

Three posteriors come with it. :func:`from_guide` asks whether q is calibrated; a mean-field or
amortised q may rightly fail. :class:`FromWeights` corrects q by the density of the model, and asks
whether that density is the one that simulates. It is exact for any number M of proposals: M - 1
draws of q and the truth h_0 are a pool, and given the pool the truth is one of it with
probability proportional to

.. math:: w_m = p(x, h_m) / q(h_m \mid x),

as are further indices that are drawn with these weights. So truth and draws are exchangeable, and
ranks are uniform where model and simulation agree, however bad q is (Besag & Clifford 1989,
Biometrika 76:633, on exact tests; the pool is one step of iterated sampling-importance-resampling,
Tjelmeland 2004, Andrieu et al. 2018, Bernoulli 24:842). A bad q costs power, which `effective`
tells. :class:`~pyro_scanvi.criticism.chain.FromChain` is as exact, and has power then too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from rich.progress import track
from torch import Tensor
from torch.distributions import Categorical, constraints

from pyro_scanvi.criticism.ranks import Calibration, ranks_of, tidy
from pyro_scanvi.criticism.story import Story, Values, numbers, rows, states_of
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.draws import at_once, evaluating, parts, seeded
from pyro_scanvi.posterior.importance import PASS_ELEMENTS
from pyro_scanvi.validation import InputError, check_at_least, plain_arguments

Quantity = Callable[[Values, Cells], Tensor]


@dataclass(frozen=True)
class Drawn:
    """What a posterior answers.

    Attributes
    ----------
    values
        Draws of each state, (S, N, ...).
    effective
        Effective number of proposals, or of draws, of each cell, (N,); None where draws are
        independent.
    """

    values: Values
    effective: Tensor | None = None


class Posterior(Protocol):
    """Draws S states of each cell given what is seen of it.

    `truth` has what the cells were simulated from, (N, ...) each. It may be used to make a test
    exact, as :class:`FromWeights` does; a posterior that is to be tested for what it is worth on
    data does not read it.
    """

    def __call__(self, story: Story, cells: Cells, n_draws: int, truth: Values) -> Drawn: ...


def from_guide(story: Story, cells: Cells, n_draws: int, truth: Values) -> Drawn:
    """Draws of the guide q; of states that it does not draw, of the model's prior."""
    return Drawn(story.draws(cells, n_draws))


@dataclass(frozen=True)
class FromWeights:
    """Draws of a pool of the truth and M - 1 draws of the guide, by their weights.

    Parameters
    ----------
    n_proposals
        Size M of the pool of each cell; the more, the more a test sees.
    """

    n_proposals: int = 200

    def __call__(self, story: Story, cells: Cells, n_draws: int, truth: Values) -> Drawn:
        """Exact where the model's density is that which simulates; see the module."""
        most = at_once(numbers(story.vae, self.n_proposals), PASS_ELEMENTS)
        found = [
            self._of(story, rows(cells, at), n_draws, {name: v[at] for name, v in truth.items()})
            for at in _slices(len(cells), most)
        ]
        values = {name: torch.cat([f.values[name] for f in found], 1) for name in truth}
        return Drawn(values, torch.cat([f.effective for f in found if f.effective is not None]))

    def _of(self, story: Story, cells: Cells, n_draws: int, truth: Values) -> Drawn:
        pool = story.draws(cells, self.n_proposals)
        pool = {name: _with_first(value, truth[name]) for name, value in pool.items()}
        log_weight = story.log_weights(cells, pool)
        if not (log_weight.amax(0) > -torch.inf).all():
            raise InputError(
                "the model gives neither the truth nor a draw of the guide a density above 0, for "
                "a cell that it simulated; look at the support of its likelihood"
            )
        weight = log_weight.softmax(0)  # M, N
        chosen = Categorical(weight.T).sample(torch.Size([n_draws]))  # S, N
        drawn = {name: _chosen(value, chosen) for name, value in pool.items()}
        return Drawn(drawn, 1 / weight.square().sum(0))


@plain_arguments
def simulation_based_calibration(
    model: Any,
    n_simulations: int = 500,
    n_draws: int = 99,
    posterior: Posterior = from_guide,
    batch: int = 0,
    library: float | Tensor | None = None,
    simulator: Any = None,
    quantities: Mapping[str, Quantity] | None = None,
    seed: int | None = None,
    progress_bar: bool = True,
) -> Calibration:
    """Ranks of true states of simulated cells among draws of their posterior.

    Parameters
    ----------
    model
        A :class:`~pyro_scanvi.SCANVAE` or a subclass, or a :class:`~pyro_scanvi.SCANVI`, whose
        module is meant. Labels are latent.
    n_simulations
        Number of cells, each a simulation: given weights and what all share, they are independent.
    n_draws
        Draws S for each of them; ranks are 0 to S.
    posterior
        :func:`from_guide`, ``FromWeights(...)``, ``FromChain()``, or one of one's own; see
        :class:`Posterior`.
    batch
        Code of the cells' batch; other covariates are 0.
    library
        Size of each cell in counts, a number or (N, 1), simulated from and read by the model; None
        draws it where it is latent.
    simulator
        What simulates, where that is another model with the same states, as to see whether a
        mistake would be found; None is `model`.
    quantities
        More to be ranked, by name: from states (S, N, ...) by site, and the cells, to (S, N).
    seed
        Of the draws; None draws on from torch's generator.
    progress_bar
        Whether to show one.

    Returns
    -------
    Calibration
        Ranks of each element of each state (of a one-hot label: whether it is that class; and its
        code), of the log likelihood of the cell's data and of the log joint density.

    Raises
    ------
    InputError
        For sizes below 1, no `library` where the model reads it, or a site that cannot be told or
        weighed; it is named.
    """
    check_at_least(1, n_simulations=n_simulations, n_draws=n_draws)
    vae = module_of(model)
    teller = vae if simulator is None else module_of(simulator)
    with seeded(seed), evaluating(vae), evaluating(teller):
        cells = vae.unseen(n_simulations, batch, library)
        story = Story.drawn(vae, cells)
        truth, cells = Story(teller, story.shared).told(cells)
        ask = _Asked(story, posterior, n_draws, dict(quantities or {}))
        size = at_once(numbers(vae, 1 + n_draws), PASS_ELEMENTS)
        sizes = track(_slices(n_simulations, size), "calibrating", disable=not progress_bar)
        found = [ask(rows(cells, at), {n: v[at] for n, v in truth.items()}) for at in sizes]
    return _joined(found, n_draws)


@dataclass(frozen=True)
class _Asked:
    """Ranks of some cells."""

    story: Story
    posterior: Posterior
    n_draws: int
    quantities: Mapping[str, Quantity]

    def __call__(
        self, cells: Cells, truth: Values
    ) -> tuple[dict[tuple[str, str], Tensor], Tensor | None]:
        drawn = self.posterior(self.story, cells, self.n_draws, truth)
        _check_drawn(drawn.values, truth, self.n_draws)
        both = {n: torch.cat([truth[n][None], drawn.values[n]]) for n in truth}
        same = torch.stack([_equal(value) for value in both.values()]).all(0)  # S, N
        ranks = {}
        for name, value in self._quantities(cells, both).items():
            uniform = torch.rand(value.shape[1:], device=value.device)
            ranks[name] = ranks_of(value[0], value[1:], same, uniform).cpu()
        return ranks, drawn.effective

    def _quantities(self, cells: Cells, states: Values) -> dict[tuple[str, str], Tensor]:
        """What is ranked, truth first, (1 + S, N) each."""
        found = elements_of(states, self._one_hot(cells))
        data, joint = self.story.log_densities(cells, states)
        found |= {("data", "log likelihood"): data, ("joint", "log density"): joint}
        own = {("own", name): of(states, cells) for name, of in self.quantities.items()}
        return found | own

    def _one_hot(self, cells: Cells) -> set[str]:
        p, _ = self.story.traces(cells, 1)
        return {n for n, s in states_of(p).items() if s["fn"].support is constraints.one_hot}


def module_of(model: Any) -> SCANVAE:
    """A module itself, or that of an estimator."""
    return getattr(model, "module", model)


def elements_of(values: Values, one_hot: set[str]) -> dict[tuple[str, str], Tensor]:
    """Each element of each site, by site and name; of one-hot ones the code too."""
    found = {}
    for name, value in values.items():
        flat = value.reshape(*value.shape[:2], -1)
        single = flat.shape[-1] == 1
        for i in range(flat.shape[-1]):
            found[name, name if single else f"{name}[{i}]"] = flat[..., i]
        if name in one_hot:
            found[name, "code"] = flat.argmax(-1)
    return found


def _slices(n: int, most: int) -> list[slice]:
    starts = np.cumsum([0, *parts(n, most)])
    return [slice(int(a), int(b)) for a, b in zip(starts, starts[1:], strict=False)]


def _check_drawn(values: Values, truth: Values, n_draws: int) -> None:
    for name, value in truth.items():
        wanted = (n_draws, *value.shape)
        found = tuple(values[name].shape) if name in values else None
        if found != wanted:
            raise InputError(
                f"the posterior gives draws of shape {found} of the state {name!r}, expected "
                f"{wanted}: (draws, cells, ...)"
            )


def _equal(value: Tensor) -> Tensor:
    """Whether each draw is the first, (S, N)."""
    return (value[1:] == value[:1]).reshape(len(value) - 1, value.shape[1], -1).all(-1)


def _with_first(pool: Tensor, truth: Tensor) -> Tensor:
    """The truth in place of the first of the pool."""
    return torch.cat([truth[None], pool[1:]])


def _chosen(pool: Tensor, chosen: Tensor) -> Tensor:
    """Those of a pool (M, N, ...) that were chosen, (S, N, ...)."""
    return pool[chosen, torch.arange(pool.shape[1], device=pool.device)]


def _joined(
    found: list[tuple[dict[tuple[str, str], Tensor], Tensor | None]], n_draws: int
) -> Calibration:
    names = found[0][0]
    ranks = {name: torch.cat([r[name] for r, _ in found]).numpy() for name in names}
    effective = [e for _, e in found if e is not None]
    series = pd.Series(torch.cat(effective).cpu().numpy(), name="effective") if effective else None
    return Calibration(tidy(ranks), n_draws, series)
