"""Hugging Face's form: safetensors and the `config.json` of apple/OpenELM-*."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm.checkpoint.shards import Spec, new_shards, raw, write_json
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.dtypes import dtype_name
from mlx_openelm.model.shapes import tensor_shapes
from mlx_openelm.tokenizer.files import carry_generation_config, carry_tokenizer

from ..atomic import new_directory
from ..checkpoint import Checkpoint
from ..floats import cast
from ..outputs import MARK
from ..sources.lazy import DTYPES

# Apple publishes its code beside its weights. "REPO--FILE.CLASS" is transformers' way to name it:
# `get_class_from_dynamic_module` in `dynamic_module_utils.py`
APPLE = "apple/OpenELM-270M"
AUTO_MAP = {
    "AutoConfig": f"{APPLE}--configuration_openelm.OpenELMConfig",
    "AutoModelForCausalLM": f"{APPLE}--modeling_openelm.OpenELMForCausalLM",
}
RMS_NORM_EPS = 1e-6  # in Apple's code, whatever the config says

_METADATA = {"format": "pt", **MARK}


def write_huggingface(model: Checkpoint, out: Path, dtype: str | None, force: bool) -> list[str]:
    """Write a directory; without `dtype` each tensor keeps its own."""
    config, tensors = model.config, model.tensors
    names = tensor_shapes(config)
    specs = {
        name: Spec(DTYPES[dtype or tensors[name].dtype][1], shape) for name, shape in names.items()
    }
    with new_directory(out, force, [model.source.path]) as directory:
        with new_shards(directory, specs, _METADATA) as write:
            for name, spec in specs.items():
                for rows in tensors[name].blocks():
                    write(name, raw(cast(rows, spec.dtype, name, rows.dtype == spec.dtype)))
        stored = {dtype_name(spec.dtype) for spec in specs.values()}
        write_json(directory / "config.json", _config(config, stored))
        if model.source.path.is_dir():
            carry_tokenizer(model.source.path, directory)
            carry_generation_config(model.source.path, directory)
    return [_note(config)]


def _note(config: OpenELMConfig) -> str:
    reason = _why_not_apples_code(config)
    if reason is not None:
        return f"Apple's modelling code can't load it: {reason}"
    return (
        f"transformers loads it with trust_remote_code=True: it fetches Apple's code from {APPLE}"
    )


def _why_not_apples_code(config: OpenELMConfig) -> str | None:
    """What `modeling_openelm.py` can't express, in words; None: nothing."""
    if _multipliers(config) is None:
        return "no two qkv_multipliers give these heads"
    if config.rms_norm_eps != RMS_NORM_EPS:
        return f"its RMSNorm has an epsilon of {RMS_NORM_EPS:g}, this one {config.rms_norm_eps:g}"
    again = replace(config, ffn_multipliers=_spread(config))
    if again.ffn_dims != config.ffn_dims:
        return "it rounds the two ffn_multipliers to other widths"
    return None


def _spread(config: OpenELMConfig) -> tuple[float, ...]:
    """`ffn_multipliers` as Apple's code takes them: two are the ends of a line."""
    given = config.ffn_multipliers
    return tuple(round(m, 2) for m in given) if len(given) == 2 else given


def _config(config: OpenELMConfig, dtypes: set[str]) -> dict[str, Any]:
    """With what Apple's `configuration_openelm.py` reads."""
    values: dict[str, Any] = {"architectures": ["OpenELMForCausalLM"], **config.to_dict()}
    found = _multipliers(config)
    if found is not None:
        values["num_gqa_groups"], values["qkv_multipliers"] = found
    if _why_not_apples_code(config) is None:
        values["auto_map"] = AUTO_MAP
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
