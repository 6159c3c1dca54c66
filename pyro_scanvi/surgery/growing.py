r"""A model with more batches, labels or covariate categories that holds the weights of an old one.

Categories are appended, so each old entry of a tensor has a place in the grown one. What is new
starts as the mean of its siblings, e.g. the column of a new batch as the mean of the old batches'
columns: an untrained new category is an average old one, nothing depends on a draw (scvi-tools
draws them), and labels that are not taught disturb nobody. Without siblings (a variable of one
category has no one-hot column) it starts as zero, and so does the column of the old category,
which stays there: the old cells keep their outputs.
The label prior keeps the old relative frequencies, and each new label gets :math:`1 / L'`:

.. math:: \pi'_y = \pi_y \frac{L}{L'} \quad (y \le L), \qquad \pi'_y = \frac{1}{L'} \quad (y > L)

Lotfollahi et al. (2022), Nat Biotechnol 40:121 (scArches, architecture surgery).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scanvi.model.growth import Growth, Rule, Start
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError


class Variable(NamedTuple):
    """What a variable has on an axis: entries now, and categories and entries before."""

    entries: int
    old_categories: int
    old_entries: int


@dataclass(frozen=True)
class Placement:
    """Where the entries of a tensor stand along the axis that grew.

    Attributes
    ----------
    dim, size
        The axis, and its new size.
    old
        New position of each old entry.
    new
        Position of each entry of a new category, and old positions of its siblings.
    start
        See :class:`~pyro_scanvi.model.growth.Growth`.
    """

    dim: int
    size: int
    old: Sequence[int]
    new: Mapping[int, Sequence[int]]
    start: Start | None = None

    def spread(self, tensor: Tensor) -> Tensor:
        """The old entries at their new places, zeros elsewhere."""
        shape = list(tensor.shape)
        shape[self.dim] = self.size
        old = torch.tensor(self.old, dtype=torch.long, device=tensor.device)
        return tensor.new_zeros(shape).index_copy_(self.dim, old, tensor)

    def grown(self, tensor: Tensor, own: Tensor) -> Tensor:
        """The grown tensor; `own` is that of the larger model as it was made."""
        return self.averaged(tensor) if self.start is None else self.start(tensor, own)

    def averaged(self, tensor: Tensor) -> Tensor:
        """The old entries at their new places; those of new categories are means of siblings."""
        result = self.spread(tensor)
        for position, siblings in self.new.items():
            if siblings:
                rows = tensor.index_select(self.dim, torch.tensor(siblings, device=tensor.device))
                result.select(self.dim, position).copy_(rows.mean(self.dim))
        return result


def grow(old: SCANVAE, new: SCANVAE) -> SCANVAE:
    """Put the weights of `old` into a larger model of its class; returns that.

    Parameters
    ----------
    old
        The reference; it is not changed.
    new
        A model of its class, of sizes at least as large; it takes up the weights.

    Raises
    ------
    InputError
        If a parameter grew for which the model has no rule, or another than its shapes say.
    """
    new.to(old.y_prior)
    places, own = placements(old, new), new.state_dict()
    state = old.state_dict()
    for name, axes in places.items():
        for place in axes:
            state[name] = place.grown(state[name], own[name])
    new.load_state_dict(state)
    return new


def placements(old: SCANVAE, new: SCANVAE) -> dict[str, tuple[Placement, ...]]:
    """Of each tensor of the state dict whose shape differs, a placement for each axis that grew."""
    olds, news = old.state_dict(), new.state_dict()
    if olds.keys() != news.keys():
        differing = ", ".join(sorted(olds.keys() ^ news.keys())[:5])
        raise InputError(f"the two models do not own the same parameters: {differing}")
    rules, places = new.growth(), {}
    for name in (name for name in olds if olds[name].shape != news[name].shape):
        rule = _rule(name, rules)
        place = None if rule is None else _placed(rule, old, new, olds[name], news[name])
        if place is None:
            raise InputError(
                f"{name} has shape {tuple(olds[name].shape)} in the reference and "
                f"{tuple(news[name].shape)} with the new categories, and there is no rule how it "
                "grows; keep the number of categories (extend_categories=False, no "
                "extend_labels), give it a shape that does not depend on them, or a rule where it "
                "is made: pyro_scanvi.model.growth.grows"
            )
        places[name] = place
    return places


def _rule(name: str, rules: Mapping[str, Rule]) -> Rule | None:
    """The rule of a tensor: that of the longest beginning of its name."""
    path = name.split(".")
    beginnings = (".".join(path[:n]) for n in range(len(path), 0, -1))
    return next((rules[b] for b in beginnings if b in rules), None)


def _placed(
    rule: Rule, old: SCANVAE, new: SCANVAE, old_tensor: Tensor, new_tensor: Tensor
) -> tuple[Placement, ...] | None:
    """A placement for each axis of a rule; None where the shapes do not fit them."""
    shape, places = list(old_tensor.shape), list[Placement]()
    for axis in rule.axes:
        place = _placed_on(axis, old, new, shape)
        if place is None:
            return None
        shape[axis.dim] = place.size
        places.append(place)
    return tuple(places) if tuple(shape) == tuple(new_tensor.shape) else None


def _placed_on(axis: Growth, old: SCANVAE, new: SCANVAE, shape: Sequence[int]) -> Placement | None:
    """The variables stand at the end of the axis; None where there is no room for them."""
    if axis.dim >= len(shape):
        return None
    pairs = zip(axis.variables(old), axis.variables(new), strict=True)
    variables = [Variable(entries, *before) for before, (_, entries) in pairs]
    kept = shape[axis.dim] - sum(v.old_entries for v in variables)
    return None if kept < 0 else _place_variables(axis, kept, variables)


def _place_variables(rule: Growth, kept: int, variables: Sequence[Variable]) -> Placement:
    places, fresh = list(range(kept)), dict[int, Sequence[int]]()
    start_old = start = kept
    for entries, old_categories, old_entries in variables:
        siblings = list(range(start_old, start_old + old_entries))
        places += range(start, start + old_entries)
        fresh |= {start + code: siblings for code in range(old_categories, entries)}
        start_old, start = start_old + old_entries, start + entries
    return Placement(rule.dim, start, places, fresh, rule.start)
