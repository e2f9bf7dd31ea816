"""Hugging Face PEFT's adapter directory: `adapter_config.json` beside the adapter's tensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_openelm.errors import InputError
from mlx_openelm.files import read_json, shown

from .huggingface import open_bin
from .lazy import LazyTensor
from .safetensors_file import open_safetensors

CONFIG = "adapter_config.json"
_FILES: dict[str, Callable[[Path], dict[str, LazyTensor]]] = {
    "adapter_model.safetensors": open_safetensors,
    "adapter_model.bin": open_bin,
}
# Settings under which merging would need other formulas, and the values that don't
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    # other initial values change the base weights too
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter directory, opened: the tensors by their names in the file, and the settings."""

    path: Path
    tensors: dict[str, LazyTensor]
    settings: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as it calls it."""
        name = self.settings.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def scale(self, module: str, rank: int) -> float:
        """What B·A of a module is multiplied with: alpha / rank, or alpha / √rank (rsLoRA).

        Raises:
            InputError: when alpha is no number, or the rank isn't the file's.
        """
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        wanted = self._of(module, "rank_pattern", "r")
        if wanted != rank:
            raise InputError(
                f"{self.path}: {shown(module)} has rank {rank}; {CONFIG} says {shown(wanted)}"
            )
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise InputError(f"{self.path / CONFIG}: alpha of {shown(module)} is {shown(alpha)}")
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") is True else rank)

    def _of(self, module: str, pattern: str, default: str) -> Any:
        """A module's setting: the first pattern decides that is its name, or its name's end."""
        patterns = self.settings.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{self.path / CONFIG}: {pattern} is {shown(patterns)}, not an object")
        for key, value in patterns.items():
            # Patterns may be regular expressions; a stranger's could run for ever. Names will do.
            if module == key.removeprefix("^") or module.endswith("." + key.removeprefix("^")):
                return value
            if re.search(r"[^\w.^-]", key):
                raise InputError(
                    f"{self.path / CONFIG}: {pattern} has the regular expression {shown(key)}; "
                    "only names are read"
                )
        return self.settings.get(default)


def is_peft(path: Path) -> bool:
    """Whether a path is such a directory."""
    return os.path.isfile(path / CONFIG)


def open_peft(path: Path) -> PeftAdapter:
    """Open an adapter directory. Reads headers only.

    Raises:
        InputError: when a file is missing or damaged, or a setting needs what isn't done here.
    """
    settings = read_json(path / CONFIG)
    for name, neutral in _NEUTRAL.items():
        value = settings.get(name)
        if not any(value is n or (value == n and type(value) is type(n)) for n in neutral):
            raise InputError(
                f"{path / CONFIG}: {name} is {shown(value)}; such an adapter can't be merged here "
                "(PEFT itself can: merge_and_unload)"
            )
    for name, opener in _FILES.items():
        if os.path.exists(path / name):
            return PeftAdapter(path, opener(path / name), settings)
    raise InputError(f"{path}: no adapter in it: {' or '.join(_FILES)} is needed")
