"""A directory with `config.json` beside its weights: Hugging Face, mlx-lm, Apple's MLX example.

They differ in the file's name and in the tensors' names, which `names` knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.files import find_in, read_json, shown
from mlx_openelm.quantization import Quantization

from .lazy import MAX_HEADER, LazyTensor, Source
from .quantized import dequantized
from .safetensors_file import open_safetensors
from .torch_file import lazy_tensors, open_torch


def open_huggingface(path: Path) -> Source:
    """A directory in Hugging Face's form, its weights in one file or in shards with an index.

    Raises:
        InputError: when weights are missing, or a file is damaged; says which.
    """
    name, tensors = _find_weights(path)
    config = path / "config.json"
    tokenizers = (find_in(path, name) for name in ("tokenizer.model", "tokenizer.json"))
    quantization = _quantization(config) if config.exists() else None
    tensors = dequantized(tensors, quantization, str(path))
    return Source(
        _kind(name, config, quantization),
        path,
        tensors,
        OpenELMConfig.from_json(config) if config.exists() else None,
        next(filter(None, tokenizers), None),
        quantization,
    )


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """A directory's tensors as they are stored, quantized ones in their parts.

    Raises:
        InputError: as `open_huggingface`.
    """
    return _find_weights(path)[1]


def _find_weights(path: Path) -> tuple[str, dict[str, LazyTensor]]:
    """The name of the file (or of the one that was cut into shards), and the tensors."""
    for name, opener in WEIGHTS.items():
        if os.path.exists(path / name):
            return name, opener(path / name)
        index = path / f"{name}.index.json"
        if os.path.exists(index):
            return name, open_shards(index, opener)
    raise InputError(
        f"{path}: no weights in it: {' or '.join(WEIGHTS)} is needed, or its .index.json (for a "
        "CoreNet checkpoint, name the .pt file itself)"
    )


def _quantization(config: Path) -> Quantization | None:
    values = read_json(config)
    stored = values.get("quantization") or values.get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise InputError(f"{config}: quantization is {shown(stored)}, not an object")
    return Quantization.from_dict(stored, str(config))


def _kind(name: str, config: Path, quantization: Quantization | None) -> str:
    if name == APPLE_MLX:
        whose = "MLX directory of Apple's example"
    else:
        mlx = quantization is not None or os.path.exists(config.with_name("conversion.json"))
        whose = "MLX directory" if mlx else "Hugging Face directory"
    how = f", quantized to {quantization.default.bits} bits" if quantization else ""
    return f"{whose} ({name}{how})"


def open_shards(
    index: Path, opener: Callable[[Path], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    """The tensors of all files that an index names, which must agree with it exactly.

    Raises:
        InputError: when a shard is missing or lies outside the directory, or a tensor is missing,
            in two shards, or not in the index.
    """
    places = read_json(index, MAX_HEADER).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise InputError(f"{index}: its weight_map is missing or is no map from text to text")
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(places.values())):
        if shard in ("", ".", "..") or Path(shard).name != shard:
            raise InputError(f"{index}: names {shown(shard)}, which is not a file beside it")
        if not os.path.isfile(index.parent / shard):
            raise InputError(f"{index}: the shard {shown(shard)} is missing; download it too")
        for name, tensor in opener(index.parent / shard).items():
            if places.get(name) != shard:
                raise InputError(
                    f"{index}: tensor {shown(name)} is in {shown(shard)}, but the index says "
                    f"{shown(places[name]) if name in places else 'nothing of it'}"
                )
            tensors[name] = tensor
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise InputError(
            f"{index}: tensor {shown(missing[0])} is not in {shown(places[missing[0]])}, though "
            "the index says so"
        )
    return tensors


def open_bin(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `.bin`, which is a state dict that torch.save wrote.

    Raises:
        InputError: as `open_torch` does, or when it holds something else.
    """
    file = open_torch(path)
    if not isinstance(file.content, dict):
        raise InputError(f"{path}: holds a {type(file.content).__name__}, not a state dict")
    return lazy_tensors(file, file.content)


APPLE_MLX = "weights.safetensors"
# In the order in which transformers looks for them; the last one is of Apple's MLX example
WEIGHTS: dict[str, Callable[[Path], dict[str, LazyTensor]]] = {
    "model.safetensors": open_safetensors,
    "pytorch_model.bin": open_bin,
    APPLE_MLX: open_safetensors,
}
