"""What a sequence remembers: the keys and values of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from .config import OpenELMConfig
from .errors import InputError
from .quantization import Scheme

FIRST_CAPACITY = 64  # positions; doubled whenever they are used up
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


class KVCache:
    """Keys and values of B sequences, in buffers of fixed capacity.

    The buffers double when they are full, so that a token costs a write in place and no copy.
    With `max_size` the context slides: a token attends to the first `KEPT_TOKENS` positions and
    to the latest `max_size - KEPT_TOKENS`, itself included, however its prompt is cut into
    chunks; the buffers become rings. With `bits` they are quantized.

    Sequences of different lengths share a cache when the shorter ones are padded in front to the
    length of the longest; `lengths` says how long each is without.

    Attributes:
        offset: number of positions seen so far, padding included.
        buffers: one a layer; a step replaces them.
        starts: [B] int32, the position where each sequence begins; None when all begin at 0.
    """

    def __init__(
        self,
        config: OpenELMConfig,
        max_size: int | None = None,
        dtype: mx.Dtype = mx.float32,
        bits: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        if max_size is not None and not KEPT_TOKENS < max_size <= config.max_context_length:
            raise InputError(
                f"max_kv_size must be more than {KEPT_TOKENS} and at most the model's context of "
                f"{config.max_context_length} tokens, not {max_size}"
            )
        if max_size is not None and lengths is not None:
            raise InputError("a context that slides (max_kv_size) holds sequences of one length")
        self.config = config
        self.max_size = max_size
        self.dtype = dtype
        self.scheme = None if bits is None else _scheme(bits, config.head_dim)
        self._paddings = [max(lengths) - n for n in lengths] if lengths else []
        self.starts = mx.array(self._paddings) if any(self._paddings) else None
        self.offset = 0
        self.buffers: list[Buffer] = []
        self.addresses: tuple[list[Buffer], Any] | None = None  # `backends.cpu`'s, of the buffers

    @property
    def batch(self) -> int | None:
        """How many sequences it holds; None before the first step."""
        return self.buffers[0][0].shape[0] if self.buffers else None

    @property
    def capacity(self) -> int:
        """Positions that fit into the buffers."""
        return self.buffers[0][0].shape[2] if self.buffers else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(array.nbytes for buffer in self.buffers for array in buffer)

    @property
    def ring(self) -> int | None:
        """Slots of a context that slides; None when it doesn't."""
        return None if self.max_size is None else self.max_size + SLIDING_STEP - 1

    def room(self) -> int | None:
        """How many more tokens fit into the shortest sequence; None when the context slides."""
        if self.max_size:
            return None
        return self.config.max_context_length + max(self._paddings, default=0) - self.offset

    def longest_step(self, wanted: int) -> int:
        """How many of the next `wanted` tokens one step may take."""
        if self.ring is None or self.offset + wanted <= self.ring:
            return wanted
        if self.offset < self.ring:
            return self.ring - self.offset
        return min(wanted, SLIDING_STEP, self.ring - _slot(self.offset, self.ring))

    def reserve(self, batch: int, length: int, padded: int | None = None) -> None:
        """Make room for a step of `length` tokens of `batch` sequences.

        `padded`: slots that the step writes; those beyond `length` are overwritten by the next.

        Raises:
            InputError: when the context is full, when the step is longer than `longest_step`
                allows, or the batch size isn't the cache's.
        """
        if self.batch not in (None, batch):
            raise InputError(f"the cache holds {self.batch} sequences, the tokens are of {batch}")
        room = self.room()
        if room is not None and length > room:
            raise InputError(
                f"the context is {self.config.max_context_length} tokens long: {self.offset} are "
                f"in the cache and {length} more don't fit (max_kv_size lets it slide)"
            )
        if self.longest_step(length) < length:
            raise InputError(
                f"a step of {length} tokens is too long for a cache that slides at {self.max_size}"
                f"; at most {self.longest_step(length)} now"
            )
        wanted = self.offset + (padded or length)
        if min(wanted, self.ring or wanted) > self.capacity:
            capacity = max(FIRST_CAPACITY, self.capacity)
            while capacity < wanted:
                capacity *= 2
            # A batch may go beyond the context, where its padding ends, and so may a padded step.
            limit = self.ring or max(self.config.max_context_length, wanted)
            self._grow(batch, min(capacity, limit))

    def _grow(self, batch: int, capacity: int) -> None:
        added = capacity - self.capacity
        empty = [
            store(
                mx.zeros((batch, 2 * heads, added, self.config.head_dim), self.dtype), self.scheme
            )
            for heads in self.config.num_kv_heads
        ]
        if self.buffers:
            self.buffers = [
                tuple(
                    mx.concatenate([old, more], axis=2)
                    for old, more in zip(buffer, new, strict=True)
                )
                for buffer, new in zip(self.buffers, empty, strict=True)
            ]
        else:
            self.buffers = empty

    def select(self, rows: list[int]) -> None:
        """Keep only these sequences, by their index, in this order.

        Raises:
            InputError: when there is no such sequence.
        """
        batch = self.batch or 0
        for row in rows:
            if not 0 <= row < batch:
                raise InputError(f"the cache holds {batch} sequences: there is no {row}")
        kept = mx.array(rows)
        self.buffers = [tuple(array[kept] for array in buffer) for buffer in self.buffers]
        self._paddings = [self._paddings[i] for i in rows] if self._paddings else []
        self.starts = None if self.starts is None else self.starts[kept]

    def state(self) -> dict[str, mx.array]:
        """The used part of all buffers, by name, for `restore`.

        Raises:
            InputError: when the context slides.
        """
        if self.ring is not None:
            raise InputError("a context that slides (max_kv_size) can't be saved")
        return {
            f"layers.{i}.{part}": array[:, :, : self.offset]
            for i, buffer in enumerate(self.buffers)
            for part, array in enumerate(buffer)
        }

    def restore(self, arrays: Mapping[str, mx.array], offset: int) -> None:
        """Put the `state` of a cache that held `offset` positions into this empty one.

        Raises:
            InputError: when the arrays aren't those of such a cache.
        """
        if offset == 0 and not arrays:
            return
        self.reserve(1, offset)
        used = {
            f"layers.{i}.{part}": (*array.shape[:2], offset, array.shape[3])
            for i, buffer in enumerate(self.buffers)
            for part, array in enumerate(buffer)
        }
        if {name: array.shape for name, array in arrays.items()} != used:
            raise InputError("the saved keys and values don't fit the model")
        self.buffers = [
            tuple(
                mx.slice_update(array, arrays[f"layers.{i}.{part}"], mx.array([0]), axes=(2,))
                for part, array in enumerate(buffer)
            )
            for i, buffer in enumerate(self.buffers)
        ]
        self.offset = offset

    def trim(self, count: int) -> None:
        """Forget the last `count` positions.

        Raises:
            InputError: when there are fewer, or when a sliding context has begun to overwrite.
        """
        if not 0 <= count <= self.offset:
            raise InputError(f"can't trim {count} of {self.offset} positions")
        if self.ring is not None and self.offset > self.ring:
            raise InputError("a context that has slid can't be trimmed")
        self.offset -= count


def _scheme(bits: int, head_dim: int) -> Scheme:
    if bits not in KV_BITS:
        raise InputError(f"kv_bits must be {' or '.join(map(str, KV_BITS))}, not {bits}")
    for group in KV_GROUPS:
        if head_dim % group == 0:
            return Scheme(group, bits)
    raise InputError(
        f"kv_bits needs a head_dim that is a multiple of {KV_GROUPS[-1]}; the model's is {head_dim}"
    )


def _slot(position: int, ring: int) -> int:
    kept = min(position, KEPT_TOKENS)
    return kept + (position - kept) % (ring - KEPT_TOKENS)


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
