"""Arguments of a SCANVAE that need more than a look, checked and as the model has them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_scanvi.validation import InputError, check_at_least, check_known, check_rate


def checked_label_prior(y_prior: Any, n_labels: int) -> Tensor:
    """Uniform for None; otherwise probabilities of shape (n_labels,) or (1, n_labels)."""
    if y_prior is None:
        return torch.full((n_labels,), 1 / n_labels)
    prior = torch.as_tensor(y_prior, dtype=torch.get_default_dtype()).detach().clone()
    if prior.shape not in {(n_labels,), (1, n_labels)}:
        raise InputError(
            f"y_prior has shape {tuple(prior.shape)}, expected one probability for each of the "
            f"{n_labels} labels"
        )
    if not (prior > 0).all() or not torch.isclose(prior.sum(), prior.new_ones(()), atol=1e-4):
        raise InputError(
            f"y_prior sums to {prior.sum().item():.6g} and its smallest entry is "
            f"{prior.min().item():.6g}; expected positive probabilities that sum to 1"
        )
    return prior.reshape(n_labels)


def checked_label_groups(labels_groups: Any, use: bool, n_labels: int) -> Tensor | None:
    """Group ids (n_labels,) without gaps, or None where groups are not used."""
    if use != (labels_groups is not None):
        missing, given = (
            ("labels_groups", "use_labels_groups=True")
            if use
            else ("use_labels_groups=True", "labels_groups")
        )
        raise InputError(f"{given} is given without {missing}; give both or neither")
    if labels_groups is None:
        return None
    groups = torch.as_tensor(labels_groups, dtype=torch.long)
    if groups.shape != (n_labels,):
        raise InputError(
            f"labels_groups has shape {tuple(groups.shape)}, expected the group of each of the "
            f"{n_labels} labels"
        )
    found = groups.unique()
    if not torch.equal(found, torch.arange(len(found))):
        raise InputError(
            f"labels_groups holds the ids {found.tolist()}; number them 0, 1, ... without gaps"
        )
    return groups


def checked_library_prior(values: Any, n_batch: int, name: str, positive: bool) -> Tensor:
    """Mean or variance of log library for each batch, (n_batch,)."""
    if values is None:
        raise InputError(
            f"use_observed_lib_size=False needs {name}: one number for each of the {n_batch} "
            "batches, of the log of the cells' total counts"
        )
    values = torch.as_tensor(values, dtype=torch.get_default_dtype()).reshape(-1)
    if values.shape != (n_batch,):
        raise InputError(f"{name} holds {len(values)} numbers, expected {n_batch}: one a batch")
    if not values.isfinite().all() or (positive and not (values > 0).all()):
        wanted = "finite and positive" if positive else "finite"
        raise InputError(f"{name} is {values.tolist()}, expected {wanted} numbers")
    return values


def check_absent(given: Mapping[str, Any], needs: str) -> None:
    """Refuse arguments that would be ignored."""
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} is given, but it belongs to {needs}")


def checked_layer_arguments(given: Mapping[str, Any] | None, argument: str) -> dict[str, Any]:
    """`activation` and `bias` of hidden layers."""
    check_known(given or {}, ["activation", "bias"], f"a key of {argument}")
    return dict(given or {})


def checked_classifier_parameters(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """`n_hidden`, `n_layers` and `dropout_rate`; scvi-tools' `logits` must be True."""
    given = dict(given or {})
    known = ["n_hidden", "n_layers", "dropout_rate"]
    check_known(given, [*known, "logits"], "a key of classifier_parameters")
    if not given.pop("logits", True):
        raise InputError(
            "classifier_parameters['logits'] is False, but the classifier always "
            "returns logits; take their softmax for probabilities"
        )
    check_at_least(0, **{k: given[k] for k in ("n_layers", "n_hidden") if k in given})
    check_rate(**{k: given[k] for k in ("dropout_rate",) if k in given})
    if given.get("n_hidden") == 0:  # scvi-tools' way to ask for a linear classifier
        given |= {"n_layers": 0, "n_hidden": 1}
    return given


def checked_widths(n_extra: Mapping[str, int] | None) -> dict[str, int]:
    """Number of columns of extra data, by name."""
    check_at_least(1, **{f"n_extra[{k!r}]": n for k, n in (n_extra or {}).items()})
    return dict(n_extra or {})
