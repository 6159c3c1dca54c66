r"""Log probabilities of counts and their gradients in one pass, compiled by numba for the CPU.

The formulas are those of :mod:`pyro_scanvi.model.distributions`, which says why they are written
so, in float32. Each of its some hundred operations reads and writes all counts of a minibatch; here
they stay in registers. A row is gone through twice: as if all of its counts were zero, which most
are, and then its other counts, gathered so that they fill registers too.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy import float32
from torch import Tensor

from pyro_scanvi.model.elementary import HALF, INFINITE, ONE, ZERO, exp, log
from pyro_scanvi.model.kernels import compiled, inlined, over_rows, rows_of

# Numbers without a type are float64 to numba, and would halve what fits into a register.
TWO, STEPS = float32(2), float32(3)
HALF_LOG_2PI = float32(0.5 * math.log(2 * math.pi))
LARGEST = float32(math.sqrt(np.finfo(float32).max))
NEAR, NEAR_LOG, NEAR_ZERO = float32(0.1), float32(0.08), float32(0.01)  # where series are taken
OF_STIRLING = tuple(float32(c) for c in (-1 / 1188, 1 / 1680, -1 / 1260, 1 / 360, -1 / 12))
OF_DEVIANCE = tuple(float32(1 / c) for c in (13, 11, 9, 7, 5, 3))
OF_LOG_MINUS = tuple(
    float32(c) for c in (1 / 9, -1 / 8, 1 / 7, -1 / 6, 1 / 5, -1 / 4, 1 / 3, -1 / 2)
)
OF_DIGAMMA = tuple(float32(1 / c) for c in (12, 120, 252, 240))
OF_ZEROS = tuple(float32(-1 / c) for c in (4, 3, 2))

WORTH_A_THREAD = 1 << 15  # counts, as of torch's own operations


@inlined
def _finite(x):
    """Where products of it are finite; NaN stays."""
    return LARGEST if x > LARGEST else x


@inlined
def _log1p(u):
    """log(1 + u), u >= -1/2, with the digits of u that 1 + u has lost."""
    w = ONE + u
    return log(w) + (u - (w - ONE)) / w if w < INFINITE else w


@inlined
def _stirling_error(z):
    below = ONE if z < STEPS else ZERO
    small = min(z, STEPS)
    w = ONE / (z + STEPS * below)
    c0, c1, c2, c3, c4 = OF_STIRLING
    w2 = w * w
    series = -w * ((((c0 * w2 + c1) * w2 + c2) * w2 + c3) * w2 + c4)
    top = small + STEPS
    ratio = top / (small + ONE) * (top / (small + TWO))
    back = (small + HALF) * _log1p(STEPS / small) + log(ratio) - STEPS
    return series + below * back


@inlined
def _deviance(x, expected, difference):
    v = difference / (x + expected)
    s = min(max(v, -NEAR), NEAR)
    c0, c1, c2, c3, c4, c5 = OF_DEVIANCE
    s2 = s * s
    tail = s * s2 * (((((c0 * s2 + c1) * s2 + c2) * s2 + c3) * s2 + c4) * s2 + c5)
    series = difference * s + TWO * x * tail
    return series if abs(v) < NEAR else x * log(x / expected) - difference


@inlined
def _digamma_excess(x, theta):
    below = ONE if theta < STEPS else ZERO
    small = min(theta, STEPS)
    large = theta + STEPS * below
    a, b = ONE / large, ONE / (x + large)
    a2, b2 = a * a, b * b
    c12, c120, c252, c240 = OF_DIGAMMA
    squares = c12 - (a2 + b2) * c120 + (a2 * a2 + a2 * b2 + b2 * b2) * c252
    squares = squares - (a2 + b2) * (a2 * a2 + b2 * b2) * c240
    total = x + small
    back = log(small / (small + STEPS) * ((total + STEPS) / total))
    back += x / (small * total)
    back += x / ((small + ONE) * (total + ONE))
    back += x / ((small + TWO) * (total + TWO))
    return x * a * b * (HALF + (a + b) * squares) + below * back


@inlined
def _log_minus(ratio, t):
    s = min(max(t, -NEAR_LOG), NEAR_LOG)
    c0, c1, c2, c3, c4, c5, c6, c7 = OF_LOG_MINUS
    series = ((((((c0 * s + c1) * s + c2) * s + c3) * s + c4) * s + c5) * s + c6) * s + c7
    series = series * s * s
    return series if abs(t) < NEAR_LOG else log(ratio) - t


@inlined
def _at_zero(mean, theta):
    """log NB(0) and its slopes by mean and theta."""
    u, rest = mean / theta, theta / (theta + mean)
    logarithm, share = _log1p(u), u * rest
    s = min(share, NEAR_ZERO)
    c0, c1, c2 = OF_ZEROS
    series = ((c0 * s + c1) * s + c2) * s * s
    by_theta = series if share < NEAR_ZERO else share - logarithm
    return -theta * logarithm, -rest, by_theta


@inlined
def _at_count(x, mean, theta):
    """log NB(x) of x > 0 and its slopes by mean and theta."""
    total, sum_ = x + theta, theta + mean
    ratio, t = total / sum_, (x - mean) / sum_
    deviance = _deviance(x, mean * ratio, theta * t)
    deviance += _deviance(theta, theta * ratio, -theta * t)
    stirling = _stirling_error(total) - _stirling_error(theta) - _stirling_error(x)
    value = stirling - deviance - HALF * log(x * (total / theta)) - HALF_LOG_2PI
    by_theta = _digamma_excess(x, theta) + _log_minus(ratio, t)
    return value, t * (theta / mean), by_theta


@inlined
def _gated(is_count, base, gate):
    """log p(x) from log NB(x) and the logits of the gate, and its slopes by the two."""
    h = _finite(gate)
    of_base, of_gate = exp(-abs(h - base)), exp(-abs(h))
    by_base, by_gate = ONE / (ONE + of_base), ONE / (ONE + of_gate)
    shut = by_gate if h > ZERO else of_gate * by_gate
    logarithm = _log1p(of_gate if is_count else (of_base - of_gate) * by_gate)
    at_count = base - max(gate, ZERO) - logarithm
    at_zero = max(base, min(h, ZERO)) + logarithm
    structural = by_base if h > base else of_base * by_base
    kept = of_base * by_base if h > base else by_base
    if is_count:
        return at_count, ONE, -shut
    return at_zero, kept, structural - shut


@inlined
def _positive(x, row, columns):
    """Columns of a row where x > 0, into `columns`; their number."""
    n = 0
    for g in range(x.shape[1]):
        if x[row, g] > ZERO:
            columns[n] = g
            n += 1
    return n


@compiled
def _negative_binomial(start, stop, x, mean, theta, value, by_mean, by_theta):
    """Fill the last three for these rows; an argument of fewer rows comes again and again."""
    n_genes = x.shape[1]
    columns = np.empty(n_genes, np.int64)
    at, told = np.empty((3, n_genes), np.float32), np.empty((3, n_genes), np.float32)
    for i in range(start, stop):
        ix, im, it = i % x.shape[0], i % mean.shape[0], i % theta.shape[0]
        for g in range(n_genes):
            told_zero = _at_zero(mean[im, g], _finite(theta[it, g]))
            value[i, g], by_mean[i, g], by_theta[i, g] = told_zero
        n = _positive(x, ix, columns)
        for j in range(n):
            g = columns[j]
            at[0, j], at[1, j], at[2, j] = x[ix, g], mean[im, g], _finite(theta[it, g])
        for j in range(n):
            told[0, j], told[1, j], told[2, j] = _at_count(at[0, j], at[1, j], at[2, j])
        for j in range(n):
            g = columns[j]
            value[i, g], by_mean[i, g], by_theta[i, g] = told[0, j], told[1, j], told[2, j]


@compiled
def _zero_inflated(start, stop, x, mean, theta, gate, value, by_mean, by_theta, by_gate):
    """The same behind a gate, row by row, while the row is at hand."""
    for i in range(start, stop):
        _negative_binomial(i, i + 1, x, mean, theta, value, by_mean, by_theta)
        ix, ih = i % x.shape[0], i % gate.shape[0]
        for g in range(x.shape[1]):
            is_count = x[ix, g] > ZERO
            value[i, g], kept, by_gate[i, g] = _gated(is_count, value[i, g], gate[ih, g])
            by_mean[i, g] *= kept
            by_theta[i, g] *= kept


def negative_binomial(x: Tensor, mean: Tensor, theta: Tensor) -> list[Tensor]:
    """log NB(x | mean, theta), and its slopes by mean and theta, of equal shapes."""
    return _filled(_negative_binomial, x, mean, theta)


def zero_inflated(x: Tensor, mean: Tensor, theta: Tensor, gate_logits: Tensor) -> list[Tensor]:
    """The same of the zero-inflated one, and the slope by the logits of its gate."""
    return _filled(_zero_inflated, x, mean, theta, gate_logits)


def _filled(kernel: Callable, *arguments: Tensor) -> list[Tensor]:
    """What a kernel fills, a tensor for each argument, by as many threads as torch has."""
    shape = arguments[0].shape
    rows = [rows_of(t) for t in arguments]
    n_rows = shape[:-1].numel()
    filled = [torch.empty(shape, dtype=torch.float32) for _ in arguments]
    results = [t.reshape(n_rows, -1).numpy() for t in filled]
    over_rows(kernel, n_rows, -(-shape.numel() // WORTH_A_THREAD), *rows, *results)
    return filled
