"""Which matrix gets how many bits, and matrices stored so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..files import brief

# mode -> (allowed group sizes, allowed bits), as `mx.quantize` has them.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}

PARTS = ("weight", "scales", "biases")  # of a quantized matrix, each a tensor


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized: `bits` per weight, in groups that share scale (and bias).

    Raises:
        InputError: when MLX has no such combination.
    """

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, not {brief(self.mode)}")
        for name, allowed in zip(("group_size", "bits"), MODES[self.mode], strict=True):
            value = getattr(self, name)
            if type(value) is not int or value not in allowed:
                choice = ", ".join(map(str, allowed))
                raise InputError(f"{name} of mode {self.mode} must be {choice}, not {brief(value)}")

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it: always all three, because an override inherits nothing."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


class Quantization:
    """The `quantization` entry of a `config.json`: a scheme, and exceptions by module path.

    An exception is a scheme, or None for a module that stays unquantized.
    """

    def __init__(self, default: Scheme, exceptions: Mapping[str, Scheme | None] | None = None):
        self.default = default
        self.exceptions = dict(exceptions or {})

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of one module, such as `transformer.layers.0.attn.qkv_proj`."""
        return self.exceptions.get(module, self.default)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Quantization:
        """Parse what mlx-lm writes: `{"group_size", "bits", "mode", "a.module": {…} | false}`.

        A value that isn't given is mlx-lm's default for it, in an override too.

        Raises:
            InputError: for a scheme that MLX doesn't have; names the module.
        """
        exceptions: dict[str, Scheme | None] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                exceptions[name] = _scheme(value, f"{where}: quantization of {brief(name)}")
            elif value is False:
                exceptions[name] = None
        return cls(_scheme(values, f"{where}: quantization"), exceptions)

    def to_dict(self) -> dict[str, Any]:
        """The entry for `config.json`; the inverse of `from_dict`."""
        exceptions = {
            name: scheme.to_dict() if scheme else False for name, scheme in self.exceptions.items()
        }
        return {**self.default.to_dict(), **exceptions}


def _scheme(values: Mapping[str, Any], where: str) -> Scheme:
    given = {k: values[k] for k in ("group_size", "bits", "mode") if values.get(k) is not None}
    try:
        return Scheme(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Matrix:
    """A matrix of `rows` × `columns`, plain or quantized, that multiplies from the right.

    Attributes:
        weight: [rows, columns] floating point; quantized: uint32 [rows, columns × bits / 32].
        scales, biases: [rows, columns / group_size]; biases in affine mode only.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    scheme: Scheme | None = None

    @cached_property
    def transposed(self) -> mx.array:
        """The weight as [columns, rows]: a view, made once and not in every step's graph."""
        mx.eval(transposed := self.weight.T)
        return transposed

    def __call__(self, x: mx.array) -> mx.array:
        """`x` [..., columns] → `x @ matrix.T` [..., rows]."""
        if self.scheme is None:
            return x @ self.transposed
        assert self.scales is not None
        return mx.quantized_matmul(
            x,
            self.weight,
            scales=self.scales,
            biases=self.biases,
            transpose=True,
            **self.scheme.to_dict(),
        )

    def dequantize(self, dtype: mx.Dtype) -> Matrix:
        """The same matrix unquantized, in `dtype`."""
        return self if self.scheme is None else Matrix(self._values(..., dtype))

    def take(self, rows: mx.array, dtype: mx.Dtype) -> mx.array:
        """`rows` [...] of integers → those rows, [..., columns], in `dtype`."""
        if self.scheme is None:
            return self.weight[rows].astype(dtype)
        flat = rows.reshape(-1)
        assert self.scales is not None
        if self.scheme.mode == "nvfp4" and flat.size * self.scales.shape[-1] % 2:
            # MLX's CPU backend takes these groups of 16 in pairs.
            flat = mx.concatenate([flat, flat[:1]])
        values = self._values(flat, dtype)[: rows.size]
        return values.reshape(*rows.shape, -1)

    def _values(self, rows: Any, dtype: mx.Dtype) -> mx.array:
        assert self.scheme is not None and self.scales is not None
        scales, biases = self.scales[rows], None
        if self.biases is not None:  # MLX computes in their dtype, whatever it returns
            scales, biases = scales.astype(dtype), self.biases[rows].astype(dtype)
        return mx.dequantize(
            self.weight[rows], scales, biases, **self.scheme.to_dict(), dtype=dtype
        )

    def arrays(self) -> Iterator[tuple[str, mx.array]]:
        """(`weight`, …) and whichever of `scales` and `biases` there are."""
        for name in PARTS:
            array = getattr(self, name)
            if array is not None:
                yield name, array


def quantize(weight: mx.array, scheme: Scheme) -> Matrix:
    """Quantize [rows, columns]; `columns` must be a multiple of the scheme's group size.

    Raises:
        InputError: when it isn't, or MLX can't quantize such a shape.
    """
    if weight.shape[-1] % scheme.group_size:
        raise InputError(
            f"{weight.shape[-1]} columns are not a multiple of the group size {scheme.group_size}"
        )
    try:
        parts = mx.quantize(weight, **scheme.to_dict())
    except ValueError as error:  # nvfp4: an odd number of rows of an odd number of groups
        raise InputError(
            f"MLX can't quantize {list(weight.shape)} to {scheme.bits} bits of mode {scheme.mode} "
            f"({error})"
        ) from None
    return Matrix(parts[0], parts[1], parts[2] if len(parts) > 2 else None, scheme)
