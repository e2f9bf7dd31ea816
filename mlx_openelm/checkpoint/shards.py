"""Writes safetensors in shards: the same bytes for the same tensors, a block of rows at a time.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from ..files import sync
from .safetensors import dtype_code

SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Spec:
    """What a tensor will be, before it is there."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.size


def raw(array: mx.array) -> memoryview:
    """The bytes of an array: little-endian, row after row; evaluates it, doesn't copy it."""
    flat = mx.reshape(array, (-1,), stream=mx.cpu)
    return memoryview(mx.view(flat, mx.uint8, stream=mx.cpu))  # type: ignore[arg-type]


@contextmanager
def new_shards(
    directory: Path,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    limit: int = SHARD_BYTES,
) -> Iterator[Callable[[str, memoryview], None]]:
    """Files in `directory` for the tensors of `specs`, none with more than `limit` bytes of data.

    One file is `model.safetensors`; several have Hugging Face's names and an index. (A tensor
    larger than `limit` has a file of its own.)

    Yields:
        `write(name, data)`, to be called with the bytes (see `raw`) of each tensor from its first
        row to its last; tensors may take turns. At the end everything has reached the disk.

    Raises:
        OSError: when a file can't be written.
        ValueError: at the end, when a tensor isn't complete.
    """
    shards = _shards(specs, limit)
    places: dict[str, _Place] = {}
    with ExitStack() as stack:
        files = []
        for name, shard in shards.items():
            file = stack.enter_context((directory / name).open("wb", buffering=0))
            files.append(file)
            start = _write_header(file, shard, metadata)
            for tensor, spec in shard.items():
                places[tensor] = _Place(file, start, start + spec.nbytes)
                start += spec.nbytes
        yield lambda name, data: places[name].write(data)
        unfinished = [name for name, place in places.items() if place.at != place.end]
        if unfinished:
            raise ValueError(f"tensor {unfinished[0]} is not complete")
        for file in files:
            sync(file.fileno())
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / "model.safetensors.index.json", index)


@dataclass
class _Place:
    """Where a tensor's next byte goes, and where its last one ends."""

    file: BinaryIO
    at: int
    end: int

    def write(self, data: memoryview) -> None:
        if self.at + len(data) > self.end:
            raise ValueError(f"{len(data)} bytes more than the {self.end - self.at} expected")
        while data:
            written = os.pwrite(self.file.fileno(), data, self.at)
            self.at += written
            data = data[written:]


def _shards(specs: Mapping[str, Spec], limit: int) -> dict[str, dict[str, Spec]]:
    """File name → its tensors; those with larger elements come first, so that all are aligned."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    shards = [dict(sorted(s.items(), key=lambda item: -item[1].dtype.size)) for s in shards]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _write_header(file: BinaryIO, shard: Mapping[str, Spec], metadata: Mapping[str, str]) -> int:
    """Write the header; returns the offset of the data, in bytes, a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in shard.items():
        offsets = [offset, offset + spec.nbytes]
        dtype = dtype_code(spec.dtype)
        header[name] = {"dtype": dtype, "shape": spec.shape, "data_offsets": offsets}
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    return 8 + len(encoded)


def write_json(path: Path, values: Any) -> None:
    """Write JSON for people and machines: indented, UTF-8, a newline at the end."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
