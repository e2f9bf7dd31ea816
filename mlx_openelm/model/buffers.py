"""The arrays that hold keys and values, and what one step sees of them."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..errors import InputError
from .quantization import Scheme

KEPT_TOKENS = 4  # of the beginning, when the context slides (attention sinks, arXiv 2309.17453)
SLIDING_STEP = 64  # tokens that one step may add to a context that slides
KV_BITS = (4, 8)
KV_GROUPS = (64, 32)  # the first that divides head_dim

Buffer = tuple[mx.array, ...]
"""One layer's keys and values, [B, 2 × kv_heads, capacity, head_dim], the keys first. Quantized:
values, scales and biases of that, as `mx.quantize` gives them."""


class View(NamedTuple):
    """What one step sees of the cache; the same for all layers."""

    positions: mx.array  # [B or 1, L] int32, for RoPE
    slot: mx.array  # [1] int32: where in the buffers the step's keys and values begin
    mask: mx.array  # [B or 1, L, capacity] bool: which slots each token attends to


def view(
    offset: mx.array,
    length: int,
    capacity: int,
    max_size: mx.array | None = None,
    starts: mx.array | None = None,
) -> View:
    """The `View` of a step of `length` tokens at `offset`; the arrays may be traced.

    Args:
        offset: 0-d int32.
        length, capacity: of the step, and of the buffers.
        max_size: 0-d int32, of a context that slides.
        starts: [B] int32, of sequences that are padded in front.
    """
    slots = mx.arange(capacity)
    positions = offset + mx.arange(length)[None]
    queries = positions[..., None]
    if max_size is not None:
        ring = max_size + SLIDING_STEP - 1
        turn = ring - KEPT_TOKENS
        kept = slots < KEPT_TOKENS
        last = offset + length - 1
        # The latest position that was written to each slot; one below KEPT_TOKENS: none yet.
        latest = mx.where(kept, slots, last - mx.remainder(last - slots, turn))
        in_window = (latest >= KEPT_TOKENS) & (latest > queries - (max_size - KEPT_TOKENS))
        slot = mx.where(offset < ring, offset, KEPT_TOKENS + (offset - KEPT_TOKENS) % turn)
        return View(positions, slot[None], (latest <= queries) & (kept | in_window))
    mask = slots <= queries
    if starts is not None:
        mask = mask & (slots >= starts[:, None, None])
        positions = positions - starts[:, None]  # negative in the padding, which nobody sees
    return View(positions, offset[None], mask)


def store(heads: mx.array, scheme: Scheme | None) -> Buffer:
    """`heads` [..., head_dim] in the form of a buffer."""
    return (heads,) if scheme is None else tuple(mx.quantize(heads, **scheme.to_dict()))


def buffer_layout(
    *shape: int, scheme: Scheme | None, dtype: mx.Dtype = mx.float32
) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """Shape and dtype of each array of a buffer of [B, 2 × kv_heads, slots, head_dim]."""
    if scheme is None:
        return [(shape, dtype)]
    *outer, head_dim = shape
    groups = (*outer, head_dim // scheme.group_size)
    words = (*outer, head_dim * scheme.bits // 32)
    return [(words, mx.uint32), (groups, dtype), (groups, dtype)]


def write(buffer: Buffer, heads: mx.array, slot: mx.array, scheme: Scheme | None) -> Buffer:
    """`buffer` with `heads` [B, 2 × kv_heads, L, head_dim] from slot `slot` [1] on."""
    return tuple(
        mx.slice_update(array, new, slot, axes=(2,))
        for array, new in zip(buffer, store(heads, scheme), strict=True)
    )


def read(buffer: Buffer, scheme: Scheme | None, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Keys and values of a buffer, each [B, kv_heads, capacity, head_dim]."""
    whole = buffer[0]
    if scheme is not None:
        values, scales, biases = buffer
        whole = mx.dequantize(values, scales, biases, **scheme.to_dict(), dtype=dtype)
    kv_heads = whole.shape[1] // 2
    return whole[:, :kv_heads], whole[:, kv_heads:]


def kv_scheme(bits: int, head_dim: int, group_size: int | None = None) -> Scheme:
    """How keys and values are quantized; by default in the larger group that divides `head_dim`.

    Raises:
        InputError: when they can't be.
    """
    if bits not in KV_BITS:
        raise InputError(f"kv_bits must be {' or '.join(map(str, KV_BITS))}, not {bits}")
    if group_size is not None:
        if group_size not in (32, 64, 128) or head_dim % group_size:
            raise InputError(
                f"kv_group_size must be 32, 64 or 128 and divide the model's head_dim of "
                f"{head_dim}, not {group_size}"
            )
        return Scheme(group_size, bits)
    for group in KV_GROUPS:
        if head_dim % group == 0:
            return Scheme(group, bits)
    raise InputError(
        f"kv_bits needs a head_dim that is a multiple of {KV_GROUPS[-1]}; the model's is {head_dim}"
    )
