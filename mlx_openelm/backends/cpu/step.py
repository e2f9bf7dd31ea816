"""A network whose step the C library computes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref
from typing import TYPE_CHECKING, NamedTuple, cast

import mlx.core as mx

from ...dtypes import dtype_name
from ...errors import InputError, OpenELMError
from . import library
from .library import KINDS

if TYPE_CHECKING:
    from ...config import OpenELMConfig
    from ...model.buffers import Buffer
    from ...model.cache import KVCache
    from ...model.quantization import Matrix, Scheme
    from ...model.weights import Weights

PACKED_BITS = (4, 8)


def can_multiply(matrix: Matrix) -> bool:
    """Whether the library multiplies a matrix as it is stored."""
    scheme = matrix.scheme
    if scheme is None:
        return dtype_name(matrix.weight.dtype) in KINDS
    words = matrix.weight.shape[1]  # eight are taken at once
    return scheme.mode == "affine" and scheme.bits in PACKED_BITS and words % 8 == 0


def multiply(x: mx.array, matrix: Matrix) -> mx.array:
    """`x` [..., columns] → `x @ matrix.T` [..., rows], float32; evaluates it.

    The matrix is one that `can_multiply` accepts.

    Raises:
        OpenELMError: when memory runs out.
    """
    keep = _Memory()
    struct = _matrix(matrix, keep)
    x = mx.contiguous(x.astype(mx.float32))
    y = mx.zeros((*x.shape[:-1], struct.rows))
    mx.eval(x, y)
    rows = x.size // struct.columns
    _check(library.load().openelm_multiply(_address(x), rows, byref(struct), _address(y), 0))
    return y


class Network:
    """The weights as the library sees them.

    Args:
        config: the geometry.
        weights: matrices that `can_multiply` accepts, with vectors of any floating dtype.
    """

    def __init__(self, config: OpenELMConfig, weights: Weights) -> None:
        self._library = library.load()
        self._config = config
        self._memory = keep = _Memory()
        self._layers = (library.Layer * len(weights.layers))()
        for struct, layer, query_heads, kv_heads in zip(
            self._layers, weights.layers, config.num_query_heads, config.num_kv_heads, strict=True
        ):
            for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm"):
                vector = getattr(layer, name)
                setattr(struct, name, None if vector is None else keep.floats(vector))
            for name in ("qkv_proj", "out_proj", "proj_1", "proj_2"):
                setattr(struct, name, _matrix(getattr(layer, name), keep))
            struct.query_heads, struct.kv_heads = query_heads, kv_heads
        embeddings = _matrix(weights.token_embeddings, keep)
        tied = weights.lm_head is weights.token_embeddings
        self._struct = library.NetworkStruct(
            token_embeddings=embeddings,
            lm_head=embeddings if tied else _matrix(weights.lm_head, keep),
            norm=keep.floats(weights.norm),
            layers=ctypes.cast(self._layers, POINTER(library.Layer)),
            num_layers=len(weights.layers),
            model_dim=config.model_dim,
            head_dim=config.head_dim,
            glu=config.ffn_with_glu,
            eps=config.rms_norm_eps,
            rope_base=config.rope_freq_constant,
        )

    def __call__(self, tokens: mx.array, cache: KVCache, last_only: bool) -> mx.array:
        """Logits of a step, computed when this returns.

        Args:
            tokens: [B, L] of ids below vocab_size.
            cache: with room for them (`KVCache.reserve`); its buffers are written in place.
            last_only: only the last token's logits.

        Returns:
            [B, L or 1, vocab_size] float32.

        Raises:
            InputError: when a token id is out of range, or the cache is another model's.
            OpenELMError: when memory runs out.
        """
        batch, length = tokens.shape
        buffers, offset = self._buffers(cache), cache.offset
        capacity, slot = buffers.capacity, offset
        tokens = mx.contiguous(tokens.astype(mx.int32))
        logits = mx.zeros((batch, 1 if last_only else length, self._config.vocab_size))
        arrays = [tokens, logits]
        if cache.starts is not None:
            arrays.append(starts := mx.contiguous(cache.starts))
        if cache.max_size is not None:
            seen = cache.view(length)
            arrays += [mask := mx.contiguous(seen.mask[0].astype(mx.uint8)), seen.slot]
        mx.eval(arrays)
        if cache.max_size is not None:
            slot = cast("int", seen.slot.item())
        if batch != buffers.batch or not 0 <= slot <= capacity - length:
            raise InputError("the cache has no room for the step: another thread uses it, too")
        step = library.StepStruct(
            tokens=_address(tokens),
            starts=None if cache.starts is None else _address(starts),
            mask=None if cache.max_size is None else _address(mask),
            caches=buffers.structs,
            logits=_address(logits),
            batch=batch,
            length=length,
            offset=offset,
            slot=slot,
            capacity=capacity,
            bits=buffers.scheme.bits if buffers.scheme else 32,
            group=buffers.scheme.group_size if buffers.scheme else 1,
            last=length - 1 if last_only else -1,
        )
        status = self._library.openelm_compute(byref(self._struct), byref(step))
        if status == library.BAD_TOKEN:
            raise InputError(f"a token id is not below the model's {self._config.vocab_size}")
        _check(status)
        return logits

    def _buffers(self, cache: KVCache) -> _Buffers:
        """Where the buffers are; new ones become the cache's own, and are evaluated and contiguous.

        Raises:
            InputError: when they are of another model, or not in float32.
        """
        known = cache.addresses
        if isinstance(known, _Buffers) and known.network is self:
            return known
        cache.own()
        cache.buffers[:] = [tuple(map(mx.contiguous, buffer)) for buffer in cache.buffers]
        buffers = [*cache.buffers]
        mx.eval(buffers)
        batch, _, capacity, _ = buffers[0][0].shape
        if not cache.has_layout(self._config, mx.float32):
            raise InputError("the cache isn't one of float32 for a model of this geometry")
        structs = (library.Cache * len(buffers))(
            *(library.Cache(*map(_address, buffer)) for buffer in buffers)
        )
        cache.addresses = found = _Buffers(self, buffers, structs, batch, capacity, cache.scheme)
        return found


class _Buffers(NamedTuple):
    """A cache's buffers as the library sees them; they live as long as this does."""

    network: Network
    arrays: list[Buffer]
    structs: ctypes.Array[library.Cache]
    batch: int
    capacity: int
    scheme: Scheme | None


def _check(status: int) -> None:
    if status == library.NO_MEMORY:
        raise OpenELMError(
            "out of memory: give the prompt in shorter steps (prefill_step_size) or fewer sequences"
        )


class _Memory:
    """Arrays whose addresses the library knows: they live as long as this does."""

    def __init__(self) -> None:
        self._arrays: list[mx.array] = []

    def __call__(self, array: mx.array) -> int:
        """The address of an array's bytes, row after row."""
        flat = mx.view(mx.contiguous(array).reshape(-1), mx.uint8)
        mx.eval(flat)
        self._arrays.append(flat)
        return _address(flat)

    def floats(self, array: mx.array) -> int:
        """The address of the values in float32."""
        return self(array.astype(mx.float32))


def _matrix(matrix: Matrix, keep: _Memory) -> library.Matrix:
    scheme = matrix.scheme
    rows, columns = matrix.weight.shape
    if scheme is None:
        kind = KINDS[dtype_name(matrix.weight.dtype)]
        return library.Matrix(weight=keep(matrix.weight), kind=kind, rows=rows, columns=columns)
    assert matrix.scales is not None and matrix.biases is not None
    return library.Matrix(
        weight=keep(matrix.weight),
        scales=keep.floats(matrix.scales),
        biases=keep.floats(matrix.biases),
        kind=KINDS[scheme.bits],
        group=scheme.group_size,
        rows=rows,
        columns=columns * 32 // scheme.bits,
    )


def _address(array: mx.array) -> int:
    """Where the values of an evaluated, contiguous array are."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(array)))  # type: ignore[arg-type]
