"""A prompt cache in a file: safetensors, complete or not there, and checked before it is used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx

from ..checkpoint.safetensors import dtype_code
from ..checkpoint.shards import raw
from ..config import OpenELMConfig
from ..errors import InputError
from ..files import open_file, parse_json, replacing, user_path
from ..model.cache import KVCache

FORMAT = "mlx-openelm prompt cache 2"
MAX_HEADER = 16 << 20
"""Bytes. A header says the name and shape of some arrays a layer, and the tokens."""

_FLOATS = {dtype_code(dtype): dtype for dtype in (mx.float32, mx.float16, mx.bfloat16)}


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
        cache: keys and values; its `made_for` is the model's fingerprint.
        tokens: the text that they are of; None when the writer didn't know it.
        metadata: what the user stored with it.
    """

    cache: KVCache
    tokens: list[int] | None
    metadata: dict[str, str]


def write_cache(
    file: str | Path,
    cache: KVCache,
    fingerprint: str,
    *,
    tokens: list[int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a cache of one sequence; the file appears, or is replaced, when all of it is on disk.

    Args:
        file: its name.
        cache: the keys and values.
        fingerprint: of the model that computed them.
        tokens: the text that they are of; only their positions are written.
        metadata: strings to keep with it.

    Raises:
        InputError: when it can't be written there, or the cache or the metadata can't be saved.
    """
    file = user_path(file)
    if cache.ring is not None:
        raise InputError("a context that slides (max_kv_size) can't be saved")
    if cache.batch not in (None, 1):
        raise InputError(f"a cache of {cache.batch} sequences can't be saved")
    metadata = dict(metadata or {})
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise InputError("the metadata of a prompt cache must be strings by name")
    length = cache.length if tokens is None else min(cache.length, len(tokens))
    arrays = {name: raw(mx.contiguous(array)) for name, array in cache.used(length).items()}
    values = {
        "format": FORMAT,
        "model": fingerprint,
        "config": json.dumps(cache.config.to_dict()),
        "dtype": dtype_code(cache.dtype),
        "kv": json.dumps([cache.scheme.bits, cache.scheme.group_size] if cache.scheme else None),
        "length": str(length),
        "tokens": json.dumps(None if tokens is None else tokens[:length]),
        "metadata": json.dumps(metadata),
    }
    entries: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in cache.layout(length).items():
        start, end = end, end + len(arrays[name])
        entries[name] = {"dtype": dtype_code(dtype), "shape": shape, "data_offsets": [start, end]}
    values["sha256"] = _digest(values, entries, arrays)
    header = json.dumps({"__metadata__": values, **entries}).encode()
    header += b" " * (-len(header) % 8)
    try:
        with replacing(file) as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for array in arrays.values():
                out.write(array)
    except OSError as error:
        raise InputError(f"{file}: can't be written ({error.strerror})") from None


def read_cache(file: str | Path) -> Saved:
    """Read what `write_cache` has written. Nothing is taken from a file that isn't all as it was.

    Raises:
        InputError: when it can't be read, isn't such a file, or is damaged.
    """
    file = user_path(file)
    try:
        with open_file(file) as opened:
            return _read(file, opened)
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror})") from None


def _read(file: Path, opened: BinaryIO) -> Saved:
    not_one = InputError(f"{file}: not a prompt cache that this version has written")
    damaged = InputError(f"{file}: a damaged prompt cache; delete it")
    size = os.fstat(opened.fileno()).st_size
    length = int.from_bytes(opened.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise not_one
    try:
        entries = parse_json(opened.read(length), str(file))
    except InputError:
        raise not_one from None
    values = entries.pop("__metadata__", None)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise not_one
    try:
        digest = values.pop("sha256")
        cache, tokens, positions, metadata = _described(values)
    except (KeyError, TypeError, ValueError, RecursionError):  # InputError is a ValueError
        raise damaged from None
    end = 0
    expected: dict[str, Any] = {}
    for name, (shape, dtype) in cache.layout(positions).items():
        start, end = end, end + math.prod(shape) * dtype.size
        expected[name] = {
            "dtype": dtype_code(dtype),
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    if entries != expected or size != 8 + length + end:
        raise damaged
    data = {}
    for name, entry in expected.items():
        start, end = entry["data_offsets"]
        data[name] = opened.read(end - start)
        if len(data[name]) != end - start:
            raise damaged
    if digest != _digest(values, expected, data):
        raise damaged
    arrays = {}
    for name, (shape, dtype) in cache.layout(positions).items():
        integers: Any = memoryview(data.pop(name)).cast("H" if dtype.size == 2 else "I")
        arrays[name] = mx.array(integers).view(dtype).reshape(shape)
    cache.restore(arrays, positions)
    return Saved(cache, tokens, metadata)


def _described(values: dict[str, str]) -> tuple[KVCache, list[int] | None, int, dict[str, str]]:
    """An empty cache of the kind that the metadata describe, the tokens, positions and metadata.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: when they are wrong.
    """
    geometry = json.loads(values["config"])
    if not isinstance(geometry, dict):
        raise ValueError("config")
    config = OpenELMConfig.from_dict(geometry, "config")
    kv, tokens, metadata = (json.loads(values[name]) for name in ("kv", "tokens", "metadata"))
    bits, group_size = kv or (None, None)
    cache = KVCache(config, None, _FLOATS[values["dtype"]], bits, group_size=group_size)
    cache.made_for = values["model"]
    length = int(values["length"])
    if not 0 <= length <= config.max_context_length:
        raise ValueError("length")
    if tokens is not None and (
        len(tokens) != length
        or not all(type(token) is int and 0 <= token < config.vocab_size for token in tokens)
    ):
        raise ValueError("tokens")
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts or not all(isinstance(value, str) for value in values.values()):
        raise ValueError("metadata")
    return cache, tokens, length, metadata


def _digest(
    values: Mapping[str, str], entries: Mapping[str, Any], data: Mapping[str, bytes | memoryview]
) -> str:
    from hashlib import sha256

    whole = sha256(json.dumps([values, entries], sort_keys=True).encode())
    for name in entries:
        whole.update(data[name])
    return whole.hexdigest()
