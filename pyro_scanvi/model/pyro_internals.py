"""What is read of Pyro's private side, all in one place: it may change with any version of Pyro.

tests/model/test_pyro_internals.py says which of it did. Everything else of Pyro that this package
calls is documented there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.nn import PyroModule
from pyro.ops import packed
from pyro.poutine import Trace
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK, effectful
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints

from pyro_scanvi.validation import InputError

Site = dict[str, Any]  # what Pyro's type of a site leaves out is read too
Sites = dict[str, Site]
CELLS = "cells"  # the plate


class RevisedELBO(TraceEnum_ELBO):
    """TraceEnum_ELBO that can change log probabilities before they are summed, and tells all.

    One plate, and beside it one of particles where they are vectorised: K draws at once of all that
    belongs to a cell, at dimension -2, each with a weight of 1 / K. What lies outside the plate of
    cells is drawn once. A subclass overrides :meth:`known`, :meth:`revise` and :meth:`check`.
    """

    def check(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Refuse what must not be summed; asked where Pyro's validation is on."""

    def known(self, model: Sites, guide: Sites) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log probabilities that take the place of those of values, of model and guide, by site.

        Unscaled; those of the values are then not computed. It is asked before any is.
        """
        return {}, {}

    def revise(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Change log probabilities at sites, by :func:`set_log_prob`."""

    def traces(self, model: Callable, guide: Callable, *args: Any) -> tuple[Trace, Trace]:
        """Traces of model and guide with log probabilities at all sites, revised."""
        return next(self._get_traces(model, guide, args, {}))

    def bound(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """The ELBO of such traces, exact over enumerated sites; a scalar with a gradient.

        Where nothing but the guide enumerates, and all else is drawn with a gradient, it is a
        weighted sum, in a tenth of the time of Pyro's general way.
        """
        if not _is_weighted_sum(model_trace, guide_trace):
            return _compute_dice_elbo(model_trace, guide_trace)
        weight, total = enumeration_weight(guide_trace), torch.zeros(())
        for trace, sign in ((model_trace, 1), (guide_trace, -1)):
            for site in own_sites(trace).values():
                log_prob = site["log_prob"]
                if log_prob.dim() >= weight.dim() > 1:  # what has no probability may be infinite
                    log_prob = torch.where(weight > 0, log_prob, torch.zeros_like(log_prob))
                total = total + sign * (weight * log_prob if in_cells(site) else log_prob).sum()
        return total

    def _vectorized_num_particles(self, fn: Callable) -> Callable:
        """Pyro's own would draw what all cells share for each particle too."""
        n = self.num_particles

        @wraps(fn)
        def particles(*args: Any, **kwargs: Any) -> Any:
            with _Particles(n):
                return fn(*args, **kwargs)

        return particles

    def _get_trace(self, model, guide, args, kwargs) -> tuple[Trace, Trace]:
        if pyro.settings.get("validate_poutine"):
            model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
            _drop_joins(model_trace)
            self.check(model_trace, guide_trace)
            self._put_known(model_trace, guide_trace)
        else:
            model_trace, guide_trace = self._unchecked(model, guide, args, kwargs)
        self.revise(model_trace, guide_trace)
        return model_trace, guide_trace

    def _unchecked(self, model, guide, args, kwargs) -> tuple[Trace, Trace]:
        """Pyro's own, without checks, and without what is known or a weighted sum does not read."""
        guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = prune_subsample_sites(poutine.trace(replayed).get_trace(*args, **kwargs))
        _drop_joins(model_trace)
        summed = _is_weighted_sum(model_trace, guide_trace)
        if not summed:
            guide_trace.compute_score_parts()
        self._put_known(model_trace, guide_trace)
        for trace in (model_trace, guide_trace):
            trace.compute_log_prob()
        if not summed:
            guide_trace.pack_tensors()
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
        return model_trace, guide_trace

    def _put_known(self, *traces: Trace) -> None:
        here = [sites(trace) for trace in traces]
        for trace, known in zip(here, self.known(*here), strict=True):
            for name, log_prob in known.items():
                trace[name]["unscaled_log_prob"] = log_prob
                set_log_prob(trace[name], log_prob)


def _is_weighted_sum(model_trace: Trace, guide_trace: Trace) -> bool:
    """Whether each site is observed, drawn with a gradient, or enumerated in the guide."""
    guide = own_sites(guide_trace)
    drawn_well = all(
        enumeration_dim(site) is not None or site["fn"].has_rsample for site in guide.values()
    )
    return drawn_well and all(
        site["is_observed"] or enumeration_dim(site) is None or name in guide
        for name, site in own_sites(model_trace).items()
    )


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


class HeldBelow(Messenger):
    """What follows a site gets its value without a gradient; the trace around keeps it with one."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and msg["value"] is not None:
            msg["value"] = msg["value"].detach()


def sites(trace: Trace) -> dict[str, Site]:
    """The sites of a trace by name, in their order; changing one changes the trace."""
    return cast(dict[str, Site], trace.nodes)


def samples(trace: Trace) -> dict[str, Tensor]:
    """The values that were sampled, by site; of plates their subsample."""
    return {name: s["value"] for name, s in sites(trace).items() if s["type"] == "sample"}


def elements(distribution: Distribution) -> tuple[Distribution, Tensor | None]:
    """The distribution of each gene or dimension, where they are independent, and its mask.

    The mask is True where the log probability counts, with a dimension of 1 for what is not masked
    apart; None where nothing is masked. (..., N, D)
    """
    mask = None
    while isinstance(distribution, Independent | MaskedDistribution):
        if isinstance(distribution, MaskedDistribution):
            own = torch.as_tensor(distribution._mask)
            own = own.reshape(*own.shape, *(1 for _ in distribution.event_shape))
            mask = own if mask is None else mask & own
        distribution = distribution.base_dist
    return distribution, mask


def element_log_prob(distribution: Distribution, value: Tensor) -> Tensor:
    """Log probability of each gene or dimension; 0 where it is masked."""
    element, mask = elements(distribution)
    log_prob = element.log_prob(value)
    return log_prob if mask is None else torch.where(mask, log_prob, torch.zeros_like(log_prob))


def set_log_prob(site: Site, log_prob: Tensor) -> None:
    """Put another log probability at a site, unscaled, as TraceEnum_ELBO will sum it."""
    if isinstance(site["mask"], Tensor):
        log_prob = torch.where(site["mask"], log_prob, torch.zeros_like(log_prob))
    site["log_prob"] = log_prob * site["scale"]
    if "packed" in site:
        site["packed"]["log_prob"] = packed.pack(site["log_prob"], site["infer"]["_dim_to_symbol"])


def enumeration_weight(guide_trace: Trace) -> Tensor:
    """Probability of each combination of enumerated values, (..., N); 1 if there is none."""
    log_weight = torch.zeros(())
    for site in sites(guide_trace).values():
        if site["type"] == "sample" and site["infer"].get("enumerate"):
            log_weight = log_weight + site["unscaled_log_prob"]
    return log_weight.exp()


def is_plate(site: Site) -> bool:
    """Whether it is the subsample of a plate, which a trace holds as a sample."""
    return site_is_subsample(cast(Any, site))


def own_sites(trace: Trace) -> dict[str, Site]:
    """Its samples with a log probability of their own: no plates, and none that joins two sites."""
    return {
        name: site
        for name, site in sites(trace).items()
        if site["type"] == "sample" and not (is_plate(site) or site["infer"].get("_deterministic"))
    }


def in_cells(site: Site) -> bool:
    """Whether it lies in the plate of cells."""
    return CELLS in {plate.name for plate in site.get("cond_indep_stack", ())}


def enumeration_dim(site: Site) -> int | None:
    """The dimension that enumerates the site's values; None where it is drawn or observed."""
    return site["infer"].get("_enumerate_dim")


def random_parameters(module: nn.Module) -> dict[str, str]:
    """The attributes of all modules inside that are a PyroSample, and the class that has them."""
    inside = (m for m in module.modules() if isinstance(m, PyroModule))
    return {name: type(m).__name__ for m in inside for name in m._pyro_samples}


def without_shapes(message: str) -> str:
    """An error of Pyro without the table that it adds, which lists all parameters too."""
    return message.partition("Trace Shapes:")[0].rstrip()


def shapes_of(guide_trace: Trace, model_trace: Trace) -> str:
    """The shapes of all samples, distribution and value, as Pyro shows them."""
    stories = {"guide": guide_trace, "model": model_trace}
    return "\n".join(f"Sites of the {s} (batch | event):\n{_table(t)}" for s, t in stories.items())


def _table(trace: Trace) -> str:
    """Without parameters, plates and Pyro's headings."""
    shown = Trace()
    for name, site in sites(trace).items():
        if site["type"] == "sample" and not is_plate(site):
            shown.add_node(name, **site)
    rows = shown.format_shapes(title="").splitlines()
    return "\n".join(row.rstrip() for row in rows if row.strip() and "Sites:" not in row)


def announce(module: nn.Module, name: str) -> None:
    """Show Pyro a module's own parameters as `param` sites ``name.parameter``.

    SVI collects and steps what it is shown, and :func:`pyro.render_model` draws it; nothing goes
    into the global store. Under :class:`Unannounced` there is nobody to show them to.
    """
    if any(isinstance(handler, Unannounced) for handler in _PYRO_STACK):
        return
    for own, parameter in module.named_parameters():
        if parameter.requires_grad:
            shown: Any = parameter.detach()
            shown.unconstrained = lambda parameter=parameter: parameter
            show = effectful(lambda constraint, shown=shown: shown, type="param")
            show(name=f"{name}.{own}", constraint=constraints.real)


class Unannounced(Messenger):
    """Training by an optimiser of torch, which has the parameters: showing them takes its time."""


def checked_start() -> AbstractContextManager:
    """Refuse to start MCMC at a value for each value of an enumerated site.

    NUTS takes shapes from the model's first run. There a site whose prior reads an enumerated one
    has a dimension more, and would keep it: the chain would be one of another model.
    """
    starting = any(isinstance(handler, InitMessenger) for handler in _PYRO_STACK)
    return _CheckedStart() if starting else nullcontext()


class _CheckedStart(Messenger):
    """Looks at each latent site that is drawn."""

    def _pyro_post_sample(self, msg: Any) -> None:
        drawn = not (msg["is_observed"] or msg["infer"].get("enumerate") or site_is_subsample(msg))
        if drawn and msg["value"].ndim - msg["fn"].event_dim > len(_DIM_ALLOCATOR._stack):
            name = msg["name"]
            raise InputError(
                f"{name} would start with a value for each label, shape "
                f"{tuple(msg['value'].shape)}; start it at a draw of the guide: NUTS(vae.model, "
                f'init_strategy=init_to_value(values={{"{name}": ...}}))'
            )


def _drop_joins(trace: Trace) -> None:
    """Without the sites that join observed and unobserved values of one.

    Their log probability is 0, which Pyro gives in float32 even where the model is float64.
    """
    for name, site in list(sites(trace).items()):
        if site.get("infer", {}).get("_deterministic"):
            trace.remove_node(name)
