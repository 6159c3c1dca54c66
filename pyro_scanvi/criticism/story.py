"""A model's story, told and weighed, with what all cells share held at one value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_scanvi.data.minibatches import Cells, Named
from pyro_scanvi.model.pyro_internals import Site, in_cells, own_sites
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.posterior.traces import TraceWeights, log_weights, site_log_prob
from pyro_scanvi.validation import InputError

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Story:
    """Model and guide, given what all cells share.

    Attributes
    ----------
    vae
        In eval mode.
    shared
        A value of each site outside the plate of cells.
    """

    vae: SCANVAE
    shared: Values = field(default_factory=dict)

    @classmethod
    def drawn(cls, vae: SCANVAE, cells: Cells) -> "Story":
        """With a draw of what all share, from its posterior q.

        Raises
        ------
        InputError
            For a site that cannot be weighed; it is named.
        """
        TraceWeights(vae, by_label=False).check_sites(cells)
        guide = poutine.trace(vae.guide).get_trace(cells)
        drawn = {n: s["value"] for n, s in own_sites(guide).items() if not in_cells(s)}
        return cls(vae, drawn)

    def told(self, cells: Cells) -> tuple[Values, Cells]:
        """Draws of the states of cells, (N, ...) each, and the cells with what is seen of them.

        Parameters
        ----------
        cells
            Where they come from (batch, covariates, library); what else they hold is not read.

        Raises
        ------
        InputError
            If the model observes anything but ``cells.x`` and ``cells.extra[name of the site]``.
        """
        states, _, seen = tell(self.vae, cells, self.shared)
        told = with_data(cells, seen)
        self._check_seen(told, states, seen)
        return states, told

    def traces(self, cells: Cells, n: int, values: Values | None = None) -> tuple[Trace, Trace]:
        """Of the model replayed, and of the guide, at n draws of it or at given values, (n, N)."""
        nodes = _nodes(values or {})
        guide = poutine.replay(poutine.condition(self.vae.guide, data=self.shared), trace=nodes)
        with pyro.validation_enabled(False), pyro.plate("draws", n, dim=-2):
            q = poutine.trace(guide).get_trace(cells)
            model = poutine.condition(self.vae.model, data=self.shared)
            model = poutine.replay(poutine.replay(model, trace=nodes), trace=_latent_trace(q))
            return poutine.trace(model).get_trace(cells), q

    def draws(self, cells: Cells, n: int) -> Values:
        """Of the guide, (n, N, ...) for each state; what it does not draw comes from the prior."""
        p, _ = self.traces(cells, n)
        return {name: _expanded(site, n, len(cells)) for name, site in states_of(p).items()}

    def log_weights(self, cells: Cells, values: Values) -> Tensor:
        """log p(states, data) - log q(states), (n, N); what q does not draw is not weighed."""
        n = len(next(iter(values.values())))
        return log_weights(*self.traces(cells, n, values)).expand(n, len(cells))

    def log_densities(self, cells: Cells, values: Values) -> tuple[Tensor, Tensor]:
        """log p(data | states) and log p(data, states), (n, N) in nats, float64."""
        n = len(next(iter(values.values())))
        found = {m: s for m, s in own_sites(self.model_at(cells, values)).items() if in_cells(s)}
        log_p = {name: site_log_prob(site).expand(n, len(cells)) for name, site in found.items()}
        seen = [log_p[name] for name, site in found.items() if site["is_observed"]]
        return torch.stack(seen).sum(0), torch.stack(list(log_p.values())).sum(0)

    def model_at(self, cells: Cells, values: Values) -> Trace:
        """The model's trace at a value of every state, (n, N, ...) each."""
        model = poutine.condition(self.vae.model, data=self.shared)
        model = poutine.replay(model, trace=_nodes(values))
        n = len(next(iter(values.values())))
        with pyro.validation_enabled(False), pyro.plate("draws", n, dim=-2):
            return poutine.trace(model).get_trace(cells)

    def _check_seen(self, cells: Cells, states: Values, seen: Values) -> None:
        """That what the model observes of the cells is what was put into them."""
        model = poutine.condition(self.vae.model, data=self.shared | states)
        sites = own_sites(poutine.trace(model).get_trace(cells))
        for name, value in seen.items():
            found = sites[name]["value"]
            if found.shape != value.shape or not torch.equal(found, value):
                raise InputError(
                    f"{type(self.vae).__name__}: the observed site {name!r} is neither cells.x nor "
                    f"cells.extra[{name!r}], so that what is simulated cannot be shown to the "
                    "guide; give the site the name of its data"
                )


def tell(
    vae: SCANVAE, cells: Cells, shared: Mapping[str, Tensor] | None = None
) -> tuple[Values, Values, Values]:
    """The model's draws without data: of states, of what all share, and of what is seen.

    What all share comes from its prior where it is not given.
    """
    model = poutine.condition(poutine.uncondition(vae.model), data=dict(shared or {}))
    sites = own_sites(poutine.trace(model).get_trace(cells))
    told = {n: s for n, s in sites.items() if s["value"].numel()}  # no factors
    seen = {n: s["value"] for n, s in told.items() if s["infer"].get("was_observed")}
    states = {n: s["value"] for n, s in told.items() if in_cells(s) and n not in seen}
    return states, {n: s["value"] for n, s in told.items() if not in_cells(s)}, seen


def with_data(cells: Cells, seen: Values) -> Cells:
    """The cells with counts and extra data by the names of sites; nothing known of labels."""
    extra = {**cells.extra, **{name: value for name, value in seen.items() if name != "x"}}
    filled = replace(cells, x=seen.get("x", cells.x), extra=Named(extra))
    return filled.hide_labels()


def shared_draws(story: Callable, cells: Cells, n: int) -> Values:
    """Draws of what all cells share by model or guide, (n, 1, ...) each."""
    with pyro.validation_enabled(False), pyro.plate("draws", n, dim=-2):
        trace = poutine.trace(story).get_trace(rows(cells, slice(0, 1)))
    found = {name: site for name, site in own_sites(trace).items() if not in_cells(site)}
    events = {name: site["fn"].event_shape for name, site in found.items()}
    return {name: site["value"].reshape(n, 1, *events[name]) for name, site in found.items()}


def numbers(vae: SCANVAE, n: int) -> int:
    """In the largest tensor of so many draws of one cell, or of one draw of so many cells."""
    return n * max(vae.n_input, vae.n_hidden)


def rows(cells: Cells, at: slice) -> Cells:
    """Some of the cells."""
    n = len(cells)
    tensors = {
        name: value[at]
        for name, value in vars(cells).items()
        if isinstance(value, Tensor) and value.ndim and len(value) == n
    }
    return Cells(**(vars(cells) | tensors | {"extra": cells.extra.each(lambda v: v[at])}))


def states_of(trace: Trace) -> dict[str, Site]:
    """The latent sites of cells."""
    return {n: s for n, s in own_sites(trace).items() if in_cells(s) and not s["is_observed"]}


def _nodes(values: Mapping[str, Tensor]) -> Trace:
    """Values to be replayed."""
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return trace


def _latent_trace(guide: Trace) -> Trace:
    """What the guide drew; what it was given is conditioned on in the model too."""
    return _nodes({name: site["value"] for name, site in states_of(guide).items()})


def _expanded(site: Site, n: int, n_cells: int) -> Tensor:
    """A value for each draw and cell."""
    event = site["value"].shape[site["value"].ndim - site["fn"].event_dim :]
    return site["value"].expand(n, n_cells, *event)
