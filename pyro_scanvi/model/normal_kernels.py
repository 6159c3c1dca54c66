"""Kernels of Normals of vectors, compiled by numba for the CPU: log probability, KL, and heads.

Rows are of K numbers; those that come again and again, as one for each label, are there once. Sums
over dimensions are of float64.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy import float32, float64
from torch import Tensor

from pyro_scanvi.model.elementary import HALF, ONE, exp, log
from pyro_scanvi.model.kernels import compiled, inlined, over_rows, rows_of, serve, unexpanded

HALF_LOG_2PI = float32(0.5 * math.log(2 * math.pi))
ROWS = 64  # at once: registers are filled over the ends of short rows
WORTH_A_THREAD = 1 << 16  # numbers
WORTH_A_CALL = 1 << 15  # below, torch's operations take no longer than the way to a kernel


def are_rows(*given: Tensor) -> bool:
    """Whether kernels serve, and each is all rows of the result or the last ones, again and again.

    The gradient of one that was expanded is left to torch.
    """
    if max(t.numel() for t in given) < WORTH_A_CALL or not serve(*given):
        return False
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    bare = [unexpanded(t) for t in given]
    last = all(b.dim() and b.shape == shape[len(shape) - b.dim() :] for b in bare)
    return last and not any(
        t.requires_grad and b is not t for t, b in zip(given, bare, strict=True)
    )


def by_row(kernel: Any, *given: Tensor) -> Tensor:
    """A number for each row."""
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    result = torch.empty(shape[:-1], dtype=torch.float32)
    rows = [rows_of(t) for t in given]
    over_rows(kernel, result.numel(), _n_threads(shape), *rows, result.reshape(-1).numpy())
    return result


def slopes(kernel: Any, grad: Tensor, given: Any, wanted: Any) -> list[Tensor | None]:
    """Of the first of `given`, those that are wanted, from the slope of each row."""
    shape, rows = (*grad.shape, given[0].shape[-1]), [rows_of(t) for t in given]
    n = grad.numel()
    slope = grad.detach().reshape(-1).numpy()
    found = [np.zeros_like(r) for r, _ in zip(rows, wanted, strict=False)]
    again = any(len(f) < n and w for f, w in zip(found, wanted, strict=True))
    # Rows that come again are summed, which threads would do over one another.
    over_rows(kernel, n, 1 if again else _n_threads(shape), slope, *rows, *wanted, *found)
    pairs = zip(found, given, wanted, strict=False)
    return [torch.from_numpy(f).reshape(t.shape) if w else None for f, t, w in pairs]


def _all_rows(t: Tensor) -> np.ndarray:
    return t.detach().contiguous().view(-1, t.shape[-1]).numpy()


def _n_threads(shape: Any) -> int:
    return -(-math.prod(shape) // WORTH_A_THREAD)


@inlined
def _next(i, rows):
    """The row after that; the first one after the last. A remainder would cost as much as a row."""
    return i + 1 if i + 1 < len(rows) else 0


@inlined
def _sums(terms, width, result):
    """Of rows of so many terms, one after another."""
    ends = width - width % 4
    for i in range(len(result)):
        row = terms[i * width : (i + 1) * width]
        one = two = three = four = 0.0  # sums of four columns, which need not wait for another
        for k in range(0, ends, 4):
            one += float64(row[k])
            two += float64(row[k + 1])
            three += float64(row[k + 2])
            four += float64(row[k + 3])
        for k in range(ends, width):
            one += float64(row[k])
        result[i] = one + two + three + four


@compiled
def log_probs(start, stop, value, loc, scale, result):
    """Fill the last."""
    width = value.shape[1]
    terms, scales = np.empty((2, ROWS * width), np.float32)
    for first in range(start, stop, ROWS):
        last = min(first + ROWS, stop)
        iv, im, js, at = first % len(value), first % len(loc), first % len(scale), 0
        for _ in range(first, last):
            for k in range(width):
                terms[at + k], scales[at + k] = value[iv, k] - loc[im, k], scale[js, k]
            iv, im, js = _next(iv, value), _next(im, loc), _next(js, scale)
            at += width
        for j in range((last - first) * width):
            standard = terms[j] / scales[j]
            terms[j] = -HALF * standard * standard - log(scales[j]) - HALF_LOG_2PI
        _sums(terms, width, result[first:last])


@compiled
def log_prob_slopes(start, stop, slope, value, loc, scale, by_z, by_m, by_s, of_z, of_m, of_s):
    """Add to the last three what is wanted of them."""
    for i in range(start, stop):
        iv, im, js, g = i % len(value), i % len(loc), i % len(scale), slope[i]
        for k in range(value.shape[1]):
            rate = ONE / scale[js, k]
            standard = (value[iv, k] - loc[im, k]) * rate
            if by_z:
                of_z[iv, k] -= g * standard * rate
            if by_m:
                of_m[im, k] += g * standard * rate
            if by_s:
                of_s[js, k] += g * (standard * standard - ONE) * rate


@compiled
def kls(start, stop, loc, scale, p_loc, p_scale, result):
    """Fill the last."""
    width = loc.shape[1]
    terms, ratios, rates = np.empty((3, ROWS * width), np.float32)
    for first in range(start, stop, ROWS):
        last = min(first + ROWS, stop)
        im, js, at = first % len(loc), first % len(scale), 0
        ip, jp = first % len(p_loc), first % len(p_scale)
        for _ in range(first, last):
            for k in range(width):
                terms[at + k], rates[at + k] = loc[im, k] - p_loc[ip, k], p_scale[jp, k]
                ratios[at + k] = scale[js, k]
            im, js, ip, jp = _next(im, loc), _next(js, scale), _next(ip, p_loc), _next(jp, p_scale)
            at += width
        for j in range((last - first) * width):
            standard, ratio = terms[j] / rates[j], ratios[j] / rates[j]
            terms[j] = HALF * (standard * standard + ratio * ratio - ONE) - log(ratio)
        _sums(terms, width, result[first:last])


@compiled
def kl_slopes(start, stop, slope, loc, scale, p_loc, p_scale, by_m, by_s, of_m, of_s):
    """Add to the last two what is wanted of them."""
    for i in range(start, stop):
        im, js, ip, jp = i % len(loc), i % len(scale), i % len(p_loc), i % len(p_scale)
        g = slope[i]
        for k in range(loc.shape[1]):
            rate = ONE / p_scale[jp, k]
            if by_m:
                of_m[im, k] += g * (loc[im, k] - p_loc[ip, k]) * rate * rate
            if by_s:
                of_s[js, k] += g * (scale[js, k] * rate * rate - ONE / scale[js, k])


@compiled
def _parted(start, stop, both, eps, loc, scale):
    """Fill the last two."""
    width = loc.shape[1]
    for first in range(start, stop, ROWS):
        last = min(first + ROWS, stop)
        for i in range(first, last):
            for k in range(width):
                loc[i, k], scale[i, k] = both[i, k], both[i, width + k]
        raw = scale[first:last].reshape(-1)
        for j in range(len(raw)):
            raw[j] = np.sqrt(exp(raw[j]) + eps)


@compiled
def _joined(start, stop, both, scale, of_loc, of_scale, of_both):
    """Fill the last."""
    width = scale.shape[1]
    found = np.empty((ROWS, width), np.float32)
    for first in range(start, stop, ROWS):
        last = min(first + ROWS, stop)
        for i in range(first, last):
            for k in range(width):
                found[i - first, k] = both[i, width + k]
        raw, scales = found[: last - first].reshape(-1), scale[first:last].reshape(-1)
        slopes = of_scale[first:last].reshape(-1)
        for j in range(len(raw)):
            raw[j] = slopes[j] * (HALF * exp(raw[j]) / scales[j])
        for i in range(first, last):
            for k in range(width):
                of_both[i, k], of_both[i, width + k] = of_loc[i, k], found[i - first, k]


def loc_and_scale(both: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """m and sqrt(exp(v) + eps) from (m, v), (..., 2 K) to (..., K) each."""
    width = both.shape[-1] // 2
    loc, scale = (both.new_empty(*both.shape[:-1], width) for _ in range(2))
    rows = _all_rows(both)
    given = rows, float32(eps), _all_rows(loc), _all_rows(scale)
    over_rows(_parted, len(rows), _n_threads(both.shape), *given)
    return loc, scale


def slopes_of_both(both: Tensor, scale: Tensor, of_loc: Tensor, of_scale: Tensor) -> Tensor:
    """Of (m, v), from those of :func:`loc_and_scale`."""
    found = torch.empty(both.shape, dtype=both.dtype)
    rows = [_all_rows(t) for t in (both, scale, of_loc, of_scale, found)]
    over_rows(_joined, len(rows[0]), _n_threads(both.shape), *rows)
    return found
