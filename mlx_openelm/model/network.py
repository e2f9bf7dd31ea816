"""The network, and only the network.

OpenELM (arXiv 2404.14619, section 2), as published in CoreNet's `general_gpt.py`: pre-norm
decoder layers, each with its own number of heads and its own FFN width; RMSNorm on queries and
keys, rotary positions, grouped-query attention, a gated FFN, tied embeddings.

It is written with MLX's fast kernels. On a CPU, where MLX has none, `backends.cpu` computes the
same step.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..config import OpenELMConfig
from .buffers import Buffer, View, read, write
from .quantization import Matrix, Scheme
from .weights import Layer, Weights


def attention(
    config: OpenELMConfig,
    layer: Layer,
    x: mx.array,
    buffer: Buffer,
    view: View,
    scheme: Scheme | None = None,
    last: mx.array | None = None,
) -> tuple[mx.array, Buffer]:
    """`x` [B, L, model_dim] → ([B, L, model_dim], the buffer with the new keys and values).

    With `last` [1] only the token there attends, and L becomes 1 in what is returned.
    """
    B, L, _ = x.shape
    kv_heads, head_dim = buffer[0].shape[1] // 2, config.head_dim
    qkv = layer.qkv_proj(x).reshape(B, L, -1, head_dim).transpose(0, 2, 1, 3)
    q, k, v = mx.split(qkv, (-2 * kv_heads, -kv_heads), axis=1)
    if layer.q_norm is not None:
        q = mx.fast.rms_norm(q, layer.q_norm, config.rms_norm_eps)
        k = mx.fast.rms_norm(k, layer.k_norm, config.rms_norm_eps)
    # One for each row: of a single offset, Metal and CUDA read beyond it or leave rows out.
    offsets = mx.broadcast_to(view.positions[:, 0], (B,))
    q, k = (_rotate(heads, config, offsets) for heads in (q, k))
    buffer = write(buffer, mx.concatenate([k, v], axis=1), view.slot, scheme)
    keys, values = read(buffer, scheme, x.dtype)
    mask = view.mask[:, None]
    if last is not None:
        q, mask = mx.take(q, last, axis=2), mx.take(mask, last, axis=2)
    y = mx.fast.scaled_dot_product_attention(q, keys, values, scale=head_dim**-0.5, mask=mask)
    return layer.out_proj(y.transpose(0, 2, 1, 3).reshape(B, q.shape[2], -1)), buffer


def _rotate(heads: mx.array, config: OpenELMConfig, offsets: mx.array) -> mx.array:
    return mx.fast.rope(
        heads,
        config.head_dim,
        traditional=False,
        base=config.rope_freq_constant,
        scale=1.0,
        offset=offsets,
    )


def multiplies(matrix: Matrix) -> bool:
    """Whether a matrix that is stored like this is multiplied faster than dequantized, on a CPU."""
    return matrix.scheme is None


def feed_forward(config: OpenELMConfig, layer: Layer, x: mx.array) -> mx.array:
    """`x` [..., model_dim] → the same shape."""
    h = layer.proj_1(x)
    if not config.ffn_with_glu:
        return layer.proj_2(silu(h))
    gate, up = mx.split(h, 2, axis=-1)
    return layer.proj_2(silu(gate) * up)


def silu(x: mx.array) -> mx.array:
    """x · sigmoid(x)."""
    return x * mx.sigmoid(x)


Step = Callable[[mx.array, list[Buffer], View, mx.array | None], tuple[mx.array, list[Buffer]]]
"""(tokens [B, L] int32, cache buffers, view, last) → (logits [B, L, vocab_size], the new buffers).
`last` [1]: the index of the only token that is wanted, and L becomes 1; the other tokens are spared
the last layer, but for its keys and values."""


def make_step(config: OpenELMConfig, weights: Weights, scheme: Scheme | None = None) -> Step:
    """The network as a pure function of tokens and cache; `scheme`: how the cache is quantized."""
    eps = config.rms_norm_eps

    def step(
        tokens: mx.array, buffers: list[Buffer], view: View, last: mx.array | None = None
    ) -> tuple[mx.array, list[Buffer]]:
        x = weights.token_embeddings.take(tokens, weights.norm.dtype)
        new = []
        for layer, buffer in zip(weights.layers, buffers, strict=True):
            h = mx.fast.rms_norm(x, layer.attn_norm, eps)
            only = last if layer is weights.layers[-1] else None
            h, buffer = attention(config, layer, h, buffer, view, scheme, only)
            x = h + (x if only is None else mx.take(x, only, axis=1))
            x = x + feed_forward(config, layer, mx.fast.rms_norm(x, layer.ffn_norm, eps))
            new.append(buffer)
        return weights.lm_head(mx.fast.rms_norm(x, weights.norm, eps)), new

    return step
