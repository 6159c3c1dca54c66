"""What to say when a loss or a gradient is not finite: where, in which cells and genes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.model.contracts import BROKEN
from pyro_scanvi.model.likelihoods import elementwise
from pyro_scanvi.model.pyro_internals import element_log_prob
from pyro_scanvi.names import first


@dataclass
class Fault:
    """What is not finite at a site, and the cells and genes (or latent dimensions) that it hits.

    Attributes
    ----------
    site
        Of the model or the guide; empty if none was found.
    what
        "log probability", or the distribution's parameter, or the gradient of one of the two.
    cells, columns
        Positions along the cells and the event of the site.
    """

    site: str = ""
    what: str = "log probability"
    cells: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))
    columns: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not finite; the last weights for which both were are kept.

    Attributes
    ----------
    quantity
        "loss" or "gradient".
    epoch
        Counted from 0.
    fault
        Where; its cells are positions in the data.
    parameters
        Names of the parameters whose gradient is not finite.
    held_out
        Whether it was found in a minibatch of held-out cells.
    """

    def __init__(
        self,
        quantity: str,
        epoch: int,
        fault: Fault,
        parameters: Sequence[str] = (),
        held_out: bool = False,
    ):
        super().__init__(quantity, epoch, fault, parameters, held_out)
        self.quantity, self.epoch, self.fault = quantity, epoch, fault
        self.parameters, self.held_out = tuple(parameters), held_out
        self.cell_names: np.ndarray | None = None
        self.column_names: Mapping[str, np.ndarray] = {}

    def name(self, cells: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Give the cells their names, and the columns of sites, such as the genes of "x"."""
        self.cell_names, self.column_names = cells, columns

    def __str__(self) -> str:
        fault = self.fault
        said = [f"the {self.quantity} is not finite in epoch {self.epoch + 1}"]
        if fault.site:
            said.append(f"first at site {fault.site!r}, {fault.what}")
        said.append(_counted("cells", _named(fault.cells, self.cell_names)))
        names = self.column_names.get(fault.site)
        if names is not None and fault.columns.max(initial=-1) >= len(names):
            names = None  # a site of that name, but not of those columns
        kind = "genes" if fault.site == "x" else "dimensions" if names is None else "columns"
        said.append(_counted(kind, _named(fault.columns, names)))
        said.append(_counted("parameters", self.parameters))
        return (
            f"{', '.join(filter(None, said))}. The last weights with a finite loss and gradient "
            "are kept. Look at these cells, or train with a smaller lr or with "
            "gradient_clip_norm (both in plan_kwargs)"
        )


def first_fault(model: Callable, guide: Callable, cells: Cells) -> Fault:
    """The first site of guide and model where something is not finite; an empty one if none.

    In turn the distribution's parameters, the log probability, and its gradients by the parameters.
    """
    finder = _Finder(len(cells))
    try:
        with pyro.validation_enabled(False), torch.enable_grad(), finder:
            guide_trace = poutine.trace(guide).get_trace(cells)
            poutine.replay(model, guide_trace)(cells)
    except (_Found, *BROKEN):  # where shapes are wrong, there is nothing to find
        pass
    return finder.fault


def bad_gradients(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    named = ((n, p.grad) for n, p in module.named_parameters() if p.grad is not None)
    return [name for name, gradient in named if not gradient.isfinite().all()]


class _Found(Exception):
    """There is no need to look further."""


class _Finder(Messenger):
    """Looks at each site as it is sampled; before, because few distributions sample from NaN."""

    def __init__(self, n_cells: int):
        super().__init__()
        self.n_cells, self.fault = n_cells, Fault()

    def _pyro_sample(self, msg: dict) -> None:
        if isinstance(msg["fn"], Distribution):
            for name, parameter in _parameters(elementwise(msg["fn"])).items():
                self._look(msg["name"], name, parameter)

    def _pyro_post_sample(self, msg: dict) -> None:
        if not isinstance(msg["fn"], Distribution):  # a plate
            return
        fn = elementwise(msg["fn"])
        log_prob = element_log_prob(msg["fn"], msg["value"])
        self._look(msg["name"], "log probability", log_prob)
        parameters = {k: v for k, v in _parameters(fn).items() if v.requires_grad}
        if not (parameters and log_prob.requires_grad):
            return
        gradients = torch.autograd.grad(
            log_prob.sum(), list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                self._look(msg["name"], f"gradient of the log probability by {name}", gradient)

    def _look(self, site: str, what: str, values: Tensor) -> None:
        bad = ~values.detach().isfinite()
        if not bad.any():
            return
        bad = bad.reshape(-1, *bad.shape[-2:]) if bad.dim() > 1 else bad.reshape(1, 1, -1)
        bad = bad.any(0).cpu()
        shared = len(bad) < self.n_cells  # by all cells
        cells = np.empty(0, dtype=int) if shared else np.flatnonzero(bad.any(1))
        self.fault = Fault(site, what, cells, np.flatnonzero(bad.any(0)))
        raise _Found


def _parameters(distribution: Distribution) -> dict[str, Tensor]:
    """The tensors that a distribution was made with."""
    known = vars(distribution)
    named = {name: known.get(name) for name in distribution.arg_constraints}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _named(positions: np.ndarray, names: np.ndarray | None) -> Collection:
    """The names at these positions; the positions themselves where there are no names."""
    return positions if names is None else names[positions]


def _counted(kind: str, members: Collection) -> str:
    """ "3 cells (a, b, c)"; empty without any."""
    return f"{len(members)} {kind}{first(members)}" if len(members) else ""
