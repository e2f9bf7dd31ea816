"""MLX's quantized matrices, several tensors each, as the one tensor that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from mlx_openelm.errors import InputError
from mlx_openelm.files import shown
from mlx_openelm.quantization import Quantization, Scheme

from .lazy import DTYPES, LazyTensor

_FLOATS = ("float32", "float16", "bfloat16")


def dequantized(
    tensors: Mapping[str, LazyTensor], quantization: Quantization | None, where: str
) -> dict[str, LazyTensor]:
    """The tensors with every quantized matrix (`.weight`, `.scales`, `.biases`) as one `.weight`.

    Its dtype is that of the scales, or bfloat16 where those are 8-bit (mxfp4, mxfp8, nvfp4); its
    rows are dequantized as they are read.

    Raises:
        InputError: starting with `where`, when parts are missing, or their shapes or dtypes
            contradict the scheme; names the tensor.
    """
    modules = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module in modules:
            if part == "weight":
                found[name] = _matrix(tensors, module, quantization, where)
            elif part not in ("scales", "biases"):
                raise InputError(f"{where}: tensor {shown(name)} belongs to no quantized matrix")
        else:
            found[name] = tensor
    for module in modules:
        if f"{module}.weight" not in tensors:
            raise InputError(f"{where}: tensor {shown(module + '.weight')} is missing")
    return found


def _matrix(
    tensors: Mapping[str, LazyTensor],
    module: str,
    quantization: Quantization | None,
    where: str,
) -> LazyTensor:
    name = f"{module}.weight"
    scheme = quantization.scheme(module) if quantization else None
    if scheme is None:
        raise InputError(f"{where}: {shown(module)} is quantized, but config.json doesn't say how")
    weight, scales = tensors[name], tensors[f"{module}.scales"]
    biases = tensors.get(f"{module}.biases")
    affine = scheme.mode == "affine"
    if affine and biases is None:
        raise InputError(f"{where}: tensor {shown(module + '.biases')} is missing")
    if biases is not None and (not affine or _kind(biases) != _kind(scales)):
        raise InputError(f"{where}: tensor {shown(biases.name)} doesn't go with {scheme.mode}")
    if weight.dtype != "uint32" or scales.dtype not in (_FLOATS if affine else ("uint8",)):
        raise InputError(
            f"{where}: {shown(module)} holds {weight.dtype} and {scales.dtype}, which is not "
            f"{scheme.mode} quantization"
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
            f"{where}: {shown(module)} is packed as {list(packed)} with scales {list(groups)}, "
            f"which is not {scheme.bits} bits in groups of {scheme.group_size}"
        )
    dtype = scales.dtype if affine else "bfloat16"
    rows = partial(_rows, weight, scales, biases, scheme, dtype)
    return LazyTensor(name, (packed[0], columns), dtype, rows)


def _kind(tensor: LazyTensor) -> tuple[tuple[int, ...], str]:
    return tensor.shape, tensor.dtype


def _rows(
    weight: LazyTensor,
    scales: LazyTensor,
    biases: LazyTensor | None,
    scheme: Scheme,
    dtype: str,
    start: int,
    stop: int,
) -> mx.array:
    values = mx.dequantize(
        weight.rows(start, stop),
        scales.rows(start, stop),
        biases.rows(start, stop) if biases else None,
        **scheme.to_dict(),
        dtype=DTYPES[dtype][1],
    )
    mx.eval(values)
    return values
