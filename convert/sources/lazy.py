"""What every source yields, tensors that are read when asked for, and how their bytes are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_openelm.checkpoint.safetensors import BITS
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.files import shown
from mlx_openelm.model.quantization import Quantization

BLOCK_BYTES = 8 << 20  # of a tensor, in memory at once while converting

# dtype -> how NumPy sees its bytes, and what MLX makes of them
DTYPES: dict[str, tuple[str, mx.Dtype]] = {
    "float64": ("<f8", mx.float64),
    "float32": ("<f4", mx.float32),
    "float16": ("<f2", mx.float16),
    "bfloat16": ("<u2", mx.bfloat16),
    "int64": ("<i8", mx.int64),
    "int32": ("<i4", mx.int32),
    "int16": ("<i2", mx.int16),
    "int8": ("|i1", mx.int8),
    "uint64": ("<u8", mx.uint64),
    "uint32": ("<u4", mx.uint32),
    "uint16": ("<u2", mx.uint16),
    "uint8": ("|u1", mx.uint8),
    "bool": ("|b1", mx.bool_),
    "complex64": ("<c8", mx.complex64),
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a source: what it is, and how to get it, whole or by rows.

    `name` is the source's name for it, `dtype` the one it is stored in, by PyTorch's name.
    `rows(start, stop)` gives that part of the first axis (a scalar is one row) in that dtype,
    contiguous; nothing of its data is read before. Reading raises `InputError` when the data is
    damaged or gone, or `DTYPES` doesn't have the dtype; damage to one row may show only when all
    have been read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], mx.array]

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def read(self) -> mx.array:
        """The whole tensor."""
        return self.rows(0, row_count(self.shape)).reshape(self.shape)

    def blocks(self, nbytes: int = BLOCK_BYTES) -> Iterator[mx.array]:
        """The whole tensor from its first row to its last, about `nbytes` at a time."""
        count = row_count(self.shape)
        step = max(1, count * nbytes // max(1, self.nbytes))
        for start in range(0, max(1, count), step):
            yield self.rows(start, min(start + step, count))


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of an array of this shape; a scalar counts as one."""
    return shape[0] if shape else 1


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened: only its headers have been read.

    `kind` says what it is in words. `tensors` has the source's names, each quantized matrix as
    what it stands for, and `quantization` how that was done. What a source doesn't have is None;
    `tokenizer` is a SentencePiece file or a `tokenizer.json`. `notes` are for the person.
    `adapters` are the directories of those that are merged into it, the last one first: their
    tokenizer, chat template and generation config come before those in `path`.
    """

    kind: str
    path: Path
    tensors: dict[str, LazyTensor]
    config: OpenELMConfig | None = None
    tokenizer: Path | None = None
    quantization: Quantization | None = None
    notes: list[str] = field(default_factory=list)
    adapters: tuple[Path, ...] = ()


def item_size(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(DTYPES[dtype][0]).itemsize


def to_array(raw: bytes, dtype: str, shape: tuple[int, ...], name: str) -> mx.array:
    """The MLX array in a tensor's bytes.

    Raises:
        InputError: when the tensor has no elements.
    """
    if not raw:
        raise InputError(f"tensor {shown(name)} has no elements (shape {list(shape)})")
    numpy_dtype, mlx_dtype = DTYPES[dtype]
    values = np.frombuffer(raw, numpy_dtype).reshape(shape)
    if dtype == "bfloat16":
        return mx.array(values).view(mlx_dtype)
    return mx.array(values, dtype=mlx_dtype)
