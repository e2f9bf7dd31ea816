"""A directory with `config.json` beside its weights: Hugging Face, mlx-lm, Apple's MLX example.

They differ in the file's name and in the tensors' names, which `names` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_openelm.checkpoint.names import map_names, with_embeddings
from mlx_openelm.checkpoint.stored_quantization import (
    check_unpacked,
    foreign_method,
    stored_quantization,
)
from mlx_openelm.checkpoint.weight_files import (
    APPLE_MLX,
    PYTORCH,
    SAFETENSORS,
    find_weights,
    join_tensors,
)
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.files import find_in, read_json
from mlx_openelm.model.quantization import Quantization
from mlx_openelm.tokenizer.files import tokenizer_file

from .lazy import LazyTensor, Source
from .quantized import dequantized
from .safetensors_file import open_safetensors
from .torch_file import lazy_tensors, open_torch


def open_huggingface(path: Path) -> Source:
    """A directory in Hugging Face's form, its weights in one file or in shards.

    Raises:
        InputError: when weights are missing, packed by another program, or a file is damaged;
            says which.
    """
    files = find_weights(path)
    tensors = join_tensors(files, _OPENERS[files.form])
    file = find_in(path, "config.json")
    values = {} if file is None else read_json(file)
    check_unpacked(tensors.values(), foreign_method(values), str(path))
    quantization = stored_quantization(values, str(file))
    return Source(
        _kind(files.form, path, quantization),
        path,
        dequantized(tensors, quantization, str(path)),
        None if file is None else OpenELMConfig.from_dict(values, str(file)),
        tokenizer_file(path),
        quantization,
        files.notes,
    )


def open_parts(path: Path, tied: bool) -> dict[str, LazyTensor]:
    """A model directory's tensors as they are stored, quantized ones in their parts.

    Raises:
        InputError: as `open_huggingface`; and when a name is unknown.
    """
    files = find_weights(path)
    tensors, _ = map_names(join_tensors(files, _OPENERS[files.form]), quantized=True)
    return with_embeddings(tensors, tied)


def _kind(form: str, path: Path, quantization: Quantization | None) -> str:
    if form == APPLE_MLX:
        whose = "MLX directory of Apple's example"
    else:
        mlx = quantization is not None or find_in(path, "conversion.json") is not None
        whose = "MLX directory" if mlx else "Hugging Face directory"
    how = f", quantized to {quantization.default.bits} bits" if quantization else ""
    return f"{whose} ({form}{how})"


def open_bin(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `.bin`, which is a state dict that torch.save wrote.

    Raises:
        InputError: as `open_torch` does, or when it holds something else.
    """
    file = open_torch(path)
    if not isinstance(file.content, dict):
        raise InputError(f"{path}: holds a {type(file.content).__name__}, not a state dict")
    return lazy_tensors(file, file.content)


_OPENERS: dict[str, Callable[[Path], dict[str, LazyTensor]]] = {
    SAFETENSORS: open_safetensors,
    PYTORCH: open_bin,
    APPLE_MLX: open_safetensors,
}
