"""Adapters of Hugging Face PEFT: LoRA, DoRA, trained tokens, saved modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import shown
from .adapter_settings import CONFIG, number, text
from .adapters import Adapter, T, Update

# Settings under which merging would need other formulas, and the values that don't. Of those that
# aren't here, OpenELM's layers make nothing (`bias`, `fan_in_fan_out`), or the tensors say it.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "lora_bias": (False, None),
    # other initial values change the base weights too
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
}
_ELSEWHERE = "such an adapter can't be merged here (PEFT itself can: merge_and_unload)"

# A tensor's name, cut into its module and its part: CoreNet and PEFT in memory put the adapter's
# name behind the part, PEFT's files don't
_PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
# What PEFT puts between a layer's name and its own weights
_WRAPPER = re.compile(
    r"\.(?:modules_to_save\.[^.]+|token_adapter\.base_layer|base_layer|original_module)(?=\.)"
)
_ORIGINAL = ".original_module."  # the layer as it was before the copy that was trained
_UNDO = ".trainable_tokens_original"  # the rows as they were

# The parts of one module's adapter: lora_A, lora_B and perhaps lora_magnitude_vector
Parts = dict[str, T]
# (a module's name in the adapter, its rank) -> what B·A is multiplied with
Scale = Callable[[str, int], float]


def split(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, Parts[T]]]:
    """The plain tensors (without the names of PEFT's wrappers), and each module's adapter.

    Raises:
        InputError: when there are two adapters.
    """
    plain: dict[str, T] = {}
    adapters: dict[str, Parts[T]] = {}
    for name in sorted(tensors, key=lambda name: _ORIGINAL in name):
        tensor = tensors[name]
        if found := _PART.fullmatch(name):
            parts = adapters.setdefault(_WRAPPER.sub("", found["module"]), {})
            if found["part"] in parts:
                raise InputError(
                    f"tensor {shown(name)}: there are several adapters; one can be merged"
                )
            parts[found["part"]] = tensor
            continue
        own = _WRAPPER.sub("", name)
        if own not in plain:
            if _UNDO not in name:
                plain[own] = tensor
        elif _ORIGINAL not in name:
            raise InputError(f"tensor {shown(name)}: {shown(own)} is there twice")
    return plain, adapters


def updates(path: Path, adapters: Mapping[str, Parts[T]], scale: Scale) -> dict[str, Update[T]]:
    """What each module's adapter in `path` adds, by the name of its weight.

    Raises:
        InputError: when a part is missing or doesn't go with the others; names the module.
    """
    found: dict[str, Update[T]] = {}
    for module, parts in adapters.items():
        embedding = any(part.startswith("lora_embedding") for part in parts)
        prefix = "lora_embedding_" if embedding else "lora_"
        for part in ("A", "B"):
            if prefix + part not in parts:
                raise InputError(f"{path}: the adapter of {shown(module)} has no {prefix}{part}")
        if len(parts) > 2 + ("lora_magnitude_vector" in parts):
            raise InputError(
                f"{path}: the adapter of {shown(module)} has parts that don't go together"
            )
        a, b = parts[prefix + "A"], parts[prefix + "B"]
        rank = a.shape[0] if a.shape else 0
        # An embedding is a linear layer's matrix transposed; so are PEFT's factors of it.
        left, right = (a, b) if embedding else (b, a)
        found[f"{module}.weight"] = Update(
            left,
            right,
            embedding,
            scale(module, rank) if rank else 0.0,
            parts.get("lora_magnitude_vector"),
            by_column=embedding,
        )
    return found


def alpha_over_rank(alpha: float) -> Scale:
    """LoRA's own scale, with one alpha for all modules."""
    return lambda module, rank: alpha / rank


def peft_adapter(
    path: Path, settings: Mapping[str, Any], tensors: Mapping[str, T], alpha: float | None
) -> Adapter[T]:
    """What the settings and tensors of PEFT's directory `path` say.

    Raises:
        InputError: when they contradict each other, or need what isn't done here.
    """
    where, kind = path / CONFIG, settings.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise InputError(f"{where}: peft_type is {shown(kind)}; {_ELSEWHERE}")
    for name, neutral in _NEUTRAL.items():
        value = settings.get(name)
        if not any(value is n or (value == n and type(value) is type(n)) for n in neutral):
            raise InputError(f"{where}: {name} is {shown(value)}; {_ELSEWHERE}")
    plain, adapters = split(tensors)
    dora = settings.get("use_dora")
    for module, parts in adapters.items():
        if bool(dora) is not ("lora_magnitude_vector" in parts):
            raise InputError(
                f"{path}: use_dora is {shown(dora)}, which doesn't go with the tensors of "
                f"{shown(module)}"
            )
    named = "trainable_token_indices" if kind == "LORA" else "token_indices"
    rows = {}
    for name in list(plain):
        if found := _TOKENS.fullmatch(name):
            module = found["module"]
            indices = _token_indices(settings.get(named), module, f"{where}: {named}")
            rows[f"{module}.weight"] = (indices, plain.pop(name))
    scale = _peft_scale(settings, where) if alpha is None else alpha_over_rank(alpha)
    return Adapter(
        path,
        "PEFT adapter",
        updates(path, adapters, scale),
        plain,
        rows,
        text(settings.get("base_model_name_or_path")),
        text(settings.get("revision")),
        keeps_head=True,
    )


def _token_indices(value: object, module: str, where: str) -> list[int]:
    if isinstance(value, dict):
        fitting = [v for k, v in value.items() if module == k or module.endswith(f".{k}")]
        value = fitting[0] if fitting else None
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise InputError(f"{where} of {shown(module)} is {shown(value)}, not a list of tokens")
    return value


def _peft_scale(settings: Mapping[str, Any], where: Path) -> Scale:
    """alpha / rank, or alpha / √rank (rsLoRA), from the settings."""
    alphas = _patterns(settings, "alpha_pattern", where)
    ranks = _patterns(settings, "rank_pattern", where)

    def scale(module: str, rank: int) -> float:
        name = module.removeprefix("base_model.model.")
        alpha = _first(alphas, name, settings.get("lora_alpha"))
        wanted = _first(ranks, name, settings.get("r"))
        if wanted != rank:
            raise InputError(
                f"{where.parent}: {shown(module)} has rank {rank}; {CONFIG} says {shown(wanted)}"
            )
        value = number(alpha, f"{where}: alpha of {shown(module)}")
        return value / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    return scale


_MAX_NAME, _MAX_PATTERN, _MAX_CHOICES = 64, 200, 3


def _patterns(
    settings: Mapping[str, Any], name: str, where: Path
) -> list[tuple[re.Pattern[str], Any]]:
    """PEFT's patterns for the names of modules, or their ends after a dot, and their values.

    An untrusted regular expression could run forever. Those that are read repeat no group, and
    have few groups and repetitions, so they take few steps on a name of `_MAX_NAME` characters.
    """
    values = settings.get(name) or {}
    if not isinstance(values, dict):
        raise InputError(f"{where}: {name} is {shown(values)}, not an object")
    found = []
    for pattern, value in values.items():
        bare = re.sub(r"\\\W", "_", pattern)  # without what is escaped
        choices = len(re.findall(r"[*+?{(]", bare))
        if (
            len(pattern) > _MAX_PATTERN
            or choices > _MAX_CHOICES
            or re.search(r"\)[*+?{]|\(\?|\\[0-9]", bare)
        ):
            raise InputError(
                f"{where}: {name} has the regular expression {shown(pattern)}, which is too "
                "involved to be read here"
            )
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except (re.error, OverflowError, RecursionError):
            raise InputError(
                f"{where}: {name} has {shown(pattern)}, which is no regular expression"
            ) from None
    return found


def _first(patterns: list[tuple[re.Pattern[str], Any]], name: str, default: Any) -> Any:
    if len(name) <= _MAX_NAME:
        for pattern, value in patterns:
            if pattern.match(name):
                return value
    return default
