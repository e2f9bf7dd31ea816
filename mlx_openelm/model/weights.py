"""The weights of a network: tensors by their name on disk, checked, as the network uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx

from ..config import OpenELMConfig
from ..dtypes import dtype_name
from ..errors import InputError
from .quantization import Matrix, Quantization
from .shapes import tensor_shapes


@dataclass(frozen=True)
class Layer:
    """The weights of one layer. The field names are those of the tensors on disk."""

    attn_norm: mx.array  # [model_dim]
    qkv_proj: Matrix  # rows: all query heads, all key heads, all value heads
    q_norm: mx.array | None  # [head_dim]
    k_norm: mx.array | None
    out_proj: Matrix
    ffn_norm: mx.array
    proj_1: Matrix  # rows: gate, then up (with GLU)
    proj_2: Matrix


@dataclass(frozen=True)
class Weights:
    """All weights of a network, in the dtype it computes in."""

    token_embeddings: Matrix
    layers: tuple[Layer, ...]
    norm: mx.array
    lm_head: Matrix  # the embeddings again, when they are tied


def random_arrays(config: OpenELMConfig) -> dict[str, mx.array]:
    """Weights of standard deviation 0.02 and norms of 1, from MLX's global random state."""
    return {
        name: mx.random.normal(shape, scale=0.02) if len(shape) == 2 else mx.ones(shape)
        for name, shape in tensor_shapes(config).items()
    }


def dequantize(weights: Weights, dtype: mx.Dtype, multiplies: Callable[[Matrix], bool]) -> Weights:
    """The same weights with the matrices unquantized, in `dtype`, that can't be multiplied fast."""

    def plain(matrix: Matrix) -> Matrix:
        return matrix if multiplies(matrix) else matrix.dequantize(dtype)

    embeddings = plain(weights.token_embeddings)
    tied = weights.lm_head is weights.token_embeddings
    layers = []
    for layer in weights.layers:
        matrices: dict[str, Any] = {name: plain(getattr(layer, name)) for name in _MATRICES}
        layers.append(replace(layer, **matrices))
    lm_head = embeddings if tied else plain(weights.lm_head)
    return Weights(embeddings, tuple(layers), weights.norm, lm_head)


Kind = mx.Dtype | mx.DtypeCategory

_MATRICES = {"qkv_proj": "attn.", "out_proj": "attn.", "proj_1": "ffn.", "proj_2": "ffn."}
_VECTORS = {"attn_norm": "", "ffn_norm": "", "q_norm": "attn.", "k_norm": "attn."}


def make_weights(
    config: OpenELMConfig,
    arrays: Mapping[str, mx.array],
    quantization: Quantization | None,
    dtype: mx.Dtype,
    as_stored: bool = False,
) -> Weights:
    """Weights out of tensors by their name on disk; the arguments are `OpenELM`'s.

    Floating-point tensors are cast to `dtype`, but for matrices with `as_stored`.

    Raises:
        InputError: when a tensor is missing, too many, or of the wrong shape or dtype; names it.
    """
    left = dict(arrays)
    shapes = tensor_shapes(config)

    def take(name: str, shape: tuple[int, ...], kind: Kind = mx.floating) -> mx.array:
        if name not in left:
            raise InputError(f"tensor {name} is missing; {list(shape)} is expected")
        array = mx.array(left.pop(name))
        if array.shape != shape:
            raise InputError(
                f"tensor {name} has the shape {list(array.shape)}; {list(shape)} is expected"
            )
        if not mx.issubdtype(array.dtype, kind):
            expected = "floating point" if kind == mx.floating else dtype_name(kind)
            raise InputError(f"tensor {name} is {dtype_name(array.dtype)}; {expected} is expected")
        # Kernels read rows of values that lie side by side.
        keeps = kind != mx.floating or (as_stored and len(shape) == 2)
        return mx.contiguous(array if keeps else array.astype(dtype))

    def vector(name: str) -> mx.array:
        return take(name + ".weight", shapes[name + ".weight"])

    def matrix(module: str) -> Matrix:
        rows, columns = shapes[module + ".weight"]
        if module + ".scales" not in left:
            return Matrix(take(module + ".weight", (rows, columns)))
        scheme = quantization.scheme(module) if quantization else None
        if scheme is None:
            raise InputError(f"tensor {module} is quantized, but the config doesn't say how")
        groups = (rows, columns // scheme.group_size)
        scales = mx.floating if scheme.mode == "affine" else mx.uint8
        return Matrix(
            take(module + ".weight", (rows, columns * scheme.bits // 32), mx.uint32),
            take(module + ".scales", groups, scales),
            take(module + ".biases", groups) if scheme.mode == "affine" else None,
            scheme,
        )

    embeddings = matrix("transformer.token_embeddings")
    layers = []
    for i in range(config.num_transformer_layers):
        prefix = f"transformer.layers.{i}."
        parts: dict[str, Matrix | mx.array | None] = {
            name: matrix(prefix + block + name) for name, block in _MATRICES.items()
        }
        for name, block in _VECTORS.items():
            wanted = prefix + block + name + ".weight" in shapes
            parts[name] = vector(prefix + block + name) if wanted else None
        layers.append(Layer(**parts))  # type: ignore[arg-type]
    weights = Weights(
        token_embeddings=embeddings,
        layers=tuple(layers),
        norm=vector("transformer.norm"),
        lm_head=embeddings if config.share_input_output_layers else matrix("lm_head"),
    )
    if left:
        raise InputError(f"tensor {min(left)} is not part of the model")
    return weights


def named(config: OpenELMConfig, weights: Weights) -> Iterator[tuple[str, mx.array]]:
    """All tensors by their name on disk: the inverse of `make_weights`."""

    def parts(module: str, value: Matrix | mx.array) -> Iterator[tuple[str, mx.array]]:
        if isinstance(value, Matrix):
            yield from ((f"{module}.{part}", array) for part, array in value.arrays())
        else:
            yield f"{module}.weight", value

    yield from parts("transformer.token_embeddings", weights.token_embeddings)
    for i, layer in enumerate(weights.layers):
        for field in fields(layer):
            value = getattr(layer, field.name)
            block = _MATRICES.get(field.name, _VECTORS.get(field.name, ""))
            if value is not None:
                yield from parts(f"transformer.layers.{i}.{block}{field.name}", value)
    yield from parts("transformer.norm", weights.norm)
    if not config.share_input_output_layers:
        yield from parts("lm_head", weights.lm_head)
