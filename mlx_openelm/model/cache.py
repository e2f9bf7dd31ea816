"""What a sequence remembers: the keys and values of every layer."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..config import OpenELMConfig
from ..errors import InputError
from .buffers import KEPT_TOKENS, SLIDING_STEP, Buffer, View, buffer_layout, kv_scheme, store, view
from .quantization import Scheme

if TYPE_CHECKING:
    from .openelm import OpenELM

FIRST_CAPACITY = 64  # positions; doubled whenever they are used up


@dataclass(eq=False)
class Use:
    """One generation's use of a cache.

    Attributes:
        text: positions of the cache that are part of the text so far. Those beyond were computed
            ahead: for a token that nobody has been given yet, or for drafted tokens.
        appends: whether the cache has to hold every token that was given out, because nothing else
            knows them (a `PromptCache` does).
    """

    text: int
    appends: bool = True


class KVCache:
    """Keys and values of B sequences, in buffers of fixed capacity.

    The buffers double when they are full, so that a token costs a write in place and no copy.
    With `max_size` the context slides: a token attends to the first `KEPT_TOKENS` positions and
    to the latest `max_size - KEPT_TOKENS`, itself included, however its prompt is cut into
    chunks; the buffers become rings. A `max_size` above the model's context counts as the context.
    With `bits` the buffers are quantized: in groups of `group_size` (default: the larger of 64 and
    32 that divides head_dim), and not before `quantized_from` positions are there.

    A generation computes ahead of the text that it has given out. `use` says how far the text
    goes, so that a generation that was interrupted at any point leaves a usable cache.

    Sequences of different lengths share a cache when the shorter ones are padded in front to the
    length of the longest; `lengths` says how long each is without.

    Attributes:
        offset: number of positions computed so far, padding included.
        addresses: what a backend that writes into the buffers knows of them; None when they are
            new.
        starts: [B] int32, the position where each sequence begins; None when all begin at 0.
        use: the generation that works on it; None when there is none.
        made_for: the model whose keys and values it holds, or its fingerprint where the cache was
            read from a file; None when unknown.
    """

    def __init__(
        self,
        config: OpenELMConfig,
        max_size: int | None = None,
        dtype: mx.Dtype = mx.float32,
        bits: int | None = None,
        lengths: Sequence[int] | None = None,
        *,
        group_size: int | None = None,
        quantized_from: int = 0,
    ) -> None:
        if min(lengths or [0]) < 0:
            raise InputError(
                f"the lengths of sequences must be at least 0, not {min(lengths or [])}"
            )
        if max_size is not None and operator.index(max_size) <= KEPT_TOKENS:
            raise InputError(f"max_kv_size must be more than {KEPT_TOKENS}, not {max_size}")
        if max_size is not None and lengths is not None:
            raise InputError("a context that slides (max_kv_size) holds sequences of one length")
        self.config = config
        self.max_size = None if max_size is None else min(max_size, config.max_context_length)
        self.dtype = dtype
        self.scheme: Scheme | None = None
        self._scheme_to_come: tuple[Scheme, int] | None = None
        self._paddings = [max(lengths) - n for n in lengths] if lengths else []
        self.starts = mx.array(self._paddings) if any(self._paddings) else None
        self.offset = 0
        self.addresses: Any = None
        self.buffers = []
        self.use: Use | None = None
        self.made_for: OpenELM | str | None = None
        self._written = 0  # positions that have ever been written; trimming doesn't undo it
        if bits is not None:
            self.quantize(bits, group_size, quantized_from)

    def __deepcopy__(self, memo: object) -> KVCache:
        """A copy that goes on by itself."""
        twin = copy.copy(self)
        twin.buffers, twin._paddings, twin.use = self._lent(), list(self._paddings), None
        twin.offset = self.length
        mx.eval(twin.buffers)
        return twin

    @property
    def buffers(self) -> list[Buffer]:
        """One a layer; a step replaces them, or writes into them (`own`)."""
        return self._buffers

    @buffers.setter
    def buffers(self, buffers: list[Buffer]) -> None:
        self._buffers, self._own, self.addresses = buffers, False, None

    def _set_own(self, buffers: list[Buffer]) -> None:
        """Set buffers whose arrays nobody else has."""
        self.buffers, self._own = buffers, True

    def own(self) -> None:
        """Make sure that nobody else has the arrays of the buffers: they will be written in place.

        What this cache has made itself is its own; anything else is copied.
        """
        if not self._own:
            self._set_own([_copies(buffer) for buffer in self.buffers])

    def _lent(self, *index: slice) -> list[Buffer]:
        """The buffers, or a part of them, as arrays that the next steps don't change."""
        parts = self._parts(*index)
        if self._own:
            parts = [_copies(part) for part in parts]
            mx.eval(parts)
        return parts

    def _parts(self, *index: slice) -> list[Buffer]:
        return [tuple(array[index] for array in buffer) for buffer in self.buffers]

    @property
    def length(self) -> int:
        """Positions of the text: `offset` without what a generation has computed ahead."""
        return self.offset if self.use is None else min(self.offset, self.use.text)

    def begin_use(self, *, new_text: int = 0, appends: bool = True) -> Use:
        """Begin a generation, which may end at any point; the one before is over.

        Args:
            new_text: how many of the tokens to come are part of the text before the first token
                has been given out.
            appends: see `Use`.
        """
        self.settle()
        self.use = Use(self.offset + new_text, appends)
        return self.use

    def still_in(self, use: Use) -> None:
        """Check that no other generation has begun with this cache.

        Raises:
            InputError: when one has.
        """
        if self.use is not use:
            raise InputError(
                "the prompt cache was used for another text before this generation was over; "
                "give each of them a cache of its own"
            )

    def settle(self) -> None:
        """Forget what a generation has computed ahead of the text, and end its use.

        In a context that slides, no more than `SLIDING_STEP` positions can be forgotten: a prompt
        that was interrupted later than that stays as far as it got.
        """
        beyond = self.offset - self.length
        if self.can_trim(beyond):
            self.offset -= beyond
        self.use = None
        # MLX can compute on this thread only what this thread has asked for.
        mx.async_eval(self.buffers)  # type: ignore[no-untyped-call]

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

    def view(self, length: int) -> View:
        """What the next step sees, of `length` tokens for which room is reserved."""
        max_size = None if self.max_size is None else mx.array(self.max_size)
        return view(mx.array(self.offset), length, self.capacity, max_size, self.starts)

    def reserve(self, batch: int, length: int, padded: int | None = None) -> None:
        """Make room for a step of `length` tokens of `batch` sequences.

        `padded`: slots that the step writes; those beyond `length` are overwritten by the next.

        Raises:
            InputError: when the context is full, when the step is longer than `longest_step`
                allows, or the batch size isn't the cache's.
        """
        if self._scheme_to_come and self.offset >= self._scheme_to_come[1]:
            self._quantize_now()
        held = self.batch or len(self._paddings) or batch
        if held != batch:
            raise InputError(f"the cache holds {held} sequences, the tokens are of {batch}")
        if self.offset < 0:
            raise InputError(f"the cache's offset was set to {self.offset}")
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
        self._written = max(self._written, self.offset + length)
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
            empty = [
                tuple(
                    mx.concatenate([old, more], axis=2)
                    for old, more in zip(buffer, new, strict=True)
                )
                for buffer, new in zip(self.buffers, empty, strict=True)
            ]
        self._set_own(empty)

    def select(self, rows: list[int]) -> None:
        """Keep only these sequences, by their index, in this order.

        Raises:
            InputError: when there is no such sequence.
        """
        self._check_rows(rows)
        kept = mx.array(rows)
        self._set_own([tuple(array[kept] for array in buffer) for buffer in self.buffers])
        self._paddings = [self._paddings[i] for i in rows] if self._paddings else []
        self.starts = None if self.starts is None else self.starts[kept]

    def _check_rows(self, rows: list[int]) -> None:
        batch = self.batch or 0
        if not rows:
            raise InputError("a cache of no sequences has no use")
        for row in rows:
            if not 0 <= operator.index(row) < batch:
                raise InputError(f"the cache holds {batch} sequences: there is no {row}")

    def quantize(self, bits: int, group_size: int | None = None, start: int = 0) -> None:
        """Keep keys and values in 4 or 8 bits from the first step on that finds `start` positions.

        Raises:
            InputError: when they are quantized otherwise already, or can't be.
        """
        scheme = kv_scheme(bits, self.config.head_dim, group_size)
        if start < 0:
            raise InputError(f"quantized_kv_start must be at least 0, not {start}")
        if self.scheme is not None and (
            self.scheme.bits != bits or group_size not in (None, self.scheme.group_size)
        ):
            raise InputError(
                f"the prompt cache is quantized to {self.scheme.bits} bits in groups of "
                f"{self.scheme.group_size} already"
            )
        if self.scheme is None:
            self._scheme_to_come = scheme, start
            if start == 0:
                self._quantize_now()

    def _quantize_now(self) -> None:
        assert self._scheme_to_come is not None
        scheme = self._scheme_to_come[0]
        self._set_own([store(buffer[0], scheme) for buffer in self.buffers])
        self.scheme = scheme
        self._scheme_to_come = None

    @property
    def state(self) -> dict[str, mx.array]:
        """The used part of all buffers, by name: what `mx.eval` has to evaluate, and `restore`
        takes.
        """
        return self.used(self.length)

    def used(self, length: int) -> dict[str, mx.array]:
        """The first `length` positions of all buffers, by name; of a ring, all slots in use."""
        slots = length if self.ring is None else min(self._written, self.ring)
        return {
            f"layers.{i}.{part}": array
            for i, buffer in enumerate(self._lent(slice(None), slice(None), slice(slots)))
            for part, array in enumerate(buffer)
            if slots
        }

    def has_layout(self, config: OpenELMConfig, dtype: mx.Dtype) -> bool:
        """Whether the buffers are those of a model of this geometry that computes in `dtype`."""
        found = [[(array.shape, array.dtype) for array in buffer] for buffer in self.buffers]
        return found == [
            buffer_layout(
                *(self.batch or 0, 2 * heads, self.capacity, config.head_dim),
                scheme=self.scheme,
                dtype=dtype,
            )
            for heads in config.num_kv_heads
        ]

    def layout(self, length: int) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and dtype of each array of the `used` part of one sequence."""
        if length == 0:
            return {}
        return {
            f"layers.{i}.{part}": entry
            for i, heads in enumerate(self.config.num_kv_heads)
            for part, entry in enumerate(
                buffer_layout(
                    *(1, 2 * heads, length, self.config.head_dim),
                    scheme=self.scheme,
                    dtype=self.dtype,
                )
            )
        }

    def restore(self, arrays: Mapping[str, mx.array], offset: int) -> None:
        """Put the `state` of a cache that held `offset` positions into this empty one.

        Raises:
            InputError: when the arrays aren't those of such a cache.
        """
        if {n: (a.shape, a.dtype) for n, a in arrays.items()} != self.layout(offset):
            raise InputError("the saved keys and values don't fit the model")
        if offset == 0:
            return
        self.reserve(1, offset)
        self.buffers = [
            tuple(
                mx.slice_update(array, arrays[f"layers.{i}.{part}"], mx.array([0]), axes=(2,))
                for part, array in enumerate(buffer)
            )
            for i, buffer in enumerate(self.buffers)
        ]
        mx.eval(self.buffers)
        self.offset = offset

    def can_trim(self, count: int) -> bool:
        """Whether the last `count` positions can be forgotten.

        A ring has `SLIDING_STEP - 1` slots more than its window, so that as many positions can be
        forgotten without missing those that they have overwritten.
        """
        if not 0 <= count <= self.offset:
            return False
        if self.ring is None or self._written <= self.ring:
            return True
        return self._written - (self.offset - count) < SLIDING_STEP

    def trim(self, count: int) -> int:
        """Forget the last `count` positions; returns how many that were.

        Raises:
            InputError: when there are fewer, or when a sliding context has overwritten what came
                before them.
        """
        if not 0 <= operator.index(count) <= self.offset:
            raise InputError(f"can't trim {count} of {self.offset} positions")
        if not self.can_trim(count):
            raise InputError("a context that has slid can't be trimmed")
        self.offset -= count
        return count

    def is_trimmable(self) -> bool:
        """Whether any number of positions can be forgotten: not once a context has slid."""
        return self.ring is None or self._written <= self.ring

    def size(self) -> int:
        """Positions that a token attends to at most now."""
        return min(self.length, self.max_size or self.length)

    def empty(self) -> bool:
        """Whether it holds nothing."""
        return self.length == 0

    def sequence(self, row: int, length: int) -> KVCache:
        """A cache of one of the sequences by itself, with its first `length` positions.

        Raises:
            InputError: when there is no such sequence, or it is shorter.
        """
        self._check_rows([row])
        first = self._paddings[row] if self._paddings else 0
        if not 0 <= length <= self.offset - first:
            raise InputError(f"sequence {row} has {self.offset - first} positions, not {length}")
        one = KVCache(self.config, self.max_size, self.dtype)
        one.scheme, one.made_for = self.scheme, self.made_for
        part = self._parts(slice(row, row + 1), slice(None), slice(first, first + length))
        one._set_own([_copies(buffer) for buffer in part])  # a part keeps all of it in memory
        mx.eval(one.buffers)
        one.offset = one._written = length
        return one


def merge(caches: Sequence[KVCache]) -> KVCache:
    """The sequences of several caches, each of one, in a cache of all; those stay as they are.

    Raises:
        InputError: when one is empty or slides, or when they differ in their quantization.
    """
    first = caches[0]
    if any(cache.max_size for cache in caches):
        raise InputError("a context that slides (max_kv_size) can't be part of a batch")
    if any(cache.scheme != first.scheme or cache.dtype != first.dtype for cache in caches):
        raise InputError("the prompt caches of a batch must be quantized alike")
    lengths = [cache.length for cache in caches]
    if min(lengths) == 0:
        raise InputError("an empty prompt cache can't be part of a batch")
    merged = KVCache(first.config, None, first.dtype, lengths=lengths)
    merged.scheme, merged.made_for, longest = first.scheme, first.made_for, max(lengths)

    def padded(array: mx.array, length: int) -> mx.array:
        return mx.pad(array[:, :, :length], [(0, 0), (0, 0), (longest - length, 0), (0, 0)])

    merged.buffers = [
        tuple(
            mx.concatenate([padded(a, n) for a, n in zip(arrays, lengths, strict=True)])
            for arrays in zip(*buffers, strict=True)
        )
        for buffers in zip(*(cache._lent() for cache in caches), strict=True)
    ]
    merged.offset = merged._written = longest
    return merged


def _copies(arrays: Buffer) -> Buffer:
    """The same values in memory of their own."""
    return tuple(mx.contiguous(array * mx.array(1, array.dtype)) for array in arrays)


def _slot(position: int, ring: int) -> int:
    kept = min(position, KEPT_TOKENS)
    return kept + (position - kept) % (ring - KEPT_TOKENS)
