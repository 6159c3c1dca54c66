"""What the parts of a model say of how they grow with new labels, batches and categories.

A rule names the axis of a tensor at whose end the entries of some variables stand, such as one row
for each label. What is done with the rules is written in :mod:`pyro_scanvi.surgery`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pyro_scanvi.validation import InputError

NOTED = "growth_rules"  # attribute of a module
Start = Callable[[Tensor, Tensor], Tensor]


class Rule(Protocol):
    """How a tensor grows, on one axis or on several."""

    @property
    def axes(self) -> tuple["Growth", ...]:
        """A rule for each axis, in turn."""


class Coded(Protocol):
    """Whatever knows the numbers of categories of its covariates."""

    @property
    def n_categories(self) -> tuple[int, ...]:
        """Of the batch, 0 where it is embedded, and of each covariate."""


class Sized(Protocol):
    """What the rules read of a model."""

    n_labels: int
    n_batch: int

    @property
    def covariates(self) -> Coded:
        """The encoder of batch and covariates."""


@dataclass(frozen=True)
class Growth(ABC):
    """How a tensor grows.

    Parameters
    ----------
    dim
        The axis that grows; the entries of the variables are the last ones on it.
    start
        From the old tensor, and that of the newly made larger model, to the grown tensor. None:
        old entries stay, and a new one is the mean of the old ones of its variable.
    """

    dim: int
    start: Start | None = None

    @abstractmethod
    def variables(self, vae: Sized) -> Sequence[tuple[int, int]]:
        """Number of categories, and of entries on the axis, of each variable in turn."""

    @property
    def axes(self) -> tuple["Growth", ...]:
        """A rule for each axis that grows; this one."""
        return (self,)


class EachOf:
    """Rules for several axes of one tensor, which grow in turn.

    A start then sees the tensor as the rules before it left it.

    Examples
    --------
    >>> n_batch, n_labels = 2, 3
    >>> shift = nn.Linear(n_labels, n_batch)
    >>> grows(shift, weight=EachOf(ByBatch(dim=0), ByLabel(dim=1)), bias=ByBatch(dim=0))
    """

    def __init__(self, *axes: Growth):
        self.axes = axes


class ByLabel(Growth):
    """One entry for each label."""

    def variables(self, vae: Sized) -> Sequence[tuple[int, int]]:
        """The labels."""
        return [(vae.n_labels, vae.n_labels)]


class ByBatch(Growth):
    """One entry for each biological batch."""

    def variables(self, vae: Sized) -> Sequence[tuple[int, int]]:
        """The batches."""
        return [(vae.n_batch, vae.n_batch)]


class ByCovariates(Growth):
    """The one-hot columns of batch and categorical covariates; one category has no column."""

    def variables(self, vae: Sized) -> Sequence[tuple[int, int]]:
        """The batch, which has no category where it is embedded, and each covariate."""
        return [(n, n if n > 1 else 0) for n in vae.covariates.n_categories]


def grown_label_prior(old: Tensor, n_labels: int) -> Tensor:
    """Old relative frequencies, and 1 / n_labels for each new label, (n_labels,)."""
    if len(old) == n_labels:
        return old
    new = old.new_full((n_labels - len(old),), 1 / n_labels)
    return torch.cat([old * (len(old) / n_labels), new])


def label_prior(old: Tensor, own: Tensor) -> Tensor:
    """A start: probabilities that sum to 1."""
    return grown_label_prior(old, len(own))


def from_the_data(old: Tensor, own: Tensor) -> Tensor:
    """A start: new entries as the newly made model has them."""
    return torch.cat([old, own[len(old) :]])


def grows(module: nn.Module, **rules: Rule) -> None:
    """Say of tensors of a module how they grow, beside the line that makes them.

    Parameters
    ----------
    module
        Whose parameters or buffers, such as ``self`` in ``__init__``; or whose parts, all of whose
        tensors then grow alike.
    rules
        For each of them by name; :class:`EachOf` where several axes grow.

    Raises
    ------
    InputError
        If the module has none of that name.

    Examples
    --------
    >>> layer = nn.Linear(4, 3)
    >>> grows(layer, weight=ByLabel(dim=0), bias=ByLabel(dim=0))
    """
    for name in rules:
        if not hasattr(module, name):
            raise InputError(
                f"{type(module).__name__} has no {name!r} to grow; make it first, then say how it "
                "grows"
            )
    vars(module).setdefault(NOTED, {}).update(rules)  # of the module, so that copies have it


def told(vae: nn.Module) -> dict[str, Rule]:
    """What modules say of their own tensors, by name in the whole model.

    A module says it by :func:`grows`, or by a method ``growth()`` from names of its tensors to
    rules.
    """
    rules: dict[str, Rule] = {}
    for path, module in vae.named_modules(remove_duplicate=False):
        said = dict(vars(module).get(NOTED, {}))
        if module is not vae:  # whose growth() asks this
            said |= getattr(module, "growth", dict)()
        rules |= {f"{path}.{tensor}".removeprefix("."): rule for tensor, rule in said.items()}
    return rules
