"""A network whose step the C library computes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, cast
from typing import TYPE_CHECKING

import mlx.core as mx

from ...dtypes import dtype_name
from ...errors import InputError, OpenELMError
from . import library
from .library import KINDS

if TYPE_CHECKING:
    from ...cache import KVCache
    from ...config import OpenELMConfig
    from ...quantization import Matrix
    from ...weights import Weights

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
        self._vocab_size = config.vocab_size
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
            layers=cast(self._layers, POINTER(library.Layer)),
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
            InputError: when a token id is out of range.
            OpenELMError: when memory runs out.
        """
        batch, length = tokens.shape
        capacity = cache.capacity
        tokens = mx.contiguous(tokens.astype(mx.int32))
        logits = mx.zeros((batch, 1 if last_only else length, self._vocab_size))
        arrays = [tokens, logits]
        step = library.StepStruct(
            caches=_caches(cache),
            batch=batch,
            length=length,
            offset=cache.offset,
            slot=cache.offset,
            capacity=capacity,
            bits=cache.scheme.bits if cache.scheme else 32,
            group=cache.scheme.group_size if cache.scheme else 1,
            last=length - 1 if last_only else -1,
        )
        if cache.starts is not None:
            arrays.append(starts := mx.contiguous(cache.starts))
        if cache.max_size is not None:
            seen = cache.view(length)
            arrays += [mask := mx.contiguous(seen.mask[0].astype(mx.uint8)), seen.slot]
        mx.eval(arrays)
        step.tokens, step.logits = _address(tokens), _address(logits)
        if cache.starts is not None:
            step.starts = _address(starts)
        if cache.max_size is not None:
            step.mask, step.slot = _address(mask), seen.slot.item()
        status = self._library.openelm_compute(byref(self._struct), byref(step))
        if status == library.BAD_TOKEN:
            raise InputError(f"a token id is not below the model's {self._vocab_size}")
        _check(status)
        return logits


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


def _caches(cache: KVCache) -> ctypes.Array[library.Cache]:
    """Where the buffers are; new ones become the cache's own, and are evaluated and contiguous."""
    if cache.addresses is None:
        cache.own()
        cache.buffers[:] = [tuple(map(mx.contiguous, buffer)) for buffer in cache.buffers]
        mx.eval(cache.buffers)
        cache.addresses = (library.Cache * len(cache.buffers))(
            *(library.Cache(*map(_address, buffer)) for buffer in cache.buffers)
        )
    structs: ctypes.Array[library.Cache] = cache.addresses
    return structs


def _address(array: mx.array) -> int:
    """Where the values of an evaluated, contiguous array are."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(array)))  # type: ignore[arg-type]
