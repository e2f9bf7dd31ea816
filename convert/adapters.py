"""Adapters, merged into a checkpoint's weights as their rows are read.

What an adapter is, and the formats of directories, are the runtime's (`checkpoint/adapters.py`,
`checkpoint/adapter_files.py`). CoreNet saves an adapted model with its base weights in one file,
by the names that PEFT has in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_openelm.checkpoint.adapter_peft import Parts, Scale, updates
from mlx_openelm.checkpoint.adapters import Adapter, Update, by_canonical_names, merge
from mlx_openelm.checkpoint.safetensors import check_float
from mlx_openelm.config import OpenELMConfig, descend
from mlx_openelm.errors import InputError
from mlx_openelm.files import read_yaml, shown

from .sources import LazyTensor
from .sources.lazy import DTYPES, row_count

_ELEMENTS = 1 << 19  # of a matrix, in float64 at once

Float64 = npt.NDArray[np.float64]


def merge_adapter(
    base: Mapping[str, LazyTensor], adapter: Adapter[LazyTensor], config: OpenELMConfig
) -> tuple[dict[str, LazyTensor], OpenELMConfig, list[str]]:
    """The base with an adapter in it, computed in float64 as rows are read, in the base's dtype.

    Where tied embeddings are updated, the network's output still uses them as they were: so it
    is with CoreNet and PEFT while they train, and so the merged model is untied.

    Args:
        base: tensors by the names of a model directory.
        adapter: by its own names.
        config: the base's geometry.

    Returns:
        Tensors, geometry, and notes.

    Raises:
        InputError: when an adapter has no matrix to go to, or doesn't fit it; names it.
    """
    adapter, notes = by_canonical_names(adapter)
    merged, changed = merge(base, adapter, config, _add, _put)
    counts = {
        "the updates of {} matrices": len(adapter.updates),
        "{} tensors that replace the base's": len(adapter.tensors),
        "{} rows of tokens": sum(len(indices) for indices, _ in adapter.rows.values()),
    }
    done = ", ".join(text.format(count) for text, count in counts.items() if count)
    notes.append(f"merged {done or 'an empty adapter'}")
    if changed.vocab_size != config.vocab_size:
        notes.append(f"the adapter's embeddings have {changed.vocab_size} rows")
    if changed.share_input_output_layers != config.share_input_output_layers:
        notes.append(
            "the adapter changes the embeddings or the output matrix alone, so the merged model "
            "has both"
        )
    return merged, changed, notes


def corenet_adapter(
    path: Path, parts: Mapping[str, Parts[LazyTensor]], scale: Scale
) -> Adapter[LazyTensor]:
    """The adapter in a file of CoreNet, as `split` takes it out.

    Raises:
        InputError: when a part is missing.
    """
    return Adapter(path, "LoRA or DoRA adapter", updates(path, parts, scale), keeps_head=True)


def _put(base: LazyTensor, indices: list[int], values: LazyTensor) -> LazyTensor:
    check_float(values)
    place = {index: i for i, index in enumerate(indices)}

    def rows(start: int, stop: int) -> mx.array:
        part = base.rows(start, stop)
        with mx.stream(mx.cpu):  # a GPU has no float64
            for row in sorted(place.keys() & set(range(start, stop))):
                part[row - start] = values.rows(place[row], place[row] + 1)[0].astype(part.dtype)
            mx.eval(part)
        return part

    return LazyTensor(base.name, base.shape, base.dtype, rows)


def _add(base: LazyTensor, update: Update[LazyTensor]) -> LazyTensor:
    for tensor in (base, update.left, update.right, update.magnitude):
        if tensor is not None:
            check_float(tensor)

    @cache
    def columns() -> Float64:
        """The lengths of the sum's columns [columns]."""
        squares = np.zeros(base.shape[1])
        for start in range(0, base.shape[0], _step(base)):
            stop = min(start + _step(base), base.shape[0])
            squares += (_sum(base, update, start, stop) ** 2).sum(axis=0)
        return np.sqrt(squares)

    def rows(start: int, stop: int) -> mx.array:
        blocks = []
        for first in range(start, stop, _step(base)):
            last = min(first + _step(base), stop)
            with np.errstate(all="ignore"):  # what overflows is found when it is written
                block = _sum(base, update, first, last)
                if update.magnitude is not None:
                    lengths = _float64(update.magnitude).reshape(-1)
                    if update.by_column:
                        block *= lengths / columns()
                    else:
                        norms = np.sqrt((block**2).sum(axis=1))
                        block *= (lengths[first:last] / norms)[:, None]
            wide = mx.float64 if base.dtype == "float64" else mx.float32
            blocks.append(mx.array(block, dtype=wide).astype(DTYPES[base.dtype][1], stream=mx.cpu))
        merged = mx.concatenate(blocks, stream=mx.cpu)
        mx.eval(merged)
        return merged

    return LazyTensor(base.name, base.shape, base.dtype, rows)


def _step(base: LazyTensor) -> int:
    return max(1, _ELEMENTS // base.shape[1])


def _sum(base: LazyTensor, update: Update[LazyTensor], start: int, stop: int) -> Float64:
    """Rows of W + scale · left @ right, in float64."""
    if update.transposed:
        left, right = _float64(update.left)[:, start:stop].T, _float64(update.right).T
    else:
        left, right = _float64(update.left, start, stop), _float64(update.right)
    return _float64(base, start, stop) + update.scale * product(left, right)


def _float64(tensor: LazyTensor, start: int = 0, stop: int | None = None) -> Float64:
    rows = tensor.rows(start, row_count(tensor.shape) if stop is None else stop)
    wide = mx.float64 if tensor.dtype == "float64" else mx.float32
    return np.array(rows.astype(wide, stream=mx.cpu)).astype(np.float64)


def product(left: Float64, right: Float64) -> Float64:
    """left [m, rank] @ right [rank, n], the same bits whatever library multiplies.

    Both are cut into two integers an element, times a power of two that a row of `left` or a
    column of `right` has in common. The integers are so small that all sums of their products
    are below 2⁵³, which float64 has exactly, in any order (as in Ozaki, Ogita, Oishi and Rump,
    doi:10.1007/s11075-011-9478-1). Some 44 bits of the largest product are right.
    """
    bits = (52 - math.ceil(math.log2(max(1, left.shape[1])))) // 2
    left_high, left_low, left_unit = _integers(left, 1, bits)
    right_high, right_low, right_unit = _integers(right, 0, bits)
    low = left_high @ right_low + left_low @ right_high
    return (left_high @ right_high + np.ldexp(low, -bits)) * (left_unit * right_unit)


def _integers(x: Float64, axis: int, bits: int) -> tuple[Float64, Float64, Float64]:
    """(high, low, unit): x = (high + low / 2^bits) · unit, but for what is less than half a low."""
    _, exponent = np.frexp(np.abs(x).max(axis=axis, keepdims=True, initial=0))
    unit = np.ldexp(1.0, exponent - bits)
    high = np.rint(x / unit)
    return high, np.rint(np.ldexp(x / unit - high, bits)), unit


def corenet_scale(yaml: Path) -> Scale | None:
    """The scale that a CoreNet training YAML sets in `model.lora.config`; None if it doesn't.

    There, the first entry whose `regex` fits a module's name decides.

    Raises:
        InputError: when the file can't be read, or the scale of a module isn't there or makes no
            sense.
    """
    entries = descend(read_yaml(yaml), ("model", "lora")).get("config")
    if not isinstance(entries, list):
        return None

    def scale(module: str, rank: int) -> float:
        for entry in entries:
            try:
                if re.match(entry["regex"], module):
                    parameters = entry["params"]
                    alpha, stable = parameters["lora_alpha"], parameters.get("use_rslora")
                    return float(alpha) / (math.sqrt(rank) if stable else rank)
            except (KeyError, TypeError, ValueError, AttributeError, re.error):
                break
        raise InputError(f"{yaml}: model.lora.config doesn't say the lora_alpha of {shown(module)}")

    return scale
