"""e^x and what is made of it, in arithmetic that a compiler turns into vector instructions.

MLX's CPU backend calls a function for every value's exponential, which on x86 takes half of a
prompt's time. `mx.compile` fuses what is written here into kernels of additions and products, 7 to
14 times as fast for each value, and exacter. They are a few kernels instead of one, so for few
values MLX's operation is the faster one.
"""

from __future__ import annotations

import math

import mlx.core as mx

MANY = 3000  # values, from which on this is faster (docs/performance.md)

_LN2_HIGH = 0.693145751953125  # so few digits that a product with an integer below 128 is exact
_LN2_LOW = math.log(2) - _LN2_HIGH
# Added to a float32 it leaves the nearest integer in the low bits, and 127, the exponent of 1
_ROUND = 1.5 * 2**23 + 127
_NO_EXPONENT = 0x4B400000  # the bits of _ROUND - 127
# (e^f - 1 - f) / f² for |f| up to ln 2 / 2: the polynomial with the least relative error in e^f
_POLYNOMIAL = (0.49999231, 0.16667114, 0.041890159, 0.0083125215)


def exp(x: mx.array) -> mx.array:
    """e^x for float32 `x` of any shape, -1e9 to 0; below -87 it is 0. The relative error is 3e-7.

    x = n ln 2 + f; e^x = 2^n e^f, and 2^n is n + 127 in the bits of an exponent (W. Cody and
    W. Waite, Software Manual for the Elementary Functions, 1980).
    """
    rounded = x * (1 / math.log(2)) + _ROUND
    n = rounded - _ROUND
    f = (x - n * _LN2_HIGH) - n * _LN2_LOW
    bits = mx.maximum(mx.view(rounded, mx.int32), _NO_EXPONENT)
    power = mx.view(mx.left_shift(bits, 23), mx.float32)
    a, b, c, d = _POLYNOMIAL
    # Not by Horner's rule: at most eleven operations deep, so that it is one kernel
    square = f * f
    return ((1.0 + f) + square * ((a + f * b) + square * (c + f * d))) * power


def apart(x: mx.array) -> mx.array:
    """`x`, where fusing ends: otherwise each kernel that uses it would compute it again."""
    return mx.view(mx.view(x, mx.int32), x.dtype)


def silu(x: mx.array) -> mx.array:
    """x · sigmoid(x), which is (max(x, 0) + min(x, 0) e^-|x|) / (1 + e^-|x|)."""
    if x.size < MANY:
        return x * mx.sigmoid(x)
    below = -mx.abs(x)
    e = apart(exp(below))
    return ((x - below) + e * (x + below)) * 0.5 / (1 + e)


def softmax_product(scores: mx.array, values: mx.array) -> mx.array:
    """softmax(`scores` [..., n]) @ `values` [..., n, dim]."""
    if scores.size < MANY:
        return mx.softmax(scores, axis=-1) @ values
    e = exp(apart(scores - mx.max(scores, axis=-1, keepdims=True)))
    return (e @ values) / mx.sum(e, axis=-1, keepdims=True)
