"""Prompt caches by the functions of `mlx_lm.models.cache`.

A prompt cache is a list, as there, but with one `KVCache` for all layers. Pass it to `generate`,
`stream_generate` or `generate_step` as `prompt_cache`: the prompt follows what it holds, and the
prompt and all tokens that are given out are added to it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

from ..errors import InputError
from ..generation.options import given_cache
from ..model.cache import KVCache
from ..model.openelm import OpenELM
from ..prompt_cache.cache_file import read_cache, write_cache

__all__ = [
    "KVCache",
    "can_trim_prompt_cache",
    "load_prompt_cache",
    "make_prompt_cache",
    "save_prompt_cache",
    "trim_prompt_cache",
]


def make_prompt_cache(model: OpenELM, max_kv_size: int | None = None) -> list[KVCache]:
    """An empty prompt cache for a model.

    Args:
        max_kv_size: let the context slide (see `KVCache`).

    Raises:
        InputError: when `max_kv_size` is too small.
    """
    return [model.make_cache(max_kv_size)]


def save_prompt_cache(
    file_name: str | Path, cache: Sequence[KVCache], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a prompt cache into a safetensors file, which appears when it is complete.

    Args:
        file_name: the file's name, as it is to be.
        metadata: strings to keep with it.

    Raises:
        InputError: when it can't be written there, the context slides, or the cache wasn't made by
            `make_prompt_cache` (then nothing says which model it is of).
    """
    from ..prompt_cache.fingerprint import fingerprint

    one = given_cache(cache)
    if one.made_for is None:
        raise InputError("a cache that no model made can't be saved; use make_prompt_cache(model)")
    write_cache(file_name, one, fingerprint(one.made_for), metadata=metadata)


@overload
def load_prompt_cache(
    file_name: str | Path, return_metadata: Literal[False] = False
) -> list[KVCache]: ...
@overload
def load_prompt_cache(
    file_name: str | Path, return_metadata: Literal[True]
) -> tuple[list[KVCache], dict[str, str]]: ...
def load_prompt_cache(
    file_name: str | Path, return_metadata: bool = False
) -> list[KVCache] | tuple[list[KVCache], dict[str, str]]:
    """Read a prompt cache, and the metadata that were saved with it.

    A generation with another model than the one it was saved for refuses it.

    Raises:
        InputError: when the file can't be read, or is damaged.
    """
    saved = read_cache(file_name)
    return ([saved.cache], saved.metadata) if return_metadata else [saved.cache]


def can_trim_prompt_cache(cache: Sequence[KVCache]) -> bool:
    """Whether `trim_prompt_cache` can forget any number of tokens."""
    return all(one.is_trimmable() for one in cache)


def trim_prompt_cache(cache: Sequence[KVCache], num_tokens: int) -> int:
    """Forget the last `num_tokens` tokens, or all when there are fewer.

    Returns:
        How many were forgotten; 0 when the cache can't be trimmed.

    Raises:
        InputError: when `num_tokens` is negative.
        TypeError: when it isn't an integer.
    """
    if operator.index(num_tokens) < 0:
        raise InputError(f"num_tokens must be at least 0, not {num_tokens}")
    if not cache or not can_trim_prompt_cache(cache):
        return 0
    counts = []
    for one in cache:
        one.settle()
        counts.append(one.trim(min(num_tokens, one.offset)))
    return counts[0]
