"""Reads adapter directories: Hugging Face PEFT's and mlx-lm's.

Both have an `adapter_config.json`; beside it lies PEFT's `adapter_model.safetensors` (or `.bin`)
or mlx-lm's `adapters.safetensors`. A directory may have a tokenizer of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import InputError
from ..files import find_in, read_json
from .adapter_mlx import mlx_adapter
from .adapter_peft import peft_adapter
from .adapter_settings import CONFIG
from .adapters import Adapter, T
from .safetensors import check_float, load_arrays, read_header
from .weight_files import has_weights

_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MLX_FILE = "adapters.safetensors"
# What a directory's tensors are read with, by the ending of the file's name
Readers = Mapping[str, Callable[[Path], dict[str, T]]]


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter's directory. One that has a model's weights is the model's.

    Raises:
        InputError: when it has a link that leads out of it.
    """
    if not path.is_dir() or find_in(path, CONFIG) is None:
        return False
    return not has_weights(path)


def open_adapter(path: Path, readers: Readers[T], alpha: float | None = None) -> Adapter[T]:
    """Open an adapter directory.

    Args:
        path: the directory.
        readers: of the files that can be read here.
        alpha: in place of the one that the settings have.

    Raises:
        InputError: when a file is missing or damaged, or a setting needs what isn't done here;
            names it.
    """
    config = find_in(path, CONFIG)
    if config is None:
        raise InputError(f"{path}: no adapter in it: {CONFIG} is missing")
    settings = read_json(config, 1 << 20)
    if "peft_type" in settings:
        return peft_adapter(path, settings, _read(path, _PEFT_FILES, readers), alpha)
    if find_in(path, "adapters.npz") and not find_in(path, _MLX_FILE):
        raise InputError(
            f"{path}: adapters.npz is an old format of mlx-lm; save it again: "
            "mx.save_safetensors('adapters.safetensors', mx.load('adapters.npz'))"
        )
    return mlx_adapter(path, settings, _read(path, (_MLX_FILE,), readers), alpha)


def read_safetensors(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, read when they are evaluated.

    Raises:
        InputError: when it isn't one, or a tensor isn't floating point.
    """
    entries = read_header(file)
    for entry in entries.values():
        try:
            check_float(entry)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    arrays = load_arrays(file)
    return {name: arrays[entry.name] for name, entry in entries.items()}


def _read(path: Path, names: tuple[str, ...], readers: Readers[T]) -> dict[str, T]:
    for name in names:
        file, reader = find_in(path, name), readers.get(Path(name).suffix)
        if file is not None and reader is None:
            raise InputError(
                f"{file}: only safetensors files are read here; merge the adapter into its base: "
                "openelm-convert ADAPTER --base BASE -o DIR"
            )
        if file is not None and reader is not None:
            return reader(file)
    raise InputError(f"{path}: no adapter in it: {' or '.join(names)} is needed")
