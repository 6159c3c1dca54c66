"""What is read of Pyro's private side, all in one place: it may change with any version of Pyro.

tests/model/test_pyro_internals.py says which of it did. Everything else of Pyro that this package
calls is documented there.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from pyro.distributions import Distribution
from pyro.infer import TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.ops import packed
from pyro.poutine import Trace
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints

Site = dict[str, Any]  # what Pyro's type of a site leaves out is read too
CELLS = "cells"  # the plate


class RevisedELBO(TraceEnum_ELBO):
    """TraceEnum_ELBO that can change log probabilities before they are summed, and tells all.

    One plate, and beside it one of particles where they are vectorised: K draws at once of all that
    belongs to a cell, at dimension -2, each with a weight of 1 / K. What lies outside the plate of
    cells is drawn once. A subclass overrides :meth:`revise`.
    """

    def revise(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Change log probabilities at sites, by :func:`set_log_prob`."""

    def traces(self, model: Callable, guide: Callable, *args: Any) -> tuple[Trace, Trace]:
        """Traces of model and guide with log probabilities at all sites, revised."""
        return next(self._get_traces(model, guide, args, {}))

    def bound(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """The ELBO of such traces, exact over enumerated sites; a scalar with a gradient."""
        return _compute_dice_elbo(model_trace, guide_trace)

    def _vectorized_num_particles(self, fn: Callable) -> Callable:
        """Pyro's own would draw what all cells share for each particle too."""
        n = self.num_particles

        @wraps(fn)
        def particles(*args: Any, **kwargs: Any) -> Any:
            with _Particles(n):
                return fn(*args, **kwargs)

        return particles

    def _get_trace(self, model, guide, args, kwargs) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        _drop_joins(model_trace)
        self.revise(model_trace, guide_trace)
        return model_trace, guide_trace


class _Particles(Messenger):
    """Sites in the plate of cells are drawn K times, along dimension -2, and weigh 1 / K."""

    def __init__(self, n: int):
        super().__init__()
        self.frame = CondIndepStackFrame("particles", -2, n, 0, n)

    def _pyro_sample(self, msg: Any) -> None:
        plates = [plate.name for plate in msg["cond_indep_stack"]]
        if CELLS in plates and isinstance(msg["fn"], Distribution):
            msg["cond_indep_stack"] = (self.frame, *msg["cond_indep_stack"])
            msg["scale"] = msg["scale"] / self.frame.size
            BroadcastMessenger._pyro_sample(msg)


def sites(trace: Trace) -> dict[str, Site]:
    """The sites of a trace by name, in their order; changing one changes the trace."""
    return cast(dict[str, Site], trace.nodes)


def samples(trace: Trace) -> dict[str, Tensor]:
    """The values that were sampled, by site; of plates their subsample."""
    return {name: s["value"] for name, s in sites(trace).items() if s["type"] == "sample"}


def set_log_prob(site: Site, log_prob: Tensor) -> None:
    """Put another log probability at a site, unscaled, as TraceEnum_ELBO will sum it."""
    if isinstance(site["mask"], Tensor):
        log_prob = torch.where(site["mask"], log_prob, torch.zeros_like(log_prob))
    site["packed"]["log_prob"] = packed.pack(
        log_prob * site["scale"], site["infer"]["_dim_to_symbol"]
    )


def announce(module: nn.Module, name: str) -> None:
    """Show Pyro a module's own parameters as `param` sites ``name.parameter``.

    SVI collects and steps what it is shown, and :func:`pyro.render_model` draws it; nothing goes
    into the global store.
    """
    for own, parameter in module.named_parameters():
        if parameter.requires_grad:
            shown: Any = parameter.detach()
            shown.unconstrained = lambda parameter=parameter: parameter
            show = effectful(lambda constraint, shown=shown: shown, type="param")
            show(name=f"{name}.{own}", constraint=constraints.real)


def _drop_joins(trace: Trace) -> None:
    """Without the sites that join observed and unobserved values of one.

    Their log probability is 0, which Pyro gives in float32 even where the model is float64.
    """
    for name, site in list(sites(trace).items()):
        if site.get("infer", {}).get("_deterministic"):
            trace.remove_node(name)
