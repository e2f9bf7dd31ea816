"""MLX's quantized matrices, several tensors each, as the one tensor that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from mlx_openelm.checkpoint.names import canonical_name
from mlx_openelm.checkpoint.stored_quantization import packed_scheme
from mlx_openelm.errors import InputError
from mlx_openelm.files import shown
from mlx_openelm.model.quantization import PARTS, Quantization, Scheme

from .lazy import DTYPES, LazyTensor


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
    parts: dict[str, dict[str, LazyTensor]] = {module: {} for module in modules}
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module not in modules:
            found[name] = tensor
        elif part in PARTS:
            parts[module][part] = tensor
        else:
            raise InputError(f"{where}: tensor {shown(name)} belongs to no quantized matrix")
    for module in sorted(modules):
        try:
            found[f"{module}.weight"] = _matrix(module, parts[module], quantization)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return found


def _matrix(
    module: str, parts: Mapping[str, LazyTensor], quantization: Quantization | None
) -> LazyTensor:
    canonical = canonical_name(f"{module}.weight") or f"{module}.weight"
    scheme, shape = packed_scheme(canonical.removesuffix(".weight"), parts, quantization)
    weight, scales, biases = parts["weight"], parts["scales"], parts.get("biases")
    dtype = scales.dtype if scheme.mode == "affine" else "bfloat16"
    rows = partial(_rows, weight, scales, biases, scheme, dtype)
    return LazyTensor(weight.name, shape, dtype, rows)


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
