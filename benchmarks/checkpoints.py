"""Random checkpoints of the published shapes: speed doesn't depend on the values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.convert.checkpoint import Checkpoint
from mlx_openelm.convert.export.corenet import write_corenet
from mlx_openelm.convert.sources import LazyTensor, Source
from mlx_openelm.model.shapes import tensor_shapes

_VALUES = 1 << 21  # random numbers that are made; they repeat


def random_checkpoint(config: OpenELMConfig) -> Checkpoint:
    """A network's tensors in float32: normal with deviation 0.02, and norms of 1."""
    values = mx.random.normal((_VALUES,), scale=0.02, key=mx.random.key(0))
    tensors = {
        name: LazyTensor(name, shape, "float32", partial(_rows, values, shape))
        for name, shape in tensor_shapes(config).items()
    }
    return Checkpoint(Source("random", Path("random"), tensors), tensors, config, [])


def _rows(values: mx.array, shape: tuple[int, ...], start: int, stop: int) -> mx.array:
    part = (stop - start, *shape[1:])
    if len(shape) == 1:
        return mx.ones(part)
    count = math.prod(part)
    return mx.tile(values, -(-count // values.size))[:count].reshape(part)


def widened(
    tensors: Mapping[str, LazyTensor], config: OpenELMConfig, times: int
) -> tuple[dict[str, LazyTensor], OpenELMConfig]:
    """A network that says the same, its feed-forward layers so many times as wide, with zeros."""
    wide = replace(config, ffn_multipliers=tuple(times * m for m in config.ffn_multipliers))
    shapes = tensor_shapes(wide)
    made = {
        name: replace(tensor, shape=shapes[name], rows=partial(_padded, tensor, shapes[name]))
        for name, tensor in tensors.items()
    }
    return made, wide


def _padded(tensor: LazyTensor, shape: tuple[int, ...], start: int, stop: int) -> mx.array:
    if shape == tensor.shape:
        return tensor.rows(start, stop)
    values = tensor.read()
    parts = [values] if values.shape[0] == shape[0] else mx.split(values, 2)  # gate and up
    rows, columns = parts[0].shape
    missing = [(0, shape[0] // len(parts) - rows), (0, shape[1] - columns)]
    return mx.concatenate([mx.pad(part, missing) for part in parts])[start:stop]


def write_pt(config: OpenELMConfig, out: Path) -> None:
    """A float32 state dict as CoreNet saves it, and its YAML beside it."""
    write_corenet(random_checkpoint(config), out, "float32", True)
