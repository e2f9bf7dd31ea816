"""Hugging Face's form: safetensors and the `config.json` of apple/OpenELM-*."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.shapes import tensor_shapes
from mlx_openelm.shards import Spec, new_shards, raw, write_json
from mlx_openelm.tokenizer_files import carry_generation_config, carry_tokenizer

from ..atomic import new_directory
from ..checkpoint import Checkpoint
from ..floats import cast, dtype_name
from ..sources.lazy import DTYPES

_METADATA = {"format": "pt"}


def write_huggingface(model: Checkpoint, out: Path, dtype: str | None, force: bool) -> list[str]:
    """Write a directory; without `dtype` each tensor keeps its own."""
    config, tensors = model.config, model.tensors
    names = tensor_shapes(config)
    specs = {
        name: Spec(DTYPES[dtype or tensors[name].dtype][1], shape) for name, shape in names.items()
    }
    with new_directory(out, force) as directory:
        with new_shards(directory, specs, _METADATA) as write:
            for name, spec in specs.items():
                for rows in tensors[name].blocks():
                    write(name, raw(cast(rows, spec.dtype, name, rows.dtype == spec.dtype)))
        stored = {dtype_name(spec.dtype) for spec in specs.values()}
        write_json(directory / "config.json", _config(config, stored))
        carry_tokenizer(model.source.path, directory)
        carry_generation_config(model.source.path, directory)
    if _multipliers(config) is None:
        return ["Apple's modelling code can't load it: no two qkv_multipliers give these heads"]
    return []


def _config(config: OpenELMConfig, dtypes: set[str]) -> dict[str, Any]:
    """With what Apple's `configuration_openelm.py` reads."""
    values: dict[str, Any] = {"architectures": ["OpenELMForCausalLM"], **config.to_dict()}
    found = _multipliers(config)
    if found is not None:
        values["num_gqa_groups"], values["qkv_multipliers"] = found
    values |= {"normalization_layer_name": "rms_norm", "initializer_range": 0.02}
    values |= {"torch_dtype": dtypes.pop() if len(dtypes) == 1 else None, "use_cache": True}
    return values


def _multipliers(config: OpenELMConfig) -> tuple[int, list[float]] | None:
    """GQA groups, and the two multipliers from which Apple's code computes these heads, if any."""
    groups = {q // kv for q, kv in zip(config.num_query_heads, config.num_kv_heads, strict=True)}
    share = config.head_dim / config.model_dim
    ends = (config.num_query_heads[0] * share, config.num_query_heads[-1] * share)
    for multipliers in ((0.5, 1.0), ends):
        scaled = OpenELMConfig.scaled(
            vocab_size=config.vocab_size,
            model_dim=config.model_dim,
            head_dim=config.head_dim,
            num_transformer_layers=config.num_transformer_layers,
            qkv_multipliers=multipliers,
            num_gqa_groups=min(groups),
        )
        same_kv_heads = scaled.num_kv_heads == config.num_kv_heads
        if scaled.num_query_heads == config.num_query_heads and same_kv_heads:
            return min(groups), list(multipliers)
    return None
