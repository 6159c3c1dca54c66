"""Checks at the door: say what we got, what we expected, and what to do."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_scanvi.names import listed, name_of, names_of, nearest, several

LARGEST_SEED = 2**63


class InputError(ValueError):
    """Data or arguments of the user that cannot be worked with; the message says what to do.

    Parameters
    ----------
    message
        What is wrong, what was expected, and what to do.
    mend
        Arguments whose change mends it, with the value to give or None where the user must know
        it; for those who give arguments another name, as the command line does.
    """

    def __init__(self, message: str, mend: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.mend = dict(mend or {})


class Advice(UserWarning):
    """What is allowed but may not be meant; `mend` as in :class:`InputError`."""

    def __init__(self, message: str, mend: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.mend = dict(mend or {})


def check_known(
    given: Iterable[str], known: Iterable[str], what: str, error: type[Exception] = TypeError
) -> None:
    """Refuse unknown names, naming the nearest known one."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        hint = nearest(name, known, f"choose from {', '.join(known)}")
        raise error(f"{name!r} is not {what}; {hint}")


def look_up(table: Mapping[Any, Any], choice: Any, argument: str) -> Any:
    """The entry of a table, or `choice` itself where it is a part and not a name."""
    if not isinstance(choice, str | bool | None):
        return choice
    if choice not in table:
        raise InputError(f"{argument}={choice!r}, expected one of {', '.join(map(repr, table))}")
    return table[choice]


def plain_number(value: Any) -> Any:
    """A number of numpy, pandas or torch as Python's own; anything else as it is.

    A float of fewer than 64 bits is the decimal that it was written as: np.float32(0.05) is 0.05.
    """
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = _number_in(value)
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.number | np.bool_ | np.str_) else value


def _number_in(value: Tensor | np.ndarray) -> Any:
    """The entry of an array without dimensions; numpy has no bfloat16."""
    if not isinstance(value, Tensor):
        return value[()]
    return value.item() if value.dtype == torch.bfloat16 else value.detach().cpu().numpy()[()]


def plain(value: Any) -> Any:
    """The same, inside dicts, lists and tuples too."""
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return plain_number(value)


def make_plain(settings: Any) -> None:
    """Make the numbers in a dataclass Python's own, a frozen one's too as it is made."""
    for field in fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))


def plain_arguments(function: Callable) -> Callable:
    """The same function, which meets Python's own numbers alone."""

    @wraps(function)
    def converted(*args: Any, **kwargs: Any) -> Any:
        return function(*map(plain_number, args), **{k: plain_number(v) for k, v in kwargs.items()})

    return converted


def is_number(value: Any) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_at_least(minimum: int, **sizes: int) -> None:
    """Refuse sizes that are no integers or too small."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < minimum:
            raise InputError(f"{name}={size!r}, expected an integer of at least {minimum}")


def check_positive(**numbers: float) -> None:
    """Refuse what is no finite number above 0."""
    for name, number in numbers.items():
        if not is_number(number) or not 0 < number < math.inf:
            raise InputError(f"{name}={number!r}, expected a finite number above 0")


def check_not_negative(**numbers: float) -> None:
    """Refuse what is no finite number of at least 0."""
    for name, number in numbers.items():
        if not is_number(number) or not 0 <= number < math.inf:
            raise InputError(f"{name}={number!r}, expected a number that is at least 0")


def check_flags(**flags: bool) -> None:
    """Refuse what is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InputError(f"{name}={flag!r}, expected True or False")


def check_seed(seed: int) -> None:
    """Refuse what torch takes for no seed, with room for the epochs that are added to it."""
    check_at_least(0, seed=seed)
    if seed >= LARGEST_SEED:
        raise InputError(f"seed={seed}, expected an integer below 2**63")


def positions_of(names: Any, known: Iterable, argument: str) -> list[int]:
    """Where a name or several stand among the known ones; unknown names are refused."""
    position = {name_of(name): i for i, name in enumerate(known)}
    names = names_of(several(names))
    if not names:
        raise InputError(f"{argument} is empty; leave it out, or name at least one")
    unknown = [name for name in names if name not in position]
    if unknown:
        hint = nearest(unknown[0], position, f"the model knows {listed(position)}")
        raise InputError(
            f"{argument}: the model does not know {unknown[0]!r}"
            + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
            + f"; {hint}"
        )
    return [position[name] for name in names]


def check_rate(**rates: float) -> None:
    """Refuse dropout rates outside [0, 1)."""
    for name, rate in rates.items():
        if not is_number(rate) or not 0 <= rate < 1:
            raise InputError(f"{name}={rate!r}, expected a probability in [0, 1)")


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


def check_arguments(constructor: Callable, unknown: Mapping[str, Any]) -> None:
    """Refuse keywords that `constructor` does not spell out."""
    parameters = inspect.signature(constructor).parameters
    name = constructor.__name__
    check_known(unknown, [p for p in parameters if p != "unknown"], f"an argument of {name}")


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


class Sizes(Protocol):
    """What a minibatch must fit."""

    n_input: int
    n_batch: int
    n_labels: int
    n_continuous_cov: int
    n_cats_per_cov: tuple[int, ...]
    use_size_factor_key: bool


def check_cells(
    sizes: Sizes,
    cells: Any,
    batch_given: bool = True,
    covariates: bool = True,
    size_factors: bool = True,
) -> None:
    """Refuse a minibatch that does not fit the model.

    Parameters
    ----------
    sizes
        A :class:`~pyro_scanvi.SCANVAE`, whose sizes are read.
    cells
        The :class:`~pyro_scanvi.Cells` that came in at a door.
    batch_given
        Whether the batches are given, not filled in.
    covariates, size_factors
        Whether they will be read, so that those of the model must be there; batches are read with
        the covariates.

    Raises
    ------
    InputError
        For a wrong number of genes or rows, a code out of range, a negative or missing number,
        or a covariate that is announced but not given or given but not announced.
    """
    if covariates and sizes.n_batch > 1 and not batch_given:
        raise InputError(f"batch: none given, but the model has {sizes.n_batch}; give the codes")
    _check_counts(cells.x, sizes.n_input)
    n_cells = len(cells.x)
    check_codes("batch", cells.batch, n_cells, sizes.n_batch)
    check_codes("label", cells.label, n_cells, sizes.n_labels, smallest=-1)
    _check_continuous(cells.continuous, n_cells, sizes.n_continuous_cov, covariates)
    _check_categorical(cells.categorical, n_cells, sizes.n_cats_per_cov, covariates)
    _check_size_factor(cells.size_factor, n_cells, sizes.use_size_factor_key, size_factors)


def check_codes(name: str, codes: Tensor, n_cells: int, n: int, smallest: int = 0) -> None:
    """Refuse codes that are not one for each cell, or lie outside smallest..n-1."""
    check_shape(name, codes, (n_cells,))
    if n_cells and (codes.min() < smallest or codes.max() >= n):
        raise InputError(
            f"{name} holds codes from {codes.min().item()} to {codes.max().item()}, expected "
            f"{smallest} to {n - 1}; encode the cells with the categories of the model"
        )


def check_shape(name: str, values: Tensor, expected: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(values.shape) != expected:
        raise InputError(f"{name} has shape {tuple(values.shape)}, expected {expected}")


def check_latents(z: Tensor, library: Tensor, n_latent: int) -> None:
    """Refuse samples of z and of log l that are not (..., N, n_latent) and (..., N, 1)."""
    if z.ndim < 2 or z.shape[-1] != n_latent:
        raise InputError(f"z has shape {tuple(z.shape)}, expected (..., cells, {n_latent})")
    if library.shape not in {(*z.shape[:-1], 1), (z.shape[-2], 1)}:
        raise InputError(
            f"library has shape {tuple(library.shape)}, expected {(*z.shape[:-1], 1)}: one "
            "logarithm a cell"
        )


def flat(name: str, codes: Tensor) -> Tensor:
    """Integer codes of shape (N,), from whole numbers of shape (N,) or (N, 1)."""
    if codes.ndim not in (1, 2) or (codes.ndim == 2 and codes.shape[1] != 1):
        raise InputError(
            f"{name} has shape {tuple(codes.shape)}, expected (cells,) or (cells, 1): one code "
            "a cell"
        )
    return whole(name, codes).reshape(-1)


def whole(name: str, codes: Tensor) -> Tensor:
    """The same codes as integers."""
    integers = codes.long()
    if not (integers == codes).all():
        raise InputError(f"{name} holds fractions or NaN; expected whole numbers")
    return integers


def known_labels(name: str, labels: Tensor, n_labels: int) -> Tensor:
    """Label codes, (N,), with -1 for every code outside 0..n_labels-1."""
    labels = flat(name, labels)
    return torch.where((labels >= 0) & (labels < n_labels), labels, -1)


def _check_counts(x: Tensor, n_genes: int) -> None:
    if x.ndim != 2 or x.shape[1] != n_genes:
        raise InputError(
            f"counts have shape {tuple(x.shape)}, expected (cells, {n_genes}): the genes of the "
            "model, in its order"
        )
    if x.numel() and not (x.isfinite().all() and x.min() >= 0):
        raise InputError(
            f"counts hold negative numbers, NaN or infinity (the smallest is {x.min().item():.6g});"
            " expected raw counts"
        )


def _check_announced(name: str, given: bool, announced: bool, read: bool, argument: str) -> None:
    if announced and read and not given:
        raise InputError(f"{name}: none given, but the model was built with {argument}; give it")
    if given and not announced:
        raise InputError(
            f"{name}: given, but the model was built without {argument} and would ignore it; "
            "leave it out"
        )


def _check_continuous(values: Tensor | None, n_cells: int, n: int, read: bool) -> None:
    name = "continuous covariates"
    _check_announced(name, values is not None, n > 0, read, "n_continuous_cov")
    if values is None:
        return
    check_shape(name, values, (n_cells, n))
    if not values.isfinite().all():
        raise InputError(f"{name} hold NaN or infinity; expected finite numbers")


def _check_categorical(
    codes: Tensor | None, n_cells: int, n_categories: tuple[int, ...], read: bool
) -> None:
    name = "categorical covariates"
    _check_announced(name, codes is not None, len(n_categories) > 0, read, "n_cats_per_cov")
    if codes is None:
        return
    check_shape(name, codes, (n_cells, len(n_categories)))
    for i, n in enumerate(n_categories):
        check_codes(f"categorical covariate {i}", codes[:, i], n_cells, n)


def _check_size_factor(values: Tensor | None, n_cells: int, announced: bool, read: bool) -> None:
    _check_announced("size_factor", values is not None, announced, read, "use_size_factor_key")
    if values is None:
        return
    check_shape("size_factor", values, (n_cells, 1))
    if n_cells and not (values.isfinite().all() and values.min() > 0):
        raise InputError(
            f"the smallest size_factor is {values.min().item():.6g}; expected finite and positive "
            "numbers"
        )
