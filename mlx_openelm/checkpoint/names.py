"""Names of tensors: those of each layout → those of a model directory (mlx-lm's)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from ..errors import InputError
from ..files import shown

T = TypeVar("T")

EMBEDDINGS, HEAD = "transformer.token_embeddings.weight", "lm_head.weight"
CANONICAL = (
    "transformer.token_embeddings.weight",
    "transformer.layers.{i}.attn_norm.weight",
    "transformer.layers.{i}.attn.qkv_proj.weight",
    "transformer.layers.{i}.attn.q_norm.weight",
    "transformer.layers.{i}.attn.k_norm.weight",
    "transformer.layers.{i}.attn.out_proj.weight",
    "transformer.layers.{i}.ffn_norm.weight",
    "transformer.layers.{i}.ffn.proj_1.weight",
    "transformer.layers.{i}.ffn.proj_2.weight",
    "transformer.norm.weight",
    "lm_head.weight",
)
LAYOUTS: dict[str, dict[str, str]] = {
    "Hugging Face": {name: name for name in CANONICAL},
    "CoreNet": {name.removeprefix("transformer."): name for name in CANONICAL[:-1]}
    | {"classifier.weight": "lm_head.weight"},
}
# Modules that wrap others and put their name into the path, anywhere: no name of a network has
# such a part, so they can be taken out
WRAPPERS = {
    "module": "DataParallel, DistributedDataParallel, DeepSpeed, AveragedModel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_fpw_module": "FullyShardedDataParallel of PyTorch 1.11 and FairScale",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "_original_module": "ONNX Runtime's ORTModule",
    "_module": "Opacus",
    "model": "Lightning, transformers' heads",
    "pretrained_model": "TRL's models with a value head",
    "base_model": "PEFT",
}
# End of a name → why the tensor isn't needed
DROPPABLE: dict[str, str] = {
    ".attn.pos_embedding.inv_freq": "computed from the config",
    ".attn.pos_embedding._cos": "computed from the config",
    ".attn.pos_embedding._sin": "computed from the config",
    ".attn.pos_embedding._cached_cos": "computed from the config",
    ".attn.pos_embedding._cached_sin": "computed from the config",
    "causal_mask": "computed from the positions",
    "n_averaged": "a counter of AveragedModel",
}
_QUANTIZED = "it is quantized by {}, which can't be read; use the unquantized checkpoint"
# Part of a name → what such a checkpoint is, which has to be treated otherwise
OTHER_KINDS: dict[str, str] = {
    ".lora_": "it has an adapter of a kind that isn't known here",
    ".base_layer.": "it has an adapter of a kind that isn't known here",
    ".qweight": _QUANTIZED.format("GPTQ or AWQ"),
    ".absmax": _QUANTIZED.format("bitsandbytes"),
    ".SCB": _QUANTIZED.format("bitsandbytes"),
    ".W_q": _QUANTIZED.format("HQQ"),
    "._data": _QUANTIZED.format("quanto"),
    ".weight_packed": _QUANTIZED.format("compressed-tensors"),
    ".weight_scale": _QUANTIZED.format("FP8 or another format with scales"),
    "flat_param": "its parameters are flattened by FSDP; save a full state dict",
    ".scales": "it is quantized; name the directory that has its config.json too",
}
_INDEX = re.compile(r"(?<=\blayers\.)(0|[1-9][0-9]{0,3})(?=\.)")
_LONGEST = 500  # characters of a name, wrappers included
_SHOWN = 8  # unknown names in an error message


def map_names(
    tensors: Mapping[str, T], *, quantized: bool = False
) -> tuple[dict[str, T], list[str]]:
    """The same tensors by the names of a model directory, and a line for each that was left out.

    `lm_head.weight` (CoreNet's `classifier.weight`) is kept: whether it only repeats tied
    embeddings, their values say. `quantized` takes the `scales` and `biases` of matrices too.

    Raises:
        InputError: when a name is unknown, listing those, or two stand for the same tensor.
    """
    mapped: dict[str, T] = {}
    origin: dict[str, str] = {}
    notes: list[str] = []
    unknown: list[str] = []
    for name, tensor in tensors.items():
        canonical = _canonical_part(name) if quantized else canonical_name(name)
        reason = droppable(name)
        if canonical in mapped:
            raise InputError(f"tensors {shown(origin[canonical])} and {shown(name)} are the same")
        if canonical:
            mapped[canonical], origin[canonical] = tensor, name
        elif reason:
            notes.append(f"{shown(name)} is left out: {reason}")
        else:
            unknown.append(name)
    if unknown:
        listed = ", ".join(map(shown, unknown[:_SHOWN]))
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        kinds = (what for part, what in OTHER_KINDS.items() if any(part in n for n in unknown))
        why = next(kinds, "this is not an OpenELM checkpoint, or one with additions")
        raise InputError(f"unknown tensors: {listed}{more}; {why}")
    return mapped, notes


def canonical_name(name: str) -> str | None:
    """The name that a model directory has for a tensor; None when no layout knows it."""
    if len(name) > _LONGEST:
        return None
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    found = _INDEX.search(name)
    index = found.group() if found else ""
    template = _INDEX.sub("{i}", name)
    for layout in LAYOUTS.values():
        if template.replace("{i}", index) == name and template in layout:
            return layout[template].replace("{i}", index)
    return None


def _canonical_part(name: str) -> str | None:
    """As `canonical_name`, also of the `scales` and `biases` of a quantized matrix."""
    module, _, part = name.rpartition(".")
    if part not in ("scales", "biases"):
        return canonical_name(name)
    weight = canonical_name(f"{module}.weight")
    return weight and f"{weight.removesuffix('weight')}{part}"


def droppable(name: str) -> str | None:
    """Why a tensor isn't needed; None if it is."""
    return next((why for end, why in DROPPABLE.items() if name.endswith(end)), None)


def with_embeddings(tensors: Mapping[str, T], tied: bool) -> dict[str, T]:
    """Tensors by the names of a model directory; tied embeddings may be stored as the head.

    `safetensors.torch.save_model` stores one of two names, whichever comes first.
    """
    if not tied or EMBEDDINGS in tensors:
        return dict(tensors)
    head, embeddings = (name.removesuffix("weight") for name in (HEAD, EMBEDDINGS))
    return {
        embeddings + name.removeprefix(head) if name.startswith(head) else name: tensor
        for name, tensor in tensors.items()
    }
