"""What every source yields, tensors that are read when asked for, and how their bytes are read."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.quantization import Quantization

# A directory, header or pickle larger than this (bytes) is refused before it is read: those of
# OpenELM-3B's full training checkpoint have under 300 kB.
MAX_HEADER = 8 << 20
BLOCK_BYTES = 8 << 20  # of a tensor, in memory at once while converting
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**31 - 1  # MLX's shapes are int32

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

    `name` is the source's name for it, `dtype` a key of `DTYPES`, the one it is stored in.
    `rows(start, stop)` gives that part of the first axis (a scalar is one row) in that dtype,
    contiguous; nothing of its data is read before. Reading raises `InputError` when the data is
    damaged or gone; damage to one row may show only when all have been read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], mx.array]

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return math.prod(self.shape) * item_size(self.dtype)

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
    `tokenizer` is a SentencePiece file or a `tokenizer.json`.
    """

    kind: str
    path: Path
    tensors: dict[str, LazyTensor]
    config: OpenELMConfig | None = None
    tokenizer: Path | None = None
    quantization: Quantization | None = None


def item_size(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(DTYPES[dtype][0]).itemsize


def shown(text: object) -> str:
    """A stranger's text (a name, say), fit for one line of an error message."""
    text = str(text)
    return repr(text if len(text) <= 100 else text[:100] + "…")


def check_shape(shape: tuple[int, ...], where: str) -> None:
    """Refuse a shape that no array of MLX can have.

    Raises:
        InputError: starting with `where`.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{where} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    if any(type(n) is not int or not 0 <= n <= MAX_DIMENSION for n in shape):
        raise InputError(f"{where} has the impossible shape {shown(list(shape))}")


def file_size(path: Path) -> int:
    """Bytes of a regular file.

    Raises:
        InputError: when there is no such file, or it isn't a regular one.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        _unreadable(path, error)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    return status.st_size


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` (both in bytes; the range must lie in the file).

    Raises:
        InputError: when the file can't be read, or has become shorter.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        _unreadable(path, error)
    if len(data) < size:
        raise InputError(f"{path}: ends at byte {offset + len(data)}; it is truncated")
    return data


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


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in bytes; stricter than `json`: no key twice, no huge integers.

    Raises:
        InputError: starting with `where`.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8; it is damaged") from None
    except RecursionError:
        raise InputError(f"{where}: not usable JSON (nested too deeply)") from None
    except ValueError as error:
        raise InputError(f"{where}: not usable JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: holds a JSON {type(values).__name__}, not an object")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most `MAX_HEADER` bytes (see `parse_json`).

    Raises:
        InputError: when it can't be read or isn't one.
    """
    size = file_size(path)
    if size > MAX_HEADER:
        raise InputError(f"{path}: has {size} bytes; no such file needs more than {MAX_HEADER}")
    return parse_json(read_range(path, 0, size), str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{shown(key)} is there twice")
        values[key] = value
    return values


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _unreadable(path: Path, error: Exception) -> NoReturn:
    reason = error.strerror if isinstance(error, OSError) else None
    raise InputError(f"{path}: can't be read ({reason or error})") from None
