"""The names of tensors, as data: each layout's own → those of a model directory (mlx-lm's)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from mlx_openelm.errors import InputError
from mlx_openelm.files import shown

T = TypeVar("T")

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
# What wrappers of a model put before its names: DistributedDataParallel, torch.compile, PEFT
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
# End of a name → why the tensor isn't needed
DROPPABLE: dict[str, str] = {
    ".attn.pos_embedding.inv_freq": "computed from the config",
    ".attn.pos_embedding._cos": "computed from the config",
    ".attn.pos_embedding._sin": "computed from the config",
    ".attn.pos_embedding._cached_cos": "computed from the config",
    ".attn.pos_embedding._cached_sin": "computed from the config",
    "causal_mask": "computed from the positions",
}
# Part of a name → what such a checkpoint is, which has to be treated otherwise
OTHER_KINDS: dict[str, str] = {
    ".lora_": "it has an adapter of a kind that isn't known here",
    ".base_layer.": "it has an adapter of a kind that isn't known here",
    ".scales": "it is quantized; name the directory that has its config.json too",
}
_INDEX = re.compile(r"(?<=\blayers\.)(0|[1-9][0-9]{0,3})(?=\.)")
_WRAPPED = re.compile(f"^(?:{'|'.join(map(re.escape, WRAPPERS))})*")
_SHOWN = 8  # unknown names in an error message


def map_names(tensors: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
    """The same tensors by the names of a model directory, and a line for each that was left out.

    `lm_head.weight` (CoreNet's `classifier.weight`) is kept: whether it only repeats tied
    embeddings, their values say.

    Raises:
        InputError: when a name is unknown, listing those, or two stand for the same tensor.
    """
    mapped: dict[str, T] = {}
    origin: dict[str, str] = {}
    notes: list[str] = []
    unknown: list[str] = []
    for name, tensor in tensors.items():
        canonical = canonical_name(name)
        reason = next((why for end, why in DROPPABLE.items() if name.endswith(end)), None)
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
    name = _WRAPPED.sub("", name, count=1)
    found = _INDEX.search(name)
    index = found.group() if found else ""
    template = _INDEX.sub("{i}", name)
    for layout in LAYOUTS.values():
        if template.replace("{i}", index) == name and template in layout:
            return layout[template].replace("{i}", index)
    return None
