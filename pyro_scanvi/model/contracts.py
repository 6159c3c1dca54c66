"""What model, guide and factors must keep to, and which factor did not.

A factor is a method of a :class:`~pyro_scanvi.SCANVAE`, or a part that one was given. Where Pyro or
torch stop at a site, or where they would go on with what means something else, the error names the
site, the method with its class, and the shapes of all sites. What is checked here is checked where
Pyro's validation is on: in training on the first step of an epoch.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from types import FrameType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import Distribution

from pyro_scanvi.model.pyro_internals import (
    Site,
    enumeration_dim,
    own_sites,
    random_parameters,
    shapes_of,
    without_shapes,
)
from pyro_scanvi.validation import InputError

BROKEN = (ValueError, RuntimeError, IndexError)  # what torch and Pyro raise for wrong shapes
SIDES = {"p": "model", "q": "guide"}
OTHERS = {"p": ("observed", "p_shared"), "q": ("q_shared", "guide")}  # beside p_z and the like
STORY = ("model", "guide", "plate")


class ContractError(InputError):
    """A site is not what it must be.

    Attributes
    ----------
    site, side
        Its name; "p" of the model, "q" of the guide, "" where it is not known.
    has_shapes
        Whether the message shows those of all sites.
    """

    def __init__(self, message: str, site: str = "", side: str = "", has_shapes: bool = False):
        super().__init__(message)
        self.site, self.side, self.has_shapes = site, side, has_shapes


def in_plate(module: nn.Module, n_cells: int) -> AbstractContextManager:
    """What each site in the plate of cells is looked at by, before the plate expands it."""
    if not pyro.settings.get("validate_poutine"):
        return nullcontext()
    return _InPlate(random_parameters(module), n_cells)


class _InPlate(Messenger):
    """Refuses what the plate would expand to all cells, and parameters that are drawn here."""

    def __init__(self, random: dict[str, str], n_cells: int):
        super().__init__()
        self.random, self.n_cells = random, n_cells

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        owner = self.random.get(name.rpartition(".")[-1])
        if owner is not None:
            raise ContractError(
                f"{name!r} of {owner} is a PyroSample, drawn inside the plate of cells: anew for "
                f"each cell and minibatch, and nothing learns its posterior. {_shared(name)}",
                name,
            )
        if isinstance(fn, Distribution) and fn.batch_shape == (1,) and self.n_cells > 1:
            raise ContractError(
                f"site {name!r} has batch shape (1,), which the plate would expand to all "
                f"{self.n_cells} cells; give one of each cell, batch shape ({self.n_cells},), or, "
                "where it is the same for all cells, batch shape ()",
                name,
            )


def check_traces(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse latent sites without a counterpart, and log probabilities of more than the cells.

    Parameters
    ----------
    model_trace, guide_trace
        With log probabilities at all sites.

    Raises
    ------
    ContractError
        It shows the shapes of all sites.
    """
    try:
        check_counterparts(model_trace, guide_trace)
        sizes = _enumerated(guide_trace) | _enumerated(model_trace)
        for side, trace in (("q", guide_trace), ("p", model_trace)):
            for name, site in own_sites(trace).items():
                _check_dimensions(name, site, side, sizes)
    except ContractError as error:
        shown = f"{error}\n{shapes_of(guide_trace, model_trace)}"
        raise ContractError(shown, error.site, error.side, has_shapes=True) from None


def check_counterparts(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse a latent site of the model that the guide lacks, and the other way round."""
    p, q = own_sites(model_trace), own_sites(guide_trace)
    for name, site in p.items():
        if not (name in q or site["is_observed"] or enumeration_dim(site) is not None):
            raise ContractError(
                f"the model draws site {name!r}, which the guide does not: it would come from its "
                f"prior anew for each minibatch, and nothing learns its posterior. {_shared(name)}",
                name,
                "p",
            )
    for name, site in q.items():
        if not (name in p or site["infer"].get("is_auxiliary")):
            raise ContractError(
                f"the guide draws site {name!r}, which the model does not, so that it has no "
                "prior. Give the model a site of that name, in p_shared() if all cells share it",
                name,
                "q",
            )


def explained(
    error: Exception, vae: nn.Module, model: Callable, guide: Callable, cells: Any
) -> Exception:
    """The same error with the factor that it comes from and the shapes of all sites so far.

    The error itself where neither factor nor site is known, or where it is none of shapes, such as
    that of a full memory.
    """
    if not (type(error) in BROKEN or isinstance(error, InputError)):
        return error
    part = blamed(error, vae)
    if part is None:
        return error
    if isinstance(error, ContractError) and error.has_shapes:
        return InputError(f"{part}: {error}")
    guide_trace, model_trace = partial_traces(model, guide, cells)
    said = [
        f"{part}: {without_shapes(str(error))}",
        *differing_events(vae, model_trace, guide_trace),
    ]
    return InputError("\n".join([*said, shapes_of(guide_trace, model_trace)]))


def differing_events(vae: nn.Module, model_trace: Trace, guide_trace: Trace) -> Iterator[str]:
    """A sentence for each site that has one event in the model and another in the guide."""
    p, q = own_sites(model_trace), own_sites(guide_trace)
    for name in p.keys() & q.keys():
        events = [tuple(site["fn"].event_shape) for site in (p[name], q[name])]
        if events[0] != events[1]:
            yield (
                f"Site {name!r} has event shape {events[0]} from {named(vae, name, 'p')} and "
                f"{events[1]} from {named(vae, name, 'q')}: they must be the same"
            )


def blamed(error: Exception, vae: nn.Module) -> str | None:
    """The factor that an error comes from, as "p_z of class Mine"; None where none is known."""
    site, side = getattr(error, "site", ""), getattr(error, "side", "")
    for frame in _frames(error):
        method, own = frame.f_code.co_name, frame.f_locals.get("self")
        side = _side_of(frame) or side
        if own is vae and hasattr(type(vae), method) and method not in STORY:
            return f"{method} of class {_owner(vae, method).__name__}"
        site = _site_in(frame) or site
    return named(vae, site, side) if site else None


def named(vae: nn.Module, site: str, side: str = "") -> str:
    """The method that gives a site its distribution, and its class.

    Where several may be meant, those of a class of one's own.
    """
    variable = site.removesuffix("_unobserved").removesuffix("_observed")
    sides = [side] if side else list(SIDES)
    methods = [f"{s}_{variable}" for s in sides if hasattr(type(vae), f"{s}_{variable}")]
    methods = methods or [method for s in sides for method in OTHERS[s]]
    owners = {m: _owner(vae, m) for m in methods}
    root = [c for c in type(vae).__mro__ if "p_shared" in vars(c)][-1]
    own = {m: owner for m, owner in owners.items() if owner is not root} or owners
    return " or ".join(f"{m} of class {owner.__name__}" for m, owner in own.items())


def partial_traces(model: Callable, guide: Callable, cells: Any) -> tuple[Trace, Trace]:
    """Traces of guide and model as far as they go, unknown labels enumerated."""
    with pyro.validation_enabled(False), torch.no_grad():
        guide_trace = _as_far_as_it_goes(poutine.enum(guide, first_available_dim=-2), cells)
        return guide_trace, _as_far_as_it_goes(poutine.replay(model, trace=guide_trace), cells)


def _as_far_as_it_goes(story: Callable, cells: Any) -> Trace:
    with poutine.trace() as tracer, suppress(Exception):
        story(cells)
    return tracer.trace


def _shared(name: str) -> str:
    own = name.rpartition(".")[-1]
    return (
        "What is random and the same for all cells stands in p_shared() and q_shared(), and "
        f"factors read its draw as cells.shared[{own!r}]"
    )


def _enumerated(trace: Trace) -> dict[int, int]:
    """Number of values on each dimension that enumerates a site."""
    found = {}
    for site in own_sites(trace).values():
        dim = enumeration_dim(site)
        if dim is not None:
            found[dim] = site["value"].shape[dim - site["fn"].event_dim]
    return found


def _check_dimensions(name: str, site: Site, side: str, enumerated: dict[int, int]) -> None:
    """Refuse a log probability with entries for anything but plates and enumerated values."""
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    known, shape = enumerated | plates, site["unscaled_log_prob"].shape
    for dim in range(-len(shape), 0):
        if shape[dim] not in (1, known.get(dim, 1)):
            wanted = " or ".join(f"{n} on dimension {d}" for d, n in sorted(known.items()))
            raise ContractError(
                f"the log probability of site {name!r} of the {SIDES[side]} has shape "
                f"{tuple(shape)}, expected {wanted}: its distribution (batch "
                f"{tuple(site['fn'].batch_shape)}, event {tuple(site['fn'].event_shape)}) and its "
                f"value {tuple(site['value'].shape)} are broadcast against one another. A factor "
                "has batch shape (..., cells), and features are its event: to_event(1)",
                name,
                side,
            )


def _frames(error: BaseException) -> Iterator[FrameType]:
    """From the call to the place of the error, that of its first cause."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    for e in [first] if first is error else [error, first]:
        yield from (frame for frame, _ in traceback.walk_tb(e.__traceback__))


def _side_of(frame: FrameType) -> str:
    return {name: side for side, name in SIDES.items()}.get(frame.f_code.co_name, "")


def _site_in(frame: FrameType) -> str:
    """The site that a function of Pyro works on."""
    if not frame.f_globals.get("__name__", "").startswith("pyro."):
        return ""
    name, site = frame.f_locals.get("name"), frame.f_locals.get("site")
    return name if isinstance(name, str) else site.get("name", "") if site else ""


def _owner(vae: nn.Module, method: str) -> type:
    """The class whose method it is."""
    return next(c for c in type(vae).__mro__ if method in vars(c))
