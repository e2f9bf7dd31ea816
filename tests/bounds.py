"""How far logits may be from the float64 reference.

In float32 the largest difference is below `FLOAT32`, for logits of the order of 1 to 10.

In half precision the bound is derived, and on the root mean square of the differences relative to
that of the logits. Each operation rounds its result to p significant bits (11 in float16, 8 in
bfloat16; products accumulate in float32). Such an error is uniform within half a unit in the last
place, which is at most u = 2^-p of the value: its root mean square is at most u / √3 of it. Errors
are independent, so that n of them add up to √n. A layer has

    attention    norm, qkv_proj, q_norm and k_norm, RoPE, scores, softmax, values, out_proj, sum: 9
    the FFN      norm, proj_1, sigmoid, its product with x, with the other half, proj_2, sum: 7

roundings one after the other, and two come after the last layer: the norm and the logits. What an
error is relative to the value stays as it is in a product with a matrix, and norms take a layer's
input to the same size. But two factors of a product may both have the error of the layer's input:
the two halves of the gate, the softmax and the values. Theirs add up, hence `GAIN`.

Of the configurations in `models.CONFIGS` the largest difference found is 0.62 of the bound, of the
demo 0.08. A wrong epsilon, a wrong RoPE base or a wrong mask are off by 10 % and more.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

FLOAT32 = 1e-4
SIGNIFICANT_BITS = {mx.float16: 11, mx.bfloat16: 8}
PER_LAYER, AT_THE_END, GAIN = 16, 2, 2


def rounding(dtype: mx.Dtype) -> float:
    """u: half a unit in the last place of 1, the most that rounding a value changes it by."""
    return 2.0 ** -SIGNIFICANT_BITS.get(dtype, 24)


def relative(dtype: mx.Dtype, layers: int) -> float:
    """The bound in half precision."""
    return GAIN * rounding(dtype) * math.sqrt((PER_LAYER * layers + AT_THE_END) / 3)


def numbers(array: mx.array) -> np.ndarray:
    """As float64; NumPy has no bfloat16."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return math.sqrt(np.square(values).mean())


def assert_alike(a: np.ndarray, b: np.ndarray, size: float, dtype: mx.Dtype, layers: int) -> None:
    """Two ways to compute the same, in `dtype`, of values whose root mean square is `size`.

    Each may be off by the bound, and a logarithm of a probability by that of its logit and of the
    logits' logarithm of sums.
    """
    if dtype == mx.float32:
        assert np.abs(a - b).max() < 4 * FLOAT32
    else:
        assert rms(a - b) < 4 * relative(dtype, layers) * size


def assert_near(logits: mx.array, wanted: np.ndarray, layers: int) -> None:
    """`logits` are `wanted` within the bound of the dtype that they were computed in."""
    difference = numbers(logits) - wanted
    if logits.dtype == mx.float32:
        assert np.abs(difference).max() < FLOAT32
    else:
        assert rms(difference) < relative(logits.dtype, layers) * rms(wanted)
