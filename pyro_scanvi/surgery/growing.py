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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_scanvi.model.likelihoods import (
    GeneBatchDispersion,
    GeneCellDispersion,
    GeneLabelDispersion,
)
from pyro_scanvi.model.scanvae import SCANVAE
from pyro_scanvi.validation import InputError

Variable = tuple[int, int, int]  # columns that it has, categories that it had, columns that it had


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
    """

    dim: int
    size: int
    old: Sequence[int]
    new: Mapping[int, Sequence[int]]

    def spread(self, tensor: Tensor) -> Tensor:
        """The old entries at their new places, zeros elsewhere."""
        shape = list(tensor.shape)
        shape[self.dim] = self.size
        old = torch.tensor(self.old, dtype=torch.long, device=tensor.device)
        return tensor.new_zeros(shape).index_copy_(self.dim, old, tensor)

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
        If a parameter grew that no rule of this module knows.
    """
    new.to(old.y_prior)
    places, own = placements(old, new), new.state_dict()
    state = {
        name: _initial(name, tensor, own[name], places.get(name))
        for name, tensor in old.state_dict().items()
    }
    new.load_state_dict(state)
    return new


def placements(old: SCANVAE, new: SCANVAE) -> dict[str, Placement]:
    """The placement of each tensor of the state dict whose shape differs."""
    olds, news = old.state_dict(), new.state_dict()
    if olds.keys() != news.keys():
        differing = ", ".join(sorted(olds.keys() ^ news.keys())[:5])
        raise InputError(f"the two models do not own the same parameters: {differing}")
    grown = (name for name in olds if olds[name].shape != news[name].shape)
    return {name: _placement(name, old, new, olds[name], news[name]) for name in grown}


def grown_label_prior(prior: Tensor, n_labels: int) -> Tensor:
    """Old relative frequencies, and 1 / n_labels for each new label, (n_labels,)."""
    if len(prior) == n_labels:
        return prior
    new = prior.new_full((n_labels - len(prior),), 1 / n_labels)
    return torch.cat([prior * (len(prior) / n_labels), new])


def _initial(name: str, old: Tensor, own: Tensor, place: Placement | None) -> Tensor:
    if place is None:
        return old
    return INITIAL.get(name, lambda old, own, place: place.averaged(old))(old, own, place)


def _from_the_data(old: Tensor, own: Tensor, place: Placement) -> Tensor:
    """New entries as the new model has them."""
    return torch.cat([old, own[len(old) :]])


INITIAL = {  # where the mean of siblings would be wrong
    "y_prior": lambda old, own, place: grown_label_prior(old, len(own)),
    "library_log_means": _from_the_data,
    "library_log_vars": _from_the_data,
}


def _one_hots(old: SCANVAE, new: SCANVAE) -> list[Variable]:
    pairs = zip(old.covariates.n_categories, new.covariates.n_categories, strict=True)
    return [(n if n > 1 else 0, before, before if before > 1 else 0) for before, n in pairs]


def _labels(old: SCANVAE, new: SCANVAE) -> list[Variable]:
    return [(new.n_labels, old.n_labels, old.n_labels)]


def _batches(old: SCANVAE, new: SCANVAE) -> list[Variable]:
    return [(new.n_batch, old.n_batch, old.n_batch)]


Axis = tuple[int, Callable[[SCANVAE, SCANVAE], list[Variable]]]
AXES: dict[str, Axis] = {  # of the tensors of each part: the axis that grows, and with what
    "z_encoder": (1, _one_hots),
    "l_encoder": (1, _one_hots),
    "x_decoder": (1, _one_hots),
    "u_encoder": (1, _labels),
    "z_decoder": (1, _labels),
    "classifier": (0, _labels),
    "covariates": (0, _batches),
    "library_log_means": (0, _batches),
    "library_log_vars": (0, _batches),
    "y_prior": (0, _labels),
}
DISPERSION_AXES: dict[type, Axis] = {
    GeneBatchDispersion: (0, _batches),
    GeneLabelDispersion: (0, _labels),
    GeneCellDispersion: (1, _one_hots),
}


def _placement(
    name: str, old: SCANVAE, new: SCANVAE, old_tensor: Tensor, new_tensor: Tensor
) -> Placement:
    axes = AXES | {"dispersion": DISPERSION_AXES.get(type(getattr(new, "dispersion", None)))}
    axis = axes.get(name.split(".")[0])
    place = None if axis is None else _placed(*axis, old, new, old_tensor, new_tensor)
    if place is None:
        raise InputError(
            f"{name} has shape {tuple(old_tensor.shape)} in the reference and "
            f"{tuple(new_tensor.shape)} with the new categories, and there is no rule how it "
            "grows; keep the number of categories (extend_categories=False, no extend_labels) or "
            "give it a shape that does not depend on them"
        )
    return place


def _placed(
    dim: int,
    variables_of: Callable[[SCANVAE, SCANVAE], list[Variable]],
    old: SCANVAE,
    new: SCANVAE,
    old_tensor: Tensor,
    new_tensor: Tensor,
) -> Placement | None:
    """The variables stand at the end of the axis; None where the shapes do not fit them."""
    variables = variables_of(old, new)
    kept = old_tensor.shape[dim] - sum(had for _, _, had in variables)
    spread = list(old_tensor.shape)
    spread[dim] = kept + sum(has for has, _, _ in variables)
    if kept < 0 or tuple(spread) != tuple(new_tensor.shape):
        return None
    return _place_variables(dim, kept, variables)


def _place_variables(dim: int, kept: int, variables: Sequence[Variable]) -> Placement:
    places, fresh = list(range(kept)), {}
    start_old = start = kept
    for has, categories, had in variables:
        siblings = list(range(start_old, start_old + had))
        places += range(start, start + had)
        fresh |= {start + code: siblings for code in range(categories, has)}
        start_old, start = start_old + had, start + has
    return Placement(dim, start, places, fresh)
