"""Whether tensors that come in at a door fit the model."""

from typing import Protocol

import torch
from torch import Tensor

from pyro_scanvi.data.minibatches import Cells
from pyro_scanvi.validation import InputError


class Sizes(Protocol):
    """What a minibatch must fit."""

    n_input: int
    n_batch: int
    n_labels: int
    n_continuous_cov: int
    n_cats_per_cov: tuple[int, ...]
    use_size_factor_key: bool
    n_extra: dict[str, int]


def check_cells(
    sizes: Sizes,
    cells: Cells,
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
    for name, values in cells.extra.items():
        check_shape(f"extra data {name!r}", values, (n_cells, sizes.n_extra.get(name, 0)))


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
