"""Reads safetensors: 8 bytes of header length, a JSON header, then the tensors end to end.

Everything the header says is checked against the file before a tensor can be read. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_openelm.errors import InputError
from mlx_openelm.files import file_size, parse_json, read_range, shown

from .lazy import MAX_HEADER, LazyTensor, check_shape, item_size, to_array

# The format's names for dtypes
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file. Reads its header only.

    Raises:
        InputError: when the header is malformed, or doesn't fit the file exactly.
    """
    size = file_size(path)
    length = int.from_bytes(read_range(path, 0, 8), "little")
    if length > size - 8:
        raise InputError(
            f"{path}: claims a header of {length} bytes, the file has {size}; it is truncated or "
            "not a safetensors file"
        )
    if length > MAX_HEADER:
        raise InputError(f"{path}: its header has {length} bytes, more than any model needs")
    header = parse_json(read_range(path, 8, length), f"{path}: header")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: its __metadata__ is not a map from text to text")

    data = size - 8 - length
    tensors = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        where = f"{path}: tensor {shown(name)}"
        dtype, shape, start, end = _entry(entry, where)
        if end > data:
            raise InputError(f"{where} ends at byte {end} of {data}; the file is truncated")
        if end - start != math.prod(shape) * item_size(dtype):
            raise InputError(f"{where}: {end - start} bytes are not {dtype} {list(shape)}")
        rows = partial(_rows, path, 8 + length + start, dtype, shape, name)
        tensors[name] = LazyTensor(name, shape, dtype, rows)
        ranges.append((start, end, name))

    reached = 0
    for start, end, name in sorted(ranges):
        if start != reached:
            problem = "overlaps the one before" if start < reached else "has a gap before it"
            raise InputError(f"{path}: tensor {shown(name)} {problem}; the header is damaged")
        reached = end
    if reached != data:
        raise InputError(f"{path}: {data - reached} bytes at the end belong to no tensor")
    return tensors


def _entry(entry: object, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte (excluded) of a tensor, as its header entry has them."""
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
    if not 0 <= offsets[0] <= offsets[1]:
        raise InputError(f"{where}: data_offsets {shown(offsets)} are out of order")
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _rows(
    path: Path, offset: int, dtype: str, shape: tuple[int, ...], name: str, start: int, stop: int
) -> mx.array:
    part = (stop - start, *shape[1:])
    size = math.prod(shape[1:]) * item_size(dtype)
    raw = read_range(path, offset + start * size, (stop - start) * size)
    return to_array(raw, dtype, part, name)
