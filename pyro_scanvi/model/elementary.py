"""Logarithm and exponential of float32 for the kernels, as polynomials.

Moshier's Cephes library, ``logf`` and ``expf``: calls of the C library would stand in the way of
vector instructions. They are right to 1.3e-7, and pass on what is not finite.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy import float32, int32

from pyro_scanvi.model.kernels import inlined

# Numbers without a type are float64 to numba, and would halve what fits into a register.
ZERO, HALF, ONE = float32(0), float32(0.5), float32(1)
INFINITE, NOT_A_NUMBER = float32(np.inf), float32(np.nan)
ROOT_HALF, MANTISSA, MANTISSA_BITS, BIAS = int32(0x3F3504F3), int32(0x7FFFFF), int32(23), int32(127)
LOG2_E, LOG_2_HIGH, LOG_2_LOW = float32(1.44269504), float32(0.693359375), float32(-2.1219444e-4)
SMALLEST_EXPONENT, LARGEST_EXPONENT = float32(-87), float32(88)
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
def log(x):
    """log(x), with NaN below 0."""
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
def exp(x):
    """exp(x)."""
    steps = int32(x * LOG2_E + (HALF if x > ZERO else -HALF))
    n = float32(steps)
    rest = x - n * LOG_2_HIGH - n * LOG_2_LOW
    c0, c1, c2, c3, c4, c5 = OF_EXP
    square = ((((c0 * rest + c1) * rest + c2) * rest + c3) * rest + c4) * rest + c5
    value = square * rest * rest + rest + ONE
    value = value * _of_bits(int32((steps + BIAS) << MANTISSA_BITS))
    value = INFINITE if x > LARGEST_EXPONENT else value
    return ZERO if x <= SMALLEST_EXPONENT else value
