"""Readers of checkpoints, one per format; `open_source` chooses one."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_openelm.errors import InputError
from mlx_openelm.files import file_size, read_range

from .corenet import open_corenet
from .huggingface import open_bin, open_huggingface
from .lazy import LazyTensor, Source
from .safetensors_file import open_safetensors

__all__ = ["LazyTensor", "Source", "open_bin", "open_safetensors", "open_source"]


def open_source(path: Path, *, ema: bool = False) -> Source:
    """Open a checkpoint; its kind is recognised from its content. Reads headers only.

    A directory is one in Hugging Face's form; a file is PyTorch's or a safetensors file. `ema`
    takes the averaged weights of a full training checkpoint.

    Raises:
        InputError: when it is of no known kind, damaged, or names anything that could be run.
    """
    if os.path.isdir(path):
        source = open_huggingface(path)
    elif _is_safetensors(path):
        source = Source("safetensors file", path, open_safetensors(path))
    else:
        return open_corenet(path, ema=ema)
    if ema:
        raise InputError(f"{path}: only a full training checkpoint has averaged weights")
    return source


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with a length that it has room for, and JSON.

    Nothing else can be told from the length: its first bytes may be those of a pickle or a zip.
    """
    size = file_size(path)
    start = read_range(path, 0, min(size, 9))
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8
