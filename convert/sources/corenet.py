"""CoreNet's `.pt` files: a state dict, or a full training checkpoint that has one inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from mlx_openelm.errors import InputError
from mlx_openelm.files import shown

from .lazy import Source
from .torch_file import lazy_tensors, open_torch
from .unpickler import StoredTensor

MODEL, EMA = "model_state_dict", "ema_state_dict"
_SHOWN = 8  # keys in an error message


def open_corenet(path: Path, *, ema: bool = False) -> Source:
    """A `.pt` file. Of a training checkpoint, the model's weights, or with `ema` their average.

    A state dict alone under another key (`{"state_dict": …}`) is found too. Optimizer tensors are
    never read.

    Raises:
        InputError: when it can't be read (see `open_torch`) or holds no state dict, or several.
    """
    file = open_torch(path)
    if not isinstance(file.content, dict):
        kind = type(file.content).__name__
        raise InputError(f"{path}: holds a {kind}, not a state dict")
    kind, state = _state_dict(file.content, ema, path)
    return Source(kind, path, lazy_tensors(file, state))


def _state_dict(content: dict[Any, object], ema: bool, path: Path) -> tuple[str, dict[Any, object]]:
    """What the file is, in words, and its state dict."""
    distinct = {id(value): value for value in content.values()}  # a pickle may repeat one cheaply
    states = {key for key, value in distinct.items() if _is_state_dict(value)}
    inside: dict[Any, Any] = {key: v for key, v in content.items() if id(v) in states}
    if ema and EMA not in inside:
        raise InputError(f"{path}: has no averaged weights ({EMA})")
    if MODEL in inside or EMA in inside:
        key = EMA if ema or MODEL not in inside else MODEL
        return f"CoreNet training checkpoint ({key})", inside[key]
    if any(isinstance(value, StoredTensor) for value in content.values()):
        return "PyTorch state dict", content
    if len(inside) != 1:
        found = ", ".join(map(shown, list(inside)[:_SHOWN])) or "none"
        raise InputError(
            f"{path}: a state dict is needed, or one inside; found {found}; save the model's alone"
        )
    [(key, state)] = inside.items()
    return f"PyTorch checkpoint ({shown(key)})", state


def _is_state_dict(value: object) -> TypeGuard[dict[Any, object]]:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(v, StoredTensor) for v in value.values())
    )
