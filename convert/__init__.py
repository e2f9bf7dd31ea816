"""Converts checkpoints of other formats to model directories: `python -m mlx_openelm.convert`.

The package can be called: `mlx_openelm.convert(hf_path, mlx_path)` is its function `convert`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import QuantPredicate

__all__ = ["convert"]


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: QuantPredicate | str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Convert a checkpoint to a model directory, with mlx-lm's arguments.

    Args:
        hf_path: a CoreNet `.pt`, a directory of Hugging Face or MLX, or a Hugging Face id.
        mlx_path: the directory to make; it must not exist.
        quantize: quantize the matrices.
        q_group_size: weights per scale (default: 64, or what the mode has).
        q_bits: bits per weight (default: 4, or what the mode has).
        q_mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        dtype: "float32", "float16" or "bfloat16"; by default float16 stays where it is safe, and
            the rest becomes bfloat16.
        upload_repo: put the directory on the Hugging Face hub, under this name.
        revision: branch, tag or commit of the Hugging Face repository.
        dequantize: take weights that are quantized already, and undo that.
        quant_predicate: called with the path of each matrix and an `mlx.nn` module of its shape;
            whether it is quantized, or how (`{"bits": 8, "group_size": 64, "mode": "affine"}`).
        trust_remote_code: of mlx-lm; no code of a repository is ever run.

    Raises:
        InputError: when the source isn't an OpenELM checkpoint, or an argument is out of its range.
        OpenELMError: when the hub can't be reached, or the directory can't be written.
    """
    from . import api

    api.convert(
        hf_path,
        mlx_path,
        quantize,
        q_group_size,
        q_bits,
        q_mode,
        dtype,
        upload_repo,
        revision,
        dequantize,
        quant_predicate,
    )


class _Package(ModuleType):
    """The type of this package: a function and a command share its name."""

    def __call__(self, *arguments: Any, **options: Any) -> None:
        convert(*arguments, **options)


sys.modules[__name__].__class__ = _Package
