"""`mlx_openelm.convert`: conversion from Python, with mlx-lm's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.files import user_path
from mlx_openelm.model.quantization import Scheme
from mlx_openelm.model.shapes import tensor_shapes

from .checkpoint import open_checkpoint
from .commands.convert import chat_template_of, generation_config_of, is_instruct, tokenizer_of
from .commands.upload import upload_directory
from .floats import DTYPES
from .recipe import Recipe, make_scheme
from .writer import Conversion, Options
from .writer import convert as write_directory

QuantPredicate = Callable[[str, Any], bool | Mapping[str, Any]]
"""(module's path, an `mlx.nn` module of its shape) -> whether it is quantized, or how."""


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    quantize: bool,
    q_group_size: int | None,
    q_bits: int | None,
    q_mode: str,
    dtype: str | None,
    upload_repo: str | None,
    revision: str | None,
    dequantize: bool,
    quant_predicate: QuantPredicate | str | None,
) -> Conversion:
    """Do what `mlx_openelm.convert` promises; returns what was done."""
    if quantize and dequantize:
        raise InputError("quantize and dequantize can't be combined")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if isinstance(quant_predicate, str):
        raise InputError(
            f"quant_predicate={quant_predicate!r}: mlx-lm's mixed recipes need other layers than "
            "OpenELM's; give a function (path, module) -> bool or dict"
        )
    out = user_path(mlx_path)
    if out.exists():
        raise InputError(f"{out}: exists; delete it, or name another mlx_path")
    checkpoint = open_checkpoint(hf_path, revision=revision)
    source = checkpoint.source
    if source.quantization is not None and not dequantize:
        raise InputError(
            f"{source.path}: its weights are quantized to {source.quantization.default.bits} bits "
            "already; pass dequantize=True to undo that (what it lost, stays lost)"
        )
    scheme = make_scheme(q_mode, q_bits, q_group_size) if quantize else None
    recipe = Recipe(scheme)
    if quantize and quant_predicate is not None:
        recipe = Recipe(scheme, _rules(checkpoint.config, quant_predicate))
    done = write_directory(
        checkpoint.tensors,
        checkpoint.config,
        out,
        Options(dtype=dtype, recipe=recipe, chat=is_instruct(str(hf_path))),
        tokenizer=tokenizer_of(None, source),
        chat_template=chat_template_of(None, source),
        generation_config=generation_config_of(source),
        source={"kind": source.kind},
        reads=[source.path, *source.adapters],
    )
    if upload_repo is not None:
        upload_directory(out, upload_repo)
    return done


def _rules(
    config: OpenELMConfig, predicate: QuantPredicate
) -> tuple[tuple[str, Scheme | None], ...]:
    """What the predicate says of each matrix, as rules of a recipe."""
    nn: Any = import_module("mlx.nn")
    rules: list[tuple[str, Scheme | None]] = []
    for name, shape in tensor_shapes(config).items():
        if len(shape) != 2:
            continue
        path, (rows, columns) = name.removesuffix(".weight"), shape
        embedding = path.endswith("token_embeddings")
        module = (  # lazy: no values are made
            nn.Embedding(rows, columns) if embedding else nn.Linear(columns, rows, bias=False)
        )
        wanted = predicate(path, module)
        if isinstance(wanted, Mapping):
            mode = wanted.get("mode", "affine")
            rules.append((path, make_scheme(mode, wanted.get("bits"), wanted.get("group_size"))))
        elif not wanted:
            rules.append((path, None))
    return tuple(rules)
