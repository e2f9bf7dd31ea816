"""The network's operations on a CPU, one graph primitive each (cpu/primitives.cpp).

All arrays are row-contiguous, and float32 where nothing else is said. Shapes and dtypes that don't
fit raise `ValueError`, as does a default device that isn't a CPU.
"""

from collections.abc import Sequence

import mlx.core as mx

MLX_VERSION: str
"""The version of MLX they were compiled for."""

def quantized_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    add: mx.array | None = None,
) -> mx.array:
    """`x` · Wᵀ, where W is what `mx.quantize` makes in affine mode; in float32 arithmetic.

    Args:
        x: [R, columns].
        weight: [rows, columns · bits / 32] uint32; columns must be a multiple of 256 / bits.
        scales, biases: [rows, columns / group]; a group is 128 / bits or a multiple of 256 / bits.
        bits: 4 or 8.
        add: [R, rows], what the product is added to.

    Returns:
        [R, rows].
    """

def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMSNorm (arXiv 1910.07467, equation 4) over the last axis: `x` [..., n], `weight` [n]."""

def swiglu(x: mx.array) -> mx.array:
    """`x` [..., 2n], gates and then values → gate · sigmoid(gate) · value, [..., n]."""

def rope_turns(positions: mx.array, dim: int, base: float) -> mx.array:
    """Cosines, then sines, of RoPE's angles (arXiv 2104.09864, equation 15).

    `positions` [B, L] int32 → [B, L, dim]; computed in float64.
    """

def heads(
    x: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    turns: mx.array,
    batch: int,
    query_heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """Queries, keys and values out of their projection.

    Args:
        x: [B · L, (query_heads + 2 · kv_heads) · dim], query heads first, value heads last.
        q_norm, k_norm: [dim], the weights of each head's RMSNorm; without both there is none.
        turns: [B or 1, L, dim], by `rope_turns`.
        batch: B.

    Returns:
        Queries [B, query_heads, L, dim], normed, rotated and times dim^-1/2; keys, normed and
        rotated, and after them values, as they are, [B, 2 · kv_heads, L, dim].
    """

def attention(
    queries: mx.array, buffer: Sequence[mx.array], mask: mx.array, bits: int = 32
) -> mx.array:
    """softmax(queries · keysᵀ) · values, where the mask allows it.

    Args:
        queries: [B, query_heads, L, dim], with the scale of attention in them.
        buffer: keys and values, [B, 2 · kv_heads, slots, dim]; or values, scales and biases of
            that, as `mx.quantize` gives them, in groups of a multiple of 8.
        mask: [B or 1, L, slots] bool; a token that may attend to nothing gets zeros.
        bits: of quantized values, 4 or 8.

    Returns:
        [B · L, query_heads · dim].
    """
