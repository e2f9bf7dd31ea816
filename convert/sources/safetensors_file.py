"""Safetensors files, read a block of rows at a time."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_openelm.checkpoint.safetensors import Entry, check_float, read_header
from mlx_openelm.files import read_range

from .lazy import DTYPES, LazyTensor, item_size, to_array


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file. Reads its header only.

    Raises:
        InputError: as `read_header`.
    """
    return {
        name: LazyTensor(entry.name, entry.shape, entry.dtype, partial(_rows, entry))
        for name, entry in read_header(path).items()
    }


def _rows(entry: Entry, start: int, stop: int) -> mx.array:
    if entry.dtype not in DTYPES:
        check_float(entry)
    shape = (stop - start, *entry.shape[1:])
    size = math.prod(entry.shape[1:]) * item_size(entry.dtype)
    raw = read_range(entry.path, entry.offset + start * size, (stop - start) * size)
    return to_array(raw, entry.dtype, shape, entry.name)
