"""The network's step for MLX's CPU backend, of this package's own primitives.

The mathematics is that of `network`, with rows of tokens instead of sequences, so that a product of
two matrices is one call of the BLAS. What it computes in is float32.
"""

from __future__ import annotations

import mlx.core as mx

from . import _kernels
from .buffers import Buffer, View, write
from .config import OpenELMConfig
from .kernels import PACKED_BITS
from .network import Step, silu
from .quantization import Matrix, Scheme
from .weights import Layer, Weights


def multiplies(matrix: Matrix) -> bool:
    """Whether a matrix that is stored like this is multiplied faster than dequantized."""
    scheme = matrix.scheme
    if scheme is None:
        return True
    words = matrix.weight.shape[1]  # eight are taken at once
    return scheme.mode == "affine" and scheme.bits in PACKED_BITS and words % 8 == 0


def product(matrix: Matrix, x: mx.array, add: mx.array | None = None) -> mx.array:
    """`x` [rows, columns] → `x @ matrix.T`, or `add + x @ matrix.T`."""
    if matrix.scheme is None or not multiplies(matrix):
        return matrix(x) if add is None else matrix.add_to(add, x)
    assert matrix.scales is not None and matrix.biases is not None
    return _kernels.quantized_matmul(
        x, matrix.weight, matrix.scales, matrix.biases, matrix.scheme.bits, add
    )


def attention(
    config: OpenELMConfig,
    layer: Layer,
    x: mx.array,
    buffer: Buffer,
    view: View,
    turns: mx.array,
    scheme: Scheme | None = None,
    last: mx.array | None = None,
) -> tuple[mx.array, Buffer]:
    """What attention adds to `x` [B · L, model_dim] before its projection.

    Returns:
        [B · L, query_heads · head_dim], with `last` [1] only the token there of each sequence; and
        the buffer with the new keys and values.
    """
    kv_heads = buffer[0].shape[1] // 2
    queries, keys_values = _kernels.heads(
        product(layer.qkv_proj, x),
        layer.q_norm,
        layer.k_norm,
        turns,
        buffer[0].shape[0],
        layer.qkv_proj.weight.shape[0] // config.head_dim - 2 * kv_heads,
        kv_heads,
        config.rms_norm_eps,
    )
    buffer = write(buffer, keys_values, view.slot, scheme)
    mask = view.mask
    if last is not None:
        queries, mask = mx.take(queries, last, axis=2), mx.take(mask, last, axis=1)
    return _kernels.attention(queries, buffer, mask, scheme.bits if scheme else 32), buffer


def feed_forward(config: OpenELMConfig, layer: Layer, x: mx.array) -> mx.array:
    """`x` [rows, model_dim] → [rows, the layer's FFN width], before the last projection."""
    h = product(layer.proj_1, x)
    return _kernels.swiglu(h) if config.ffn_with_glu else silu(h)


def make_step(config: OpenELMConfig, weights: Weights, scheme: Scheme | None = None) -> Step:
    """As `network.make_step`."""
    eps = config.rms_norm_eps

    def step(
        tokens: mx.array, buffers: list[Buffer], view: View, last: mx.array | None = None
    ) -> tuple[mx.array, list[Buffer]]:
        B, L = tokens.shape
        x = weights.token_embeddings.take(tokens.reshape(-1), mx.float32)
        turns = _kernels.rope_turns(view.positions, config.head_dim, config.rope_freq_constant)
        new = []
        for layer, buffer in zip(weights.layers, buffers, strict=True):
            only = last if layer is weights.layers[-1] else None
            h = _kernels.rms_norm(x, layer.attn_norm, eps)
            h, buffer = attention(config, layer, h, buffer, view, turns, scheme, only)
            if only is not None:
                x = mx.take(x.reshape(B, L, -1), only, axis=1).reshape(B, -1)
            x = product(layer.out_proj, h, add=x)
            h = feed_forward(config, layer, _kernels.rms_norm(x, layer.ffn_norm, eps))
            x = product(layer.proj_2, h, add=x)
            new.append(buffer)
        logits = product(weights.lm_head, _kernels.rms_norm(x, weights.norm, eps))
        return logits.reshape(B, -1, logits.shape[-1]), new

    return step
