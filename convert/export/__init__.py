"""A model directory in the formats of others: the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_openelm.errors import InputError

from ..checkpoint import Checkpoint, open_directory
from .corenet import write_corenet
from .gguf import write_gguf
from .huggingface import write_huggingface

# What a format's writer takes: the model, where to, the dtype asked for, and whether to replace
# what is there. It returns notes.
Write = Callable[[Checkpoint, Path, str | None, bool], list[str]]


@dataclass(frozen=True)
class Format:
    """A format: what it is, its dtypes, and how it is written."""

    what: str
    dtypes: tuple[str, ...]
    write: Write


FORMATS: Mapping[str, Format] = {
    "hf": Format("a Hugging Face directory", ("float32", "float16", "bfloat16"), write_huggingface),
    "corenet": Format(
        "a .pt file as CoreNet saves it", ("float32", "float16", "bfloat16"), write_corenet
    ),
    "gguf": Format(
        "a file for llama.cpp", ("float32", "float16", "bfloat16", "q8_0", "q4_1"), write_gguf
    ),
}


def export(
    directory: Path, out: Path, format: str, dtype: str | None = None, force: bool = False
) -> list[str]:
    """Write a model directory in another format: `out` is complete at the end, or not there.

    Args:
        directory: a model directory; a quantized one is dequantized, but for GGUF's q4_1.
        out: the directory or file to make.
        format: a key of `FORMATS`.
        dtype: one of the format's; None keeps the stored one.
        force: replace `out` if it exists.

    Returns:
        Notes for the person.

    Raises:
        InputError: when the model can't be expressed in the format; nothing has been written.
        OpenELMError: when `out` can't be written.
    """
    return write(open_directory(directory), out, format, dtype, force)


def write(
    model: Checkpoint, out: Path, format: str, dtype: str | None = None, force: bool = False
) -> list[str]:
    """Write an opened model directory in another format; as `export`."""
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    chosen = FORMATS[format]
    if dtype is not None and dtype not in chosen.dtypes:
        raise InputError(f"{format} has no dtype {dtype!r}, only {', '.join(chosen.dtypes)}")
    return [*model.notes, *chosen.write(model, out, dtype, force)]
