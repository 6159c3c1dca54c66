r"""Batch norm by the rows at hand, ReLU and dropout in one pass, compiled by numba for the CPU.

.. math::
    h_{nc} = \max\left(w_c \frac{x_{nc} - m_c}{\sqrt{v_c + \epsilon}} + b_c,\ 0\right)
    \frac{k_{nc}}{1 - p}

with mean m and variance v of the column, and k Bernoulli(1 - p). By torch each of some ten
operations goes through memory; with many labels, each of which is a row of each cell, they are most
of a step. Here rows are read twice forward and twice backward. Sums over rows are of float64.

The random numbers of dropout are SplitMix64 (Steele, Lea and Flood 2014, OOPSLA) of a seed that
torch's generator draws; each serves four units with 15 bits.
"""

import numpy as np
import torch
from numpy import float32, float64, int64, uint64
from torch import Tensor

from pyro_scanvi.model.kernels import compiled, inlined, over_rows

STEPS = 1 << 15  # of the probability of staying
UNITS = 4  # of a random number
WORTH_A_THREAD = 1 << 19  # units; they take a hundredth of the time of a count

ZERO, LANE_BITS, LANE = float32(0), uint64(16), uint64(STEPS - 1)
GOLDEN, FIRST, SECOND = (
    uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
BY_30, BY_27, BY_31, BY_1 = uint64(30), uint64(27), uint64(31), uint64(1)


@inlined
def _mixed(state):
    """SplitMix64's number of a state."""
    state = (state ^ (state >> BY_30)) * FIRST
    state = (state ^ (state >> BY_27)) * SECOND
    return state ^ (state >> BY_31)


@inlined
def _draw(row, seed, bound, words, factors):
    """Fill `factors` of a row, four units to a word: those that stay by their share, or 0."""
    n_words, kept = uint64(len(words)), float32(STEPS / bound)
    for j in range(len(words)):
        words[j] = _mixed(uint64(seed) + (uint64(row) * n_words + uint64(j)) * GOLDEN)
    for k in range(UNITS):
        low = uint64(k) * LANE_BITS + BY_1
        for j in range(len(words)):
            factors[k, j] = kept if int64((words[j] >> low) & LANE) < bound else ZERO


@compiled
def _moments(start, stop, x, added, each):
    """Sums of each column of rows of x + added, and of their squares."""
    sums = np.zeros((2, x.shape[1]))
    for i in range(start, stop):
        ix, ia = i % len(x), i // each % len(added)
        for c in range(x.shape[1]):
            unit = float64(x[ix, c] + added[ia, c])
            sums[0, c] += unit
            sums[1, c] += unit * unit
    return sums


@compiled
def _columns(sums, n, weight, bias, eps):
    """Mean, variance, and by what units are multiplied and shifted, each of the columns."""
    columns = np.empty((4, len(weight)), np.float32)
    for c in range(len(weight)):
        mean = sums[0, c] / n
        variance = sums[1, c] / n - mean * mean
        variance = 0.0 if variance < 0.0 else variance
        scale = weight[c] / np.sqrt(variance + eps)
        columns[0, c], columns[1, c] = mean, variance
        columns[2, c], columns[3, c] = scale, bias[c] - scale * mean
    return columns


@compiled
def _activated(start, stop, x, added, each, scale, shift, bound, seed, result):
    """Fill the last."""
    words = np.empty((x.shape[1] + UNITS - 1) // UNITS, np.uint64)
    factors = np.ones((UNITS, len(words)), np.float32)
    flat = factors.reshape(-1)
    for i in range(start, stop):
        ix, ia = i % len(x), i // each % len(added)
        if bound < STEPS:
            _draw(i, seed, bound, words, factors)
        for c in range(x.shape[1]):
            unit = (x[ix, c] + added[ia, c]) * scale[c] + shift[c]
            result[i, c] = (ZERO if unit < ZERO else unit) * flat[c]  # NaN stays


@compiled
def _slope_sums(start, stop, slope, x, added, each, result, mean):
    """Sums of each column of the slopes that pass, and of their products with x + added - mean.

    The slope of a unit that ReLU or dropout has stopped, which is 0, does not pass.
    """
    sums = np.zeros((2, x.shape[1]))
    for i in range(start, stop):
        ix, ia = i % len(x), i // each % len(added)
        for c in range(x.shape[1]):
            passed = ZERO if result[i, c] <= ZERO else slope[i, c]
            sums[0, c] += float64(passed)
            sums[1, c] += float64(passed * (x[ix, c] + added[ia, c] - mean[c]))
    return sums


@compiled
def _slope_columns(sums, n, weight, variance, eps, bound):
    """Slopes of weight and bias, and by what slopes and units are multiplied and shifted."""
    columns = np.empty((5, len(weight)), np.float32)
    kept = STEPS / bound
    for c in range(len(weight)):
        rate = 1 / np.sqrt(float64(variance[c]) + eps)
        of_bias, of_weight, scale = kept * sums[0, c], kept * sums[1, c] * rate, weight[c] * rate
        columns[0, c], columns[1, c], columns[2, c] = of_weight, of_bias, kept * scale
        columns[3, c], columns[4, c] = -scale * rate * of_weight / n, -scale * of_bias / n
    return columns


@compiled
def _slopes(start, stop, slope, x, added, each, result, mean, by_slope, by_x, constant, found):
    """Slopes of `x`, in `found` where each of its rows comes once, and of `added`."""
    once = len(x) == len(result)
    of_x, of_added = found if once else np.zeros_like(x), np.zeros_like(added)
    for i in range(start, stop):
        ix, ia = i % len(x), i // each % len(added)
        for c in range(x.shape[1]):
            passed = ZERO if result[i, c] <= ZERO else slope[i, c]
            centred = x[ix, c] + added[ia, c] - mean[c]
            told = by_slope[c] * passed + centred * by_x[c] + constant[c]
            of_x[ix, c] = told if once else of_x[ix, c] + told
            of_added[ia, c] += told
    return of_x, of_added


def joined(x: Tensor, added: Tensor) -> torch.Size | None:
    """Shape of x + added, (..., N, C), where rows of each come again and again in it; or None.

    Those of `x` are all of them, or N cells; those of `added` N cells, one for each label,
    or one.
    """
    if x.dim() == 1:
        return None
    n, width = x.shape[-2:]
    if added.shape == (n, width) or added.numel() == width:
        return x.shape
    labels = added.shape[:-2]
    by_label = added.shape == (*labels, 1, width) and x.shape[:-2] in (labels, ())
    return torch.Size((*labels, n, width)) if by_label else None


def activated(
    x: Tensor,
    added: Tensor,
    shape: torch.Size,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    bound: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The units of x + added, of that shape, of which bound / STEPS stay; moments of the columns.

    `x` and `added` are :func:`joined`. The moments are mean and variance of x + added.
    """
    rows, of_columns = _rows(x, added, shape), _numbers(weight, bias)
    n, n_threads = shape[:-1].numel(), _n_threads(shape)
    sums = sum(over_rows(_moments, n, n_threads, *rows))
    mean, variance, scale, shift = _columns(sums, n, *of_columns, eps)
    seed = torch.empty((), dtype=torch.int64).random_().item() if bound < STEPS else 0
    result = torch.empty(shape, dtype=torch.float32)
    how = scale, shift, bound, seed, result.numpy().reshape(n, -1)
    over_rows(_activated, n, n_threads, *rows, *how)
    return result, torch.from_numpy(mean), torch.from_numpy(variance)


def slopes(
    slope: Tensor,
    x: Tensor,
    added: Tensor,
    result: Tensor,
    weight: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    bound: int,
) -> list[Tensor]:
    """Of `x`, `added`, weight and bias, from those of the `result` of :func:`activated`."""
    n, n_threads = result.shape[:-1].numel(), _n_threads(result.shape)
    of_rows, rows = _numbers(slope, result), _rows(x, added, result.shape)
    slope_rows, result_rows = (t.reshape(n, -1) for t in of_rows)
    weights, means, variances = _numbers(weight, mean, variance)
    given = slope_rows, *rows, result_rows, means
    sums = sum(over_rows(_slope_sums, n, n_threads, *given))
    columns = _slope_columns(sums, n, weights, variances, eps, bound)
    found = np.empty_like(rows[0])
    parts = over_rows(_slopes, n, n_threads, *given, *columns[2:], found)
    of_x = found if len(found) == n else sum(part[0] for part in parts)
    told = of_x.reshape(x.shape), sum(part[1] for part in parts).reshape(added.shape), *columns[:2]
    return [torch.from_numpy(t) for t in told]


def _rows(x: Tensor, added: Tensor, shape: torch.Size) -> tuple[np.ndarray, np.ndarray, int]:
    """The two as rows, and how many rows of the sum, one after another, share one of `added`."""
    each = shape[-2] if added.shape[-2] == 1 else 1
    rows, others = _numbers(*(t.reshape(-1, shape[-1]) for t in (x, added)))
    return rows, others, each


def _n_threads(shape: torch.Size) -> int:
    return -(-shape.numel() // WORTH_A_THREAD)


def _numbers(*tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().contiguous().numpy() for t in tensors]
