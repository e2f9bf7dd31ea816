"""Which model this is: a hash of its configuration and of all its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from os import cpu_count

import mlx.core as mx

from ..checkpoint.shards import raw
from ..model.openelm import OpenELM


def fingerprint(model: OpenELM | str) -> str:
    """SHA-256, in hexadecimal, of the configuration and of the weights as they are in memory.

    A text is a fingerprint already (see `KVCache.made_for`), and returned as it is.

    Every bit of every weight counts, and where it is: no change of values, of their signs or of
    their order keeps the fingerprint. Processors with instructions for SHA-256 (all of Apple
    silicon) hash about 2 GB/s a core, and several tensors are hashed at once.
    """
    from concurrent.futures import ThreadPoolExecutor
    from hashlib import sha256

    if isinstance(model, str):
        return model
    values = {"config": model.config.to_dict()}
    whole = sha256(json.dumps(values, sort_keys=True).encode())
    threads = min(cpu_count() or 1, 8)
    tensors = iter(sorted(model.parameters().items()))
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(_bytes(tensors), 2 * threads)):  # copies of few exist at a time
            for name, digest in pool.map(_digest, some):
                whole.update(name.encode() + digest)
    return whole.hexdigest()


def _bytes(tensors: Iterator[tuple[str, mx.array]]) -> Iterator[tuple[str, memoryview]]:
    for name, array in tensors:
        yield f"{name} {array.dtype} {array.shape}", raw(mx.contiguous(array))


def _digest(tensor: tuple[str, memoryview]) -> tuple[str, bytes]:
    from hashlib import sha256

    return tensor[0], sha256(tensor[1]).digest()
