"""The network's step in elementwise operations, for devices that MLX has no fast kernels for.

On a CPU every `mx.fast` operation falls apart into primitives, and dispatching a primitive costs
more than what it computes in a model this small. Here norms, RoPE, mask and gate are plain
arithmetic, which `mx.compile` fuses into one kernel each, and queries, keys and values are
normalised and rotated together. The mathematics is that of `network`; results differ by rounding.

Constants are vectors although scalars would do: `mx.compile` writes a scalar into the source of
its kernel, so that every model would need kernels of its own, at a second of C++ compiler each.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .cache import Buffer, View, read, write
from .config import OpenELMConfig
from .exponential import MANY, apart, silu, softmax_product
from .network import Step
from .quantization import Scheme
from .weights import Layer, Weights

BLOCK = 128  # tokens whose attention is computed together
NEVER = -1e9  # added to the score of a slot that isn't attended to; finite, since padding sees none


class Norm(NamedTuple):
    """x · rsqrt(Σx² · mean + eps) · weight: RMSNorm (arXiv 1910.07467, equation 4)."""

    weight: mx.array
    mean: mx.array  # 1 / the number of values
    eps: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Over the last axis of `x` [..., dim]."""
        squares = mx.sum(mx.square(x), axis=-1, keepdims=True)
        if x.size < MANY:
            return x * mx.rsqrt(squares * self.mean + self.eps) * self.weight
        # Otherwise the root would be computed for each value
        return x * apart(mx.rsqrt(squares * self.mean[:1] + self.eps[:1])) * self.weight


class Heads(NamedTuple):
    """What happens to each of a layer's query, key and value heads, all in one formula.

    A head is held in its two halves, [heads, 2, head_dim / 2], because RoPE turns one against the
    other. A value head passes through: mean 0 and eps 1 make its norm 1, and it doesn't turn.
    """

    query_heads: int
    kv_heads: int
    weight: mx.array  # the norms' weights; in those of queries, the scale of attention too
    swapped: mx.array  # the same with the halves swapped; 0 for values
    mean: mx.array  # [heads, 1, 1]
    eps: mx.array
    turns: mx.array  # bool

    def __call__(
        self, x: mx.array, shape: tuple[int, int], cos: mx.array, sin: mx.array
    ) -> mx.array:
        """`x` [B · L, heads · head_dim] → [B, heads, L, head_dim], normalised and rotated."""
        B, L = shape
        heads, _, half = self.weight.shape
        x = x.reshape(B, L, heads, 2, half)
        squares = mx.sum(mx.square(x), axis=(-2, -1), keepdims=True)
        straight = x * self.weight * mx.where(self.turns, cos, 1.0)
        across = x[..., ::-1, :] * self.swapped * sin
        scale = mx.rsqrt(squares * self.mean + self.eps)
        y = (straight + across) * (scale if x.size < MANY else apart(scale))
        if L == 1:
            return y.reshape(B, heads, L, 2 * half)
        return y.reshape(B, L, heads, 2 * half).swapaxes(1, 2)


class Block(NamedTuple):
    """Some of a step's tokens, and what they attend to.

    Later tokens see more than earlier ones, so that in blocks less is computed for nothing.
    """

    start: int  # in the step
    end: int
    slots: int  # of the cache; the ones beyond are of later tokens
    mask: mx.array  # [B or 1, 1, rows, slots], added to the scores


def _blocks(mask: mx.array, repeats: int) -> list[Block]:
    """The blocks of a step with the additive `mask` [B or 1, 1, L, capacity].

    Their rows are their tokens, as often as query heads share a key head; a single token's row
    stands for all.
    """
    L, capacity = mask.shape[2:]
    if L == 1:
        return [Block(0, 1, capacity, mask)]
    blocks = []
    for start in range(0, L, BLOCK):
        end = min(start + BLOCK, L)
        # A step begins at `capacity` - L at the latest; a ring turns in steps shorter than a block
        slots = capacity - L + end
        rows = mask if end - start == L else mask[:, :, start:end, :slots]
        blocks.append(Block(start, end, slots, mx.tile(rows, (1, 1, repeats, 1))))
    return blocks


def make_step(config: OpenELMConfig, weights: Weights, scheme: Scheme | None = None) -> Step:
    """As `network.make_step`."""
    dtype = weights.norm.dtype
    mean, eps = (
        mx.full((config.model_dim,), value, dtype)
        for value in (1 / config.model_dim, config.rms_norm_eps)
    )
    norms = [
        (Norm(layer.attn_norm, mean, eps), Norm(layer.ffn_norm, mean, eps))
        for layer in weights.layers
    ]
    last_norm = Norm(weights.norm, mean, eps)
    heads = [_heads(config, i, layer, dtype) for i, layer in enumerate(weights.layers)]
    groups = {split.query_heads // split.kv_heads for split in heads}
    frequencies = config.rope_freq_constant ** (-mx.arange(0, config.head_dim, 2) / config.head_dim)
    mx.eval(norms, last_norm, heads, frequencies)

    def step(
        tokens: mx.array, buffers: list[Buffer], view: View, last: mx.array | None = None
    ) -> tuple[mx.array, list[Buffer]]:
        B, L = tokens.shape
        # Rows, not sequences: a product of two matrices is one call of the BLAS.
        x = weights.token_embeddings.take(tokens.reshape(-1), dtype)
        angles = (view.positions[..., None] * frequencies)[:, :, None, None]
        cos, sin = mx.cos(angles), mx.sin(angles)
        sin = mx.concatenate([-sin, sin], axis=-2)
        mask = mx.where(view.mask, 0.0, NEVER)[:, None]
        blocks = {repeats: _blocks(mask, repeats) for repeats in groups}
        new = []
        for layer, (attn_norm, ffn_norm), split, buffer in zip(
            weights.layers, norms, heads, buffers, strict=True
        ):
            h = split(layer.qkv_proj(attn_norm(x)), (B, L), cos, sin)
            queries = h[:, : split.query_heads]
            buffer = write(buffer, h[:, split.query_heads :], view.slot, scheme)
            its_blocks = blocks[split.query_heads // split.kv_heads]
            if last is not None and layer is weights.layers[-1]:
                x = mx.take(x.reshape(B, L, -1), last, axis=1).reshape(B, -1)
                queries = mx.take(queries, last, axis=2)
                its_blocks = _blocks(mx.take(mask, last, axis=2), 1)
            keys, values = read(buffer, scheme, dtype)
            x = layer.out_proj.add_to(x, _attend(queries, keys, values, its_blocks))
            h = layer.proj_1(ffn_norm(x))
            if config.ffn_with_glu:
                gate, up = mx.split(h, 2, axis=-1)
                h = silu(gate) * up
            else:
                h = silu(h)
            x = layer.proj_2.add_to(x, h)
            new.append(buffer)
        return last_norm(x).reshape(B, -1, config.model_dim), new

    return step


def _heads(config: OpenELMConfig, i: int, layer: Layer, dtype: mx.Dtype) -> Heads:
    query_heads, kv_heads = config.num_query_heads[i], config.num_kv_heads[i]
    groups = (query_heads, kv_heads, kv_heads)
    ones = mx.ones((config.head_dim,), dtype)
    normed = layer.q_norm is not None and layer.k_norm is not None
    q_norm, k_norm = (layer.q_norm, layer.k_norm) if normed else (ones, ones)
    q_norm = q_norm * config.head_dim**-0.5
    weight = mx.concatenate(
        [
            mx.broadcast_to(norm.reshape(1, 2, -1), (count, 2, config.head_dim // 2))
            for norm, count in zip((q_norm, k_norm, ones), groups, strict=True)
        ]
    )

    def each(*values: float) -> mx.array:
        parts = [mx.full((n, 1, 1), v, dtype) for n, v in zip(groups, values, strict=True)]
        return mx.concatenate(parts)

    eps = config.rms_norm_eps
    return Heads(
        query_heads,
        kv_heads,
        weight,
        weight[:, ::-1] * each(1, 1, 0),
        each(*[1 / config.head_dim] * 2, 0) if normed else each(0, 0, 0),
        each(eps, eps, 1) if normed else each(1, 1, 1),
        each(1, 1, 0) > 0,
    )


def _attend(queries: mx.array, keys: mx.array, values: mx.array, blocks: list[Block]) -> mx.array:
    """`queries` [B, query_heads, L, head_dim] → [B · L, query_heads · head_dim].

    `keys` and `values` are [B, kv_heads, capacity, head_dim].
    """
    B, query_heads, L, head_dim = queries.shape
    parts = []
    for start, end, slots, mask in blocks:
        q, k, v = queries, keys, values
        if len(blocks) > 1:
            q, k, v = q[:, :, start:end], k[:, :, :slots], v[:, :, :slots]
        # The query heads that share a key head are rows of one matrix.
        q = q.reshape(B, keys.shape[1], -1, head_dim)
        y = softmax_product(q @ k.swapaxes(-1, -2) + mask, v)
        parts.append(y.reshape(B, query_heads, -1, head_dim) if L > 1 else y)
    y = mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
    return (y.swapaxes(1, 2) if L > 1 else y).reshape(B * L, -1)
