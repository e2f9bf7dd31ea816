"""Token ids from users: checked before anything is indexed with them, as MLX checks no bounds."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from ..errors import InputError


def as_token_ids(ids: Any, vocab_size: int, what: str = "the prompt") -> mx.array:
    """Token ids [L], int32, from a list, tuple, NumPy or MLX array of integers.

    Raises:
        InputError: for anything but one flat sequence of integers in `range(vocab_size)`.
    """
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise InputError(f"{what} must be a sequence of token ids, not {type(ids).__name__}")
    checked = [_as_id(value, what) for value in values]
    for value in checked:
        if not 0 <= value < vocab_size:
            raise InputError(
                f"token id {_shown(value)} is not below the model's {vocab_size}"
                if value >= 0
                else f"token id {_shown(value)} is negative"
            )
    return mx.array(checked, mx.int32)


def as_prompt(ids: Any, vocab_size: int) -> mx.array:
    """Token ids [L], int32, L at least 1; see `as_token_ids`."""
    prompt = as_token_ids(ids, vocab_size)
    if prompt.size == 0:
        raise InputError("the prompt is empty")
    return prompt


def check_tokens(tokens: mx.array, vocab_size: int) -> None:
    """Refuse what can't be the tokens of a model; waits for them to be computed.

    Raises:
        InputError: for anything but integers [B, L] in `range(vocab_size)`, B and L at least 1.
    """
    if not isinstance(tokens, mx.array):
        raise InputError(f"tokens must be an MLX array [B, L], not {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.size == 0:
        raise InputError(f"tokens must have the shape [B, L], not {list(tokens.shape)}")
    if not mx.issubdtype(tokens.dtype, mx.integer):
        raise InputError(f"tokens must be integers, not {tokens.dtype}")
    for value in (tokens.min().item(), tokens.max().item()):
        if not 0 <= value < vocab_size:  # type: ignore[operator]
            raise InputError(f"token id {value} is not one of the model's {vocab_size}")


def _as_id(value: Any, what: str) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    kind = type(value).__name__
    hint = "; give each sequence by itself" if isinstance(value, list | tuple) else ""
    raise InputError(f"{what} must be a flat sequence of integers: it holds a {kind}{hint}")


def _shown(value: int) -> str:
    """An integer, the digits left out where nobody reads them (and Python refuses to print)."""
    return str(value) if value.bit_length() <= 64 else f"of {value.bit_length()} bits"
