"""Adapters of mlx-lm: LoRA, DoRA, and full fine-tunes of some layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import shown
from .adapter_settings import CONFIG, number, text
from .adapters import Adapter, T, Update

_MLX_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")


def mlx_adapter(
    path: Path, settings: Mapping[str, Any], tensors: Mapping[str, T], alpha: float | None
) -> Adapter[T]:
    """What the settings and tensors of mlx-lm's directory `path` say.

    Raises:
        InputError: when they contradict each other, or are of an unknown kind.
    """
    where = path / CONFIG
    # before fine_tune_type there was use_dora
    kind = settings.get("fine_tune_type") or ("dora" if settings.get("use_dora") else "lora")
    base = text(settings.get("model"))
    if kind == "full":
        return Adapter(path, "mlx-lm's full fine-tune", tensors=tensors, base=base)
    if kind not in ("lora", "dora"):
        raise InputError(f"{where}: fine_tune_type is {shown(kind)}; lora, dora and full are known")
    found: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        part = _MLX_PART.fullmatch(name)
        if part is None:
            raise InputError(f"{path}: tensor {shown(name)} is no part of a {kind} adapter")
        found.setdefault(part["module"], {})[part["part"]] = tensor
    wanted = {"lora_a", "lora_b", "m"} if kind == "dora" else {"lora_a", "lora_b"}
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise InputError(f"{where}: lora_parameters is {shown(parameters)}, not an object")
    changes = {}
    for module, parts in found.items():
        if parts.keys() != wanted:
            raise InputError(
                f"{path}: the adapter of {shown(module)} has {', '.join(sorted(parts))}; "
                f"{', '.join(sorted(wanted))} are needed"
            )
        a, b = parts["lora_a"], parts["lora_b"]
        rank = a.shape[-1] if a.shape else 0
        if parameters.get("rank") != rank:
            raise InputError(
                f"{path}: {shown(module)} has rank {rank}; {CONFIG} says "
                f"{shown(parameters.get('rank'))}"
            )
        if alpha is None:
            scale = _mlx_scale(settings, parameters, rank, where)
        else:
            scale = alpha / max(rank, 1)
        # An embedding's factors are in its matrix's order, a linear layer's in its transpose's.
        embedding = module.endswith("token_embeddings")
        left, right = (a, b) if embedding else (b, a)
        changes[f"{module}.weight"] = Update(left, right, not embedding, scale, parts.get("m"))
    return Adapter(path, f"mlx-lm's {kind} adapter", changes, base=base)


def _mlx_scale(
    settings: Mapping[str, Any], parameters: Mapping[str, Any], rank: int, where: Path
) -> float:
    scale = number(parameters.get("scale"), f"{where}: scale in lora_parameters")
    # mlx-lm before 0.19 (which wrote lora_layers) multiplied with alpha / rank too
    if "lora_layers" in settings and "alpha" in parameters:
        alpha = number(parameters["alpha"], f"{where}: alpha in lora_parameters")
        return scale * alpha / max(rank, 1)
    return scale
