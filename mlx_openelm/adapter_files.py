"""Reads adapter directories: Hugging Face PEFT's and mlx-lm's.

Both have an `adapter_config.json`; beside it lies PEFT's `adapter_model.safetensors` (or `.bin`)
or mlx-lm's `adapters.safetensors`. A directory may have a tokenizer of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .adapters import Adapter, T, Update
from .errors import InputError
from .files import file_size, find_in, read_json, shown

CONFIG = "adapter_config.json"
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MLX_FILE = "adapters.safetensors"
# What a directory's tensors are read with, by the ending of the file's name
Readers = Mapping[str, Callable[[Path], dict[str, T]]]


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter's directory, not a model's in which an adapter was merged.

    Raises:
        InputError: when it has a link that leads out of it.
    """
    if not path.is_dir() or find_in(path, CONFIG) is None:
        return False
    files = (*_PEFT_FILES, _MLX_FILE)
    return any(find_in(path, n) for n in files) or find_in(path, "config.json") is None


def own_tokenizer(directory: Path) -> Path | None:
    """The file of a directory's own tokenizer, if it has one.

    Raises:
        InputError: when it isn't a regular file, or a link that leads out of the directory.
    """
    for name in ("tokenizer.model", "tokenizer.json"):
        file = find_in(directory, name)
        if file is not None:
            file_size(file)
            return file
    return None


def open_adapter(path: Path, readers: Readers[T], alpha: float | None = None) -> Adapter[T]:
    """Open an adapter directory.

    Args:
        path: the directory.
        readers: of the files that can be read here.
        alpha: in place of the one that the settings have.

    Raises:
        InputError: when a file is missing or damaged, or a setting needs what isn't done here;
            names it.
    """
    config = find_in(path, CONFIG)
    if config is None:
        raise InputError(f"{path}: no adapter in it: {CONFIG} is missing")
    settings = read_json(config, 1 << 20)
    if "peft_type" in settings:
        return _open_peft(path, settings, readers, alpha)
    if find_in(path, "adapters.npz") and not find_in(path, _MLX_FILE):
        raise InputError(
            f"{path}: adapters.npz is an old format of mlx-lm; save it again: "
            "mx.save_safetensors('adapters.safetensors', mx.load('adapters.npz'))"
        )
    return _open_mlx(path, settings, _read(path, (_MLX_FILE,), readers), alpha)


def read_safetensors(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, read when they are evaluated.

    Raises:
        InputError: when it isn't one.
    """
    file_size(file)  # refuses what isn't a regular file
    try:
        arrays = mx.load(str(file), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None
    assert isinstance(arrays, dict)
    return arrays


def _read(path: Path, names: tuple[str, ...], readers: Readers[T]) -> dict[str, T]:
    for name in names:
        file, reader = find_in(path, name), readers.get(Path(name).suffix)
        if file is not None and reader is None:
            raise InputError(
                f"{file}: only safetensors files are read here; merge the adapter into its base: "
                "openelm-convert ADAPTER --base BASE -o DIR"
            )
        if file is not None and reader is not None:
            return reader(file)
    raise InputError(f"{path}: no adapter in it: {' or '.join(names)} is needed")


# ---------------------------------------------------------------------------------------------
# PEFT

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


def _open_peft(
    path: Path, settings: Mapping[str, Any], readers: Readers[T], alpha: float | None
) -> Adapter[T]:
    where, kind = path / CONFIG, settings.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise InputError(f"{where}: peft_type is {shown(kind)}; {_ELSEWHERE}")
    for name, neutral in _NEUTRAL.items():
        value = settings.get(name)
        if not any(value is n or (value == n and type(value) is type(n)) for n in neutral):
            raise InputError(f"{where}: {name} is {shown(value)}; {_ELSEWHERE}")
    plain, adapters = split(_read(path, _PEFT_FILES, readers))
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
        _text(settings.get("base_model_name_or_path")),
        _text(settings.get("revision")),
        keeps_head=True,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


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
        number = _number(alpha, f"{where}: alpha of {shown(module)}")
        return number / (math.sqrt(rank) if settings.get("use_rslora") is True else rank)

    return scale


_MAX_NAME, _MAX_PATTERN, _MAX_CHOICES = 64, 200, 3


def _patterns(
    settings: Mapping[str, Any], name: str, where: Path
) -> list[tuple[re.Pattern[str], Any]]:
    """PEFT's patterns for the names of modules, or their ends after a dot, and their values.

    A stranger's regular expression could run for ever. Those that are read repeat no group, and
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


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where} is {shown(value)}, not a number")
    return float(value)


# ---------------------------------------------------------------------------------------------
# mlx-lm

_MLX_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")


def _open_mlx(
    path: Path, settings: Mapping[str, Any], tensors: Mapping[str, T], alpha: float | None
) -> Adapter[T]:
    where = path / CONFIG
    # before fine_tune_type there was use_dora
    kind = settings.get("fine_tune_type") or ("dora" if settings.get("use_dora") else "lora")
    base = _text(settings.get("model"))
    if kind == "full":
        return Adapter(path, "mlx-lm's full fine-tune", tensors=tensors, base=base)
    if kind not in ("lora", "dora"):
        raise InputError(f"{where}: fine_tune_type is {shown(kind)}; lora, dora and full are known")
    found: dict[str, Parts[T]] = {}
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
    scale = _number(parameters.get("scale"), f"{where}: scale in lora_parameters")
    # mlx-lm before 0.19 (which wrote lora_layers) multiplied with alpha / rank too
    if "lora_layers" in settings and "alpha" in parameters:
        alpha = _number(parameters["alpha"], f"{where}: alpha in lora_parameters")
        return scale * alpha / max(rank, 1)
    return scale
