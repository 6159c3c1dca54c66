r"""Log probabilities of counts and their gradients in one pass, compiled by numba for the CPU.

The formulas are those of :mod:`pyro_scanvi.model.distributions`, which says why they are written
so, in float32. Each of its some hundred operations reads and writes all counts of a minibatch; here
they stay in registers. A row is gone through twice: as if all of its counts were zero, which most
are, and then its other counts, gathered so that they fill registers too.

Logarithm and exponential are polynomials (Moshier's Cephes library, ``logf`` and ``expf``) because
calls of the C library stand in the way of vector instructions. They are right to 1.3e-7, and pass
on what is not finite.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy import float32, int32
from torch import Tensor

from pyro_scanvi.model.kernels import compiled, inlined, over_rows

# Numbers without a type are float64 to numba, and would halve what fits into a register.
ZERO, HALF, ONE, TWO, STEPS = (float32(c) for c in (0, 0.5, 1, 2, 3))
HALF_LOG_2PI = float32(0.5 * math.log(2 * math.pi))
INFINITE, NOT_A_NUMBER = float32(np.inf), float32(np.nan)
LARGEST = float32(math.sqrt(np.finfo(float32).max))
NEAR, NEAR_LOG, NEAR_ZERO = float32(0.1), float32(0.08), float32(0.01)  # where series are taken
ROOT_HALF, MANTISSA, MANTISSA_BITS, BIAS = int32(0x3F3504F3), int32(0x7FFFFF), int32(23), int32(127)
LOG2_E, LOG_2_HIGH, LOG_2_LOW = float32(1.44269504), float32(0.693359375), float32(-2.1219444e-4)
SMALLEST_EXPONENT = float32(-87)
OF_LOG = tuple(
    float32(c)
    for c in (
        *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    )
)
OF_EXP = tuple(
    float32(c)
    for c in (
        *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
        *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    )
)
OF_STIRLING = tuple(float32(c) for c in (-1 / 1188, 1 / 1680, -1 / 1260, 1 / 360, -1 / 12))
OF_DEVIANCE = tuple(float32(1 / c) for c in (13, 11, 9, 7, 5, 3))
OF_LOG_MINUS = tuple(
    float32(c) for c in (1 / 9, -1 / 8, 1 / 7, -1 / 6, 1 / 5, -1 / 4, 1 / 3, -1 / 2)
)
OF_DIGAMMA = tuple(float32(1 / c) for c in (12, 120, 252, 240))
OF_ZEROS = tuple(float32(-1 / c) for c in (4, 3, 2))

WORTH_A_THREAD = 1 << 15  # counts, as of torch's own operations


reinterpreted: Callable[[Callable], Any] = intrinsic


@reinterpreted
def _bits(typing_context, x):
    """A float32 as the int32 of the same bits."""
    return types.int32(types.float32), lambda context, builder, signature, values: builder.bitcast(
        values[0], ir.IntType(32)
    )


@reinterpreted
def _of_bits(typing_context, bits):
    """An int32 as the float32 of the same bits."""
    return types.float32(types.int32), lambda context, builder, signature, values: builder.bitcast(
        values[0], ir.FloatType()
    )


@inlined
def _finite(x):
    """Where products of it are finite; NaN stays."""
    return LARGEST if x > LARGEST else x


@inlined
def _log(x):
    bits = int32(_bits(x) - ROOT_HALF)
    exponent = float32(bits >> MANTISSA_BITS)
    y = _of_bits(int32((bits & MANTISSA) + ROOT_HALF)) - ONE
    c0, c1, c2, c3, c4, c5, c6, c7, c8 = OF_LOG
    cubic = (((((((c0 * y + c1) * y + c2) * y + c3) * y + c4) * y + c5) * y + c6) * y + c7) * y + c8
    tail = cubic * y * (y * y) + LOG_2_LOW * exponent - HALF * (y * y)
    value = y + tail + LOG_2_HIGH * exponent
    beyond = x if x > ZERO else (-INFINITE if x == ZERO else NOT_A_NUMBER)
    return value if ZERO < x < INFINITE else beyond


@inlined
def _log1p(u):
    """log(1 + u), u >= -1/2, with the digits of u that 1 + u has lost."""
    w = ONE + u
    return _log(w) + (u - (w - ONE)) / w if w < INFINITE else w


@inlined
def _exp(x):
    """exp(x), x <= 0."""
    steps = int32(x * LOG2_E - HALF)
    n = float32(steps)
    rest = x - n * LOG_2_HIGH - n * LOG_2_LOW
    c0, c1, c2, c3, c4, c5 = OF_EXP
    square = ((((c0 * rest + c1) * rest + c2) * rest + c3) * rest + c4) * rest + c5
    value = square * rest * rest + rest + ONE
    value = value * _of_bits(int32((steps + BIAS) << MANTISSA_BITS))
    return ZERO if x <= SMALLEST_EXPONENT else value


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
    back = (small + HALF) * _log1p(STEPS / small) + _log(ratio) - STEPS
    return series + below * back


@inlined
def _deviance(x, expected, difference):
    v = difference / (x + expected)
    s = min(max(v, -NEAR), NEAR)
    c0, c1, c2, c3, c4, c5 = OF_DEVIANCE
    s2 = s * s
    tail = s * s2 * (((((c0 * s2 + c1) * s2 + c2) * s2 + c3) * s2 + c4) * s2 + c5)
    series = difference * s + TWO * x * tail
    return series if abs(v) < NEAR else x * _log(x / expected) - difference


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
    back = _log(small / (small + STEPS) * ((total + STEPS) / total))
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
    return series if abs(t) < NEAR_LOG else _log(ratio) - t


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
    value = stirling - deviance - HALF * _log(x * (total / theta)) - HALF_LOG_2PI
    by_theta = _digamma_excess(x, theta) + _log_minus(ratio, t)
    return value, t * (theta / mean), by_theta


@inlined
def _gated(is_count, base, gate):
    """log p(x) from log NB(x) and the logits of the gate, and its slopes by the two."""
    h = _finite(gate)
    of_base, of_gate = _exp(-abs(h - base)), _exp(-abs(h))
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
    rows = [_rows(t.detach()) for t in arguments]
    n_rows = shape[:-1].numel()
    filled = [torch.empty(shape, dtype=torch.float32) for _ in arguments]
    results = [t.reshape(n_rows, -1).numpy() for t in filled]
    over_rows(kernel, n_rows, -(-shape.numel() // WORTH_A_THREAD), *rows, *results)
    return filled


def _rows(t: Tensor) -> np.ndarray:
    """As rows of genes, without the copies that expanding it has made of all of them."""
    while t.dim() > 1 and t.stride(0) == 0:
        t = t[0]
    return t.reshape(-1, t.shape[-1] if t.dim() else 1).contiguous().numpy()
