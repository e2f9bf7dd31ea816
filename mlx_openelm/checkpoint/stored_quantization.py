"""What a model directory says of quantized weights, and whether its tensors agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError
from ..files import brief, shown
from ..model.quantization import Quantization, Scheme
from .names import canonical_name, droppable
from .safetensors import FLOATS, Stored

# `quant_method` in a config.json of transformers -> its usual name
METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "finegrained_fp8": "FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "transformers' MXFP4",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "torchao": "torchao",
    "vptq": "VPTQ",
}


def stored_quantization(values: Mapping[str, Any], where: str) -> Quantization | None:
    """The quantization that a `config.json` says, if it is MLX's own (see `foreign_method`).

    Its exceptions are by the module names of a model directory.

    Raises:
        InputError: starting with `where`, when it is not an object, or no scheme of MLX.
    """
    stored = values.get("quantization") or values.get("quantization_config")
    if stored is None or foreign_method(values) is not None:
        return None
    if not isinstance(stored, Mapping):
        raise InputError(f"{where}: quantization is {shown(stored)}, not an object")
    quantization = Quantization.from_dict(stored, where)
    exceptions: dict[str, Scheme | None] = {}
    for name, scheme in quantization.exceptions.items():
        weight = canonical_name(f"{name}.weight") or f"{name}.weight"
        module = weight.removesuffix(".weight")
        if exceptions.setdefault(module, scheme) != scheme:
            raise InputError(f"{where}: quantization of {brief(module)} is there twice")
    return Quantization(quantization.default, exceptions)


def foreign_method(values: Mapping[str, Any]) -> str | None:
    """The other program's quantization that a `config.json` names, such as "GPTQ", else None.

    transformers writes a `quant_method` into `quantization_config` (bitsandbytes before 0.40 did
    not), and mlx-lm writes none. It says little: the entry often stays when weights are floats
    again.
    """
    for key in ("quantization", "quantization_config"):
        stored = values.get(key)
        if not isinstance(stored, Mapping) or not stored:
            continue
        if "quant_method" in stored:
            method = str(stored["quant_method"])
            return METHODS.get(method, shown(method))
        if "load_in_4bit" in stored or "load_in_8bit" in stored:
            return METHODS["bitsandbytes"]
        return None
    return None


def check_unpacked(tensors: Iterable[Stored], method: str | None, where: str) -> None:
    """Refuse tensors that another program packed by `method` (see `foreign_method`).

    All formats of that kind hold integers, or floats of 8 bits or fewer.

    Raises:
        InputError: starting with `where`.
    """
    if method is None:
        return
    for tensor in tensors:
        if tensor.dtype not in FLOATS and droppable(tensor.name) is None:
            raise InputError(
                f"{where}: quantized by {method}, which can't be read (tensor "
                f"{shown(tensor.name)} is of {tensor.dtype}); convert the unquantized checkpoint"
            )


def packed_scheme(
    module: str, parts: Mapping[str, Stored], quantization: Quantization | None
) -> tuple[Scheme, tuple[int, int]]:
    """The scheme of a quantized matrix, and its unpacked shape.

    Args:
        module: its name in a model directory.
        parts: `weight`, `scales` and perhaps `biases`, as they are stored.
        quantization: what the config says.

    Raises:
        InputError: when a part is missing, or their shapes or dtypes contradict the scheme.
    """
    scheme = quantization.scheme(module) if quantization else None
    if scheme is None:
        raise InputError(f"{shown(module)} is quantized, but config.json doesn't say how")
    affine = scheme.mode == "affine"
    for part in ("weight", "scales", *(("biases",) if affine else ())):
        if part not in parts:
            raise InputError(f"tensor {shown(f'{module}.{part}')} is missing")
    weight, scales, biases = parts["weight"], parts["scales"], parts.get("biases")
    if biases is not None and (
        not affine or (biases.shape, biases.dtype) != (scales.shape, scales.dtype)
    ):
        raise InputError(f"tensor {shown(biases.name)} doesn't go with {scheme.mode}")
    if weight.dtype != "uint32" or scales.dtype not in (FLOATS[1:] if affine else ("uint8",)):
        raise InputError(
            f"{shown(module)} holds {weight.dtype} and {scales.dtype}, which is not {scheme.mode} "
            "quantization"
        )
    packed, groups = weight.shape, scales.shape
    columns = groups[-1] * scheme.group_size if groups else 0
    if (
        len(packed) != 2
        or len(groups) != 2
        or packed[0] != groups[0]
        or packed[1] * 32 != columns * scheme.bits
        or 0 in packed
    ):
        raise InputError(
            f"{shown(module)} is packed as {list(packed)} with scales {list(groups)}, which is "
            f"not {scheme.bits} bits in groups of {scheme.group_size}"
        )
    return scheme, (packed[0], columns)
