r"""A posterior for calibration: a Markov chain through the truth, exact and of more power.

Where the guide is a poor proposal, as with many latent dimensions, a pool by weights is the truth
and nothing else. A chain that leaves the posterior invariant, started at the truth, is stationary
if model and simulation agree; run from there for J steps, and again for S - J steps, with J uniform
on 0, ..., S, the truth stands at a random place of a reversible chain of S + 1 states, so that its
rank is uniform, however slowly the chain moves (Besag & Clifford 1989, Biometrika 76:633).

A step draws each discrete state from its conditional (Gibbs), moves all continuous ones by
Hamiltonian Monte Carlo (Neal 2011, arXiv 1206.1901), and draws the discrete ones again in reverse
order, which is reversible. Step sizes and scales are tuned on another chain, which starts at a
draw of the guide and knows nothing of the truth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_scanvi.criticism.calibration import Drawn
from pyro_scanvi.criticism.story import Story, Values, states_of
from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.validation import check_at_least, check_positive

WANTED = 0.8  # acceptance that step sizes are tuned to
JITTER = 0.2  # of step sizes, so that no orbit closes
N_FOR_SCALE = 50  # draws of the guide, for the first scale of each coordinate
SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class FromChain:
    """Draws of a reversible chain through the truth.

    Parameters
    ----------
    n_leapfrog
        Gradients of a step.
    n_tuning
        Steps of the other chain, on which step sizes are tuned.
    thin
        Steps between two draws; the more, the more a test sees.
    """

    n_leapfrog: int = 8
    n_tuning: int = 60
    thin: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, n_leapfrog=self.n_leapfrog, thin=self.thin)
        check_at_least(2, n_tuning=self.n_tuning)

    def __call__(self, story: Story, cells: Cells, n_draws: int, truth: Values) -> Drawn:
        """Exact where the model's density is that which simulates."""
        kernel = tuned(story, cells, self.n_leapfrog, self.n_tuning)
        start = kernel.state({name: value[None] for name, value in truth.items()})
        restart = torch.randint(n_draws + 1, (len(cells),), device=cells.x.device)  # J
        state, drawn, energies = start, [], []
        for i in range(n_draws):
            state = _where(restart == i, start, state)
            for _ in range(self.thin):
                state, _ = kernel.step(state)
            drawn.append(kernel.values(state, start, truth))
            energies.append(kernel.log_density(state)[0])
        values = {name: torch.cat([d[name] for d in drawn]) for name in truth}
        return Drawn(values, _effective(torch.stack(energies)))


@dataclass(frozen=True)
class State:
    """Continuous states without constraints, and discrete ones, (1, N, ...) each."""

    free: Values
    discrete: Values


@dataclass(frozen=True)
class Kernel:
    """A reversible step.

    Attributes
    ----------
    transforms
        From the real line to the support of each continuous state.
    supports
        All values of each discrete state, (L, ...).
    scale
        Of each free coordinate, (N, ...).
    step_size
        In units of `scale`, (N,).
    """

    story: Story
    cells: Cells
    transforms: Mapping[str, Any]
    supports: Values
    scale: Values
    step_size: Tensor
    n_leapfrog: int

    def state(self, values: Values) -> State:
        """Of values (1, N, ...) by name."""
        free = {name: t.inv(values[name]) for name, t in self.transforms.items()}
        return State(free, {name: values[name] for name in self.supports})

    def values(self, state: State, start: State, truth: Values) -> Values:
        """By name, (1, N, ...); the truth to the bit where the chain has not moved."""
        there = _same(state.free, start.free) & _same(state.discrete, start.discrete)  # 1, N
        found = self._constrained(state)
        return {
            name: torch.where(_like(there, value), truth[name][None], value)
            for name, value in found.items()
        }

    def log_density(self, state: State) -> Tensor:
        """log p(data, states) over free coordinates, (n, N)."""
        found = self.story.log_densities(self.cells, self._constrained(state))[1]
        for name, transform in self.transforms.items():
            free = state.free[name]
            volume = transform.log_abs_det_jacobian(free, transform(free))
            found = found + volume.reshape(*free.shape[:2], -1).sum(-1)
        return found

    def step(self, state: State) -> tuple[State, Tensor]:
        """The next state, and the probability with which Hamilton's move was accepted, (N,)."""
        for name in self.supports:
            state = self._gibbs(state, name)
        state, accepted = self._hamilton(state)
        for name in reversed(self.supports):
            state = self._gibbs(state, name)
        return state, accepted

    def _constrained(self, state: State) -> Values:
        return {n: t(state.free[n]) for n, t in self.transforms.items()} | state.discrete

    def _gibbs(self, state: State, name: str) -> State:
        """A discrete state drawn given all others."""
        support, n_cells = self.supports[name], len(self.cells)
        n = len(support)
        each = support.unsqueeze(1).expand(n, n_cells, *support.shape[1:])
        free = {m: v.expand(n, *v.shape[1:]) for m, v in state.free.items()}
        others = {m: v.expand(n, *v.shape[1:]) for m, v in state.discrete.items()}
        log_p = self.log_density(State(free, others | {name: each}))  # n, N
        chosen = torch.distributions.Categorical(logits=log_p.T).sample()
        drawn = support[chosen].unsqueeze(0)
        return replace(state, discrete=state.discrete | {name: drawn})

    def _hamilton(self, state: State) -> tuple[State, Tensor]:
        """All continuous states moved along an orbit, and accepted or not."""
        if not self.transforms:
            return state, torch.ones_like(self.step_size)
        momentum = {name: torch.randn_like(v) for name, v in state.free.items()}
        eps = self.step_size * (1 + JITTER * (2 * torch.rand((), device=self.step_size.device) - 1))
        log_p, gradient = self._gradient(state)
        first = log_p - _kinetic(momentum)
        moved = state
        for _ in range(self.n_leapfrog):
            momentum = _plus(momentum, gradient, eps / 2)
            ahead = {n: momentum[n] * self.scale[n] for n in momentum}
            moved = replace(moved, free=_plus(moved.free, ahead, eps))
            log_p, gradient = self._gradient(moved)
            momentum = _plus(momentum, gradient, eps / 2)
        ratio = (log_p - _kinetic(momentum) - first)[0].nan_to_num(nan=-torch.inf)
        accepted = ratio.clamp(max=0).exp()
        return _where(torch.rand_like(accepted) < accepted, moved, state), accepted

    def _gradient(self, state: State) -> tuple[Tensor, Values]:
        """Log density (1, N), and its gradient in units of the scale."""
        free = {name: v.detach().requires_grad_() for name, v in state.free.items()}
        with torch.enable_grad():
            log_p = self.log_density(replace(state, free=free))
            gradients = torch.autograd.grad(log_p.sum(), list(free.values()))
        named = zip(free, gradients, strict=True)
        return log_p.detach(), {name: g * self.scale[name] for name, g in named}


def tuned(story: Story, cells: Cells, n_leapfrog: int, n_steps: int, step: float = 0.2) -> Kernel:
    """A kernel whose scales and step sizes come from a chain that starts at the guide."""
    check_positive(step=step)
    transforms, supports = _parts(story, cells)
    drawn = story.draws(cells, N_FOR_SCALE)
    size = cells.x.new_full((len(cells),), step)
    kernel = Kernel(story, cells, transforms, supports, {}, size, n_leapfrog)
    free = kernel.state(drawn).free
    kernel = replace(kernel, scale=_scales(free))
    state = kernel.state({name: value[:1] for name, value in drawn.items()})
    for half in range(2):
        visited = []
        for i in range(n_steps // 2):
            state, accepted = kernel.step(state)
            pace = 1 / (1 + i) ** 0.5
            change = ((accepted - WANTED) * pace).exp().to(size.dtype)
            kernel = replace(kernel, step_size=kernel.step_size * change)
            visited.append(state.free)
        if half == 0 and transforms:
            late = visited[len(visited) // 2 :]
            whole = {name: torch.cat([v[name] for v in late]) for name in transforms}
            kernel = replace(kernel, scale=_blended(kernel.scale, _scales(whole)))
    return kernel


def _parts(story: Story, cells: Cells) -> tuple[dict[str, Any], Values]:
    """Transforms of continuous states, and values of discrete ones."""
    sites = states_of(story.traces(cells, 1)[0])
    transforms, supports = {}, {}
    for name, site in sites.items():
        fn = site["fn"]
        if fn.has_enumerate_support:
            values = fn.enumerate_support(expand=False)
            supports[name] = values.reshape(len(values), *fn.event_shape)
        else:
            transforms[name] = biject_to(fn.support)
    return transforms, supports


def _scales(free: Values) -> Values:
    """Standard deviation over draws, (N, ...)."""
    if any(len(value) < 2 for value in free.values()):
        return {name: torch.ones_like(value[0]) for name, value in free.items()}
    return {name: value.std(0).clamp(min=SMALLEST_SCALE) for name, value in free.items()}


def _blended(old: Values, new: Values) -> Values:
    """The geometric mean of two scales: a short chain knows neither alone."""
    return {name: (old[name] * new[name]).sqrt() for name in old}


def _effective(log_p: Tensor) -> Tensor:
    """Effective number of draws by the autocorrelation of lag 1 of log densities (S, N), (N,)."""
    n = len(log_p)
    if n < 3:
        return torch.ones_like(log_p[0])
    centred = log_p - log_p.mean(0)
    variance = centred.square().mean(0)
    lag = (centred[1:] * centred[:-1]).mean(0) / variance.clamp(min=1e-12)
    lag = torch.where(variance > 1e-12, lag, 1.0).clamp(0, 1)
    return (n * (1 - lag) / (1 + lag)).clamp(min=1)


def _plus(values: Values, change: Values, by: Tensor) -> Values:
    """Values (1, N, ...) and a change of them, times a number of each cell."""
    return {name: v + _like(by[None], v) * change[name] for name, v in values.items()}


def _kinetic(momentum: Values) -> Tensor:
    """(1, N)."""
    flat = [p.reshape(*p.shape[:2], -1).double().square().sum(-1) / 2 for p in momentum.values()]
    return torch.stack(flat).sum(0)


def _where(chosen: Tensor, one: State, other: State) -> State:
    """One state where chosen, (N,), the other elsewhere."""

    def pick(a: Values, b: Values) -> Values:
        return {name: torch.where(_like(chosen[None], a[name]), a[name], b[name]) for name in a}

    return State(pick(one.free, other.free), pick(one.discrete, other.discrete))


def _same(one: Values, other: Values) -> Tensor:
    """Whether all are equal, (1, N)."""
    equal = [(one[n] == other[n]).reshape(*one[n].shape[:2], -1).all(-1) for n in one]
    return torch.stack(equal).all(0) if equal else torch.ones(1, 1, dtype=torch.bool)


def _like(of_cells: Tensor, value: Tensor) -> Tensor:
    """(n, N), with dimensions of 1 for those of an event."""
    return of_cells.reshape(*of_cells.shape, *[1] * (value.ndim - 2))
