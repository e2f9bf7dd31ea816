"""What a sequence remembers: the keys and values of every layer."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .config import OpenELMConfig
from .errors import InputError

FIRST_CAPACITY = 256  # positions; doubled whenever they are used up
KEPT_TOKENS = 4  # of the beginning, when the context slides (attention sinks, arXiv 2309.17453)
SLIDING_STEP = 64  # tokens that one step may add to a context that slides


class View(NamedTuple):
    """What one step sees of the cache; the same for all layers."""

    offset: mx.array  # 0-d int32: position of the step's first token
    slot: mx.array  # [1] int32: where in the buffers its keys and values begin
    mask: mx.array  # [L, capacity] bool: which slots each of the step's L tokens attends to


class KVCache:
    """Keys and values of B sequences of equal length, in buffers of fixed capacity.

    The buffers, `[B, kv_heads, capacity, head_dim]` a layer, double when they are full, so that a
    token costs a write in place and no copy. With `max_size` the context slides: a token attends
    to the first `KEPT_TOKENS` positions and to the latest `max_size - KEPT_TOKENS`, itself
    included, however its prompt is cut into chunks; the buffers become rings.

    Attributes:
        offset: number of positions seen so far.
        keys, values: one buffer a layer; a step replaces them.
    """

    def __init__(
        self,
        config: OpenELMConfig,
        max_size: int | None = None,
        dtype: mx.Dtype = mx.float32,
    ) -> None:
        if max_size is not None and not KEPT_TOKENS < max_size <= config.max_context_length:
            raise InputError(
                f"max_kv_size must be more than {KEPT_TOKENS} and at most the model's context of "
                f"{config.max_context_length} tokens, not {max_size}"
            )
        self.config = config
        self.max_size = max_size
        self.dtype = dtype
        self.offset = 0
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []

    @property
    def capacity(self) -> int:
        """Positions that fit into the buffers."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    @property
    def _ring(self) -> int | None:
        return None if self.max_size is None else self.max_size + SLIDING_STEP - 1

    def room(self) -> int | None:
        """How many more tokens fit; None when the context slides."""
        return None if self.max_size else self.config.max_context_length - self.offset

    def longest_step(self, wanted: int) -> int:
        """How many of the next `wanted` tokens one step may take."""
        if self._ring is None or self.offset + wanted <= self._ring:
            return wanted
        if self.offset < self._ring:
            return self._ring - self.offset
        return min(wanted, SLIDING_STEP, self._ring - _slot(self.offset, self._ring))

    def reserve(self, batch: int, length: int) -> None:
        """Make room for a step of `length` tokens of `batch` sequences.

        Raises:
            InputError: when the context is full, when the step is longer than `longest_step`
                allows, or the batch size isn't the cache's.
        """
        if self.keys and self.keys[0].shape[0] != batch:
            raise InputError(
                f"the cache holds {self.keys[0].shape[0]} sequences, the tokens are of {batch}"
            )
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
        wanted = self.offset + length
        limit = self._ring or self.config.max_context_length
        if min(wanted, limit) > self.capacity:
            capacity = max(FIRST_CAPACITY, self.capacity)
            while capacity < wanted:
                capacity *= 2
            self._grow(batch, min(capacity, limit))

    def _grow(self, batch: int, capacity: int) -> None:
        more = capacity - self.capacity
        empty = [
            mx.zeros((batch, heads, more, self.config.head_dim), self.dtype)
            for heads in self.config.num_kv_heads
        ]
        if self.keys:
            self.keys = [
                mx.concatenate([k, e], axis=2) for k, e in zip(self.keys, empty, strict=True)
            ]
            self.values = [
                mx.concatenate([v, e], axis=2) for v, e in zip(self.values, empty, strict=True)
            ]
        else:
            self.keys, self.values = empty, [mx.zeros_like(buffer) for buffer in empty]

    def view(self, length: int) -> View:
        """What a step of `length` tokens sees, once `reserve` has made room for it."""
        return view(mx.array(self.offset), length, self.capacity, self.max_size, self._ring)

    def trim(self, count: int) -> None:
        """Forget the last `count` positions.

        Raises:
            InputError: when there are fewer, or when a sliding context has begun to overwrite.
        """
        if not 0 <= count <= self.offset:
            raise InputError(f"can't trim {count} of {self.offset} positions")
        if self._ring is not None and self.offset > self._ring:
            raise InputError("a context that has slid can't be trimmed")
        self.offset -= count


def _slot(position: int, ring: int) -> int:
    kept = min(position, KEPT_TOKENS)
    return kept + (position - kept) % (ring - KEPT_TOKENS)


def view(
    offset: mx.array, length: int, capacity: int, max_size: int | None, ring: int | None
) -> View:
    """The `View` of a step of `length` tokens at `offset` (0-d int32, may be traced)."""
    slots = mx.arange(capacity)
    queries = (offset + mx.arange(length))[:, None]
    if max_size is None or ring is None:
        return View(offset, offset[None], slots <= queries)
    turn = ring - KEPT_TOKENS
    kept = slots < KEPT_TOKENS
    last = offset + length - 1
    # The latest position that was written to each slot; one below KEPT_TOKENS: none yet.
    latest = mx.where(kept, slots, last - mx.remainder(last - slots, turn))
    in_window = (latest >= KEPT_TOKENS) & (latest > queries - (max_size - KEPT_TOKENS))
    slot = mx.where(offset < ring, offset, KEPT_TOKENS + (offset - KEPT_TOKENS) % turn)
    return View(offset, slot[None], (latest <= queries) & (kept | in_window))


def write(buffer: mx.array, new: mx.array, view: View) -> mx.array:
    """`buffer` [B, heads, capacity, head_dim] with `new` [B, heads, L, head_dim] in its slots."""
    return mx.slice_update(buffer, new, view.slot, axes=(2,))
