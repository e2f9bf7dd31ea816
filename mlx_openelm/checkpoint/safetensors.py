"""Headers of safetensors files, checked against the file before anything of it is used.

A file is 8 bytes of header length, a JSON header, then the tensors end to end. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx

from ..dtypes import dtype_name
from ..errors import InputError
from ..files import file_size, parse_json, read_range, shown
from .names import canonical_name

# A header larger than this (bytes) is refused before it is read: those of OpenELM-3B's full
# training checkpoint have under 300 kB.
MAX_HEADER = 8 << 20
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**31 - 1  # MLX's shapes are int32

# The format's names for dtypes -> PyTorch's, and bits of an element
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1fn", 4),
}
BITS = dict(DTYPES.values())
_CODES = {name: code for code, (name, _) in DTYPES.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")  # dtypes that weights may have


def dtype_code(dtype: mx.Dtype) -> str:
    """The name that safetensors has for an MLX dtype, such as "BF16"."""
    return _CODES[dtype_name(dtype)]


class Stored(Protocol):
    """A tensor in a file."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def dtype(self) -> str:
        """PyTorch's name for its dtype (see `DTYPES`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes, first to last."""


@dataclass(frozen=True)
class Entry:
    """A tensor as a header has it: `nbytes` bytes of the file `path` from `offset`."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. Reads its header only.

    Of tensors that are one, safetensors' `save_model` stores one and puts the others' names into
    the metadata: `{"a.weight": "b.weight"}`. Those are found by both names.

    Raises:
        InputError: when the header is malformed, or doesn't fit the file exactly.
    """
    size = file_size(path)
    length = int.from_bytes(read_range(path, 0, min(size, 8)), "little")
    if length > size - 8:
        raise InputError(
            f"{path}: claims a header of {length} bytes, the file has {size}; it is truncated or "
            "not a safetensors file"
        )
    if length > MAX_HEADER:
        raise InputError(f"{path}: its header has {length} bytes, more than any model needs")
    text = read_range(path, 8, length)
    if not text.startswith(b"{"):
        raise InputError(f"{path}: its header doesn't begin with {{; not a safetensors file")
    header = parse_json(text, f"{path}: header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: its __metadata__ is not a map from text to text")
    tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    for name, stored in metadata.items():
        if stored in header and canonical_name(name):
            tensors.setdefault(name, tensors[stored])
    return tensors


def load_arrays(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file whose header was checked, read when they are evaluated.

    Raises:
        InputError: when MLX can't read it.
    """
    try:
        return cast("dict[str, mx.array]", mx.load(str(path)))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: MLX can't read it ({error})") from None


def check_shape(shape: tuple[int, ...], where: str) -> None:
    """Refuse a shape that no array of MLX can have.

    Raises:
        InputError: starting with `where`.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{where} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    if any(type(n) is not int or not 0 <= n <= MAX_DIMENSION for n in shape):
        raise InputError(f"{where} has the impossible shape {shown(list(shape))}")


def check_float(tensor: Stored) -> None:
    """Refuse a tensor that a network can't compute with.

    Raises:
        InputError: with the tensor's name and dtype.
    """
    if tensor.dtype not in FLOATS:
        raise InputError(
            f"tensor {shown(tensor.name)} is of {tensor.dtype}; weights have to be "
            "float32, float16 or bfloat16 (save the model unquantized)"
        )


def _entry(path: Path, name: str, entry: object, data: int, size: int) -> Entry:
    """A tensor from its entry in the header; the data starts at byte `data` of `size`."""
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: its entry needs dtype, shape and data_offsets, no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where}: unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        raise InputError(f"{where} has the impossible shape {shown(shape)}")
    check_shape(tuple(shape), where)
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise InputError(f"{where}: data_offsets are {shown(offsets)}, not two integers")
    start, end = offsets
    if not 0 <= start <= end:
        raise InputError(f"{where}: data_offsets {shown(offsets)} are out of order")
    if data + end > size:
        raise InputError(f"{where} ends at byte {end} of {size - data}; the file is truncated")
    known, bits = DTYPES[dtype]
    if 8 * (end - start) != math.prod(shape) * bits:
        raise InputError(f"{where}: {end - start} bytes are not {known} {shape}")
    return Entry(path, name, known, tuple(shape), data + start, end - start)


def _check_layout(path: Path, tensors: dict[str, Entry], data: int, size: int) -> None:
    """Refuse tensors that don't fill the file from byte `data` to its end, one after another."""
    reached = data
    for entry in sorted(tensors.values(), key=lambda e: (e.offset, e.nbytes, e.name)):
        if entry.offset != reached:
            problem = "overlaps the one before" if entry.offset < reached else "has a gap before it"
            raise InputError(f"{path}: tensor {shown(entry.name)} {problem}; the header is damaged")
        reached += entry.nbytes
    if reached != size:
        raise InputError(f"{path}: {size - reached} bytes at the end belong to no tensor")
