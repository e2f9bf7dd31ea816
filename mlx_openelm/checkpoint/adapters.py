"""Adapters: what one changes in a model's weights, and merging it into them.

LoRA (arXiv 2106.09685): W + s · B·A. DoRA (arXiv 2402.09353): that sum with its rows (or columns)
rescaled to learned lengths. `adapter_files` reads the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import mlx.core as mx

from ..config import OpenELMConfig
from ..errors import InputError
from ..files import shown
from ..model.quantization import Matrix, Quantization
from .names import EMBEDDINGS, HEAD, canonical_name, map_names


class Shaped(Protocol):
    """A tensor, in memory or not."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...


T = TypeVar("T", bound=Shaped)


@dataclass(frozen=True)
class Update(Generic[T]):
    """What is added to one matrix [rows, columns]: `scale · left @ right`.

    Attributes:
        left: [rows, rank], or [rank, rows] if `transposed`.
        right: [rank, columns], or [columns, rank] if `transposed`.
        transposed: whether the factors are stored so.
        scale: alpha / rank, or what stands for it.
        magnitude: DoRA: the length that each row of the sum is rescaled to, `rows` elements.
        by_column: the magnitude is one of the columns, `columns` elements.
    """

    left: T
    right: T
    transposed: bool
    scale: float
    magnitude: T | None = None
    by_column: bool = False


@dataclass(frozen=True)
class Adapter(Generic[T]):
    """An adapter, by the names of the weights that it changes.

    Attributes:
        path: where it is.
        kind: whose format, in words.
        updates: of matrices.
        tensors: that take the place of the base's.
        rows: of a matrix, that take the place of the base's: their indices, and [n, columns].
        base: the model that it was trained on, as its settings call it, and its `revision`.
        keeps_head: where embeddings are tied, an update of them leaves the output matrix alone.
    """

    path: Path
    kind: str
    updates: Mapping[str, Update[T]] = field(default_factory=dict)
    tensors: Mapping[str, T] = field(default_factory=dict)
    rows: Mapping[str, tuple[list[int], T]] = field(default_factory=dict)
    base: str | None = None
    revision: str | None = None
    keeps_head: bool = False


V = TypeVar("V")


def by_canonical_names(adapter: Adapter[T]) -> tuple[Adapter[T], list[str]]:
    """The same by the names of a model directory, and a line for each tensor that was left out.

    Raises:
        InputError: when a name is unknown, or two stand for the same weight.
    """

    def canonical(values: Mapping[str, V]) -> dict[str, V]:
        found: dict[str, V] = {}
        for old, value in values.items():
            new = canonical_name(old)
            if new is None:
                module = shown(old.removesuffix(".weight"))
                raise InputError(
                    f"{adapter.path}: the adapter of {module} has no matrix to be merged into"
                )
            if new in found:
                raise InputError(f"{adapter.path}: changes {shown(new)} twice")
            found[new] = value
        return found

    try:
        tensors, notes = map_names(adapter.tensors)
    except InputError as error:
        raise InputError(f"{adapter.path}: {error}") from None
    updates, rows = canonical(adapter.updates), canonical(adapter.rows)
    return replace(adapter, updates=updates, tensors=tensors, rows=rows), notes


def adapted_config(adapter: Adapter[T], config: OpenELMConfig) -> OpenELMConfig:
    """The geometry of the merged model: the vocabulary may be larger, the head no longer tied."""
    embeddings = adapter.tensors.get(EMBEDDINGS)
    if embeddings is not None and len(embeddings.shape) == 2:
        config = replace(config, vocab_size=embeddings.shape[0])
    own_head = HEAD in adapter.tensors or HEAD in adapter.updates
    if own_head or (adapter.keeps_head and EMBEDDINGS in adapter.updates):
        config = replace(config, share_input_output_layers=False)
    return config


def merge(
    base: Mapping[str, T],
    adapter: Adapter[T],
    config: OpenELMConfig,
    add: Callable[[T, Update[T]], T],
    put: Callable[[T, list[int], T], T],
) -> tuple[dict[str, T], OpenELMConfig]:
    """The base's tensors with the adapter in them.

    Args:
        base: tensors by their name in a model directory, tied embeddings once.
        adapter: by the same names.
        config: the base's geometry.
        add: a matrix with an update in it.
        put: a matrix with some rows replaced.

    Returns:
        The tensors, and their geometry.

    Raises:
        InputError: when the adapter has no matrix to go to, or doesn't fit it; names it.
    """
    merged = {**base, **adapter.tensors}
    for name, (indices, values) in adapter.rows.items():
        matrix = _target(merged, name, adapter)
        _check_rows(
            f"{adapter.path}: the trained rows of {shown(name)}",
            matrix.shape,
            indices,
            values.shape,
        )
        merged[name] = put(matrix, indices, values)
    tied = config.share_input_output_layers
    config = adapted_config(adapter, config)
    if tied and not config.share_input_output_layers:
        merged.setdefault(HEAD, _target(merged, EMBEDDINGS, adapter))
    for name, update in adapter.updates.items():
        matrix = _target(merged, name, adapter)
        _check_update(
            f"{adapter.path}: {shown(name.removesuffix('.weight'))}", matrix.shape, update
        )
        merged[name] = add(matrix, update)
    return merged, config


def _target(tensors: Mapping[str, T], name: str, adapter: Adapter[T]) -> T:
    if name not in tensors:
        module = shown(name.removesuffix(".weight"))
        raise InputError(f"{adapter.path}: the adapter of {module} has no matrix to be merged into")
    return tensors[name]


def _check_rows(
    where: str, shape: tuple[int, ...], indices: list[int], values: tuple[int, ...]
) -> None:
    if len(shape) != 2 or values != (len(indices), shape[-1]):
        raise InputError(
            f"{where} have the shape {list(values)}, but {len(indices)} rows of a matrix of "
            f"{list(shape)} are named"
        )
    if not all(0 <= index < shape[0] for index in indices):
        raise InputError(f"{where} lie beyond its {shape[0]} rows")
    if len(set(indices)) != len(indices):
        raise InputError(f"{where} name a row twice")


def _check_update(where: str, shape: tuple[int, ...], update: Update[T]) -> None:
    left, right = update.left.shape, update.right.shape
    rows, columns = shape if len(shape) == 2 else (0, 0)
    rank = left[0 if update.transposed else -1] if left else 0
    wanted = (rows, rank), (rank, columns)
    if update.transposed:
        wanted = wanted[0][::-1], wanted[1][::-1]
    if not rank or (left, right) != wanted:
        raise InputError(
            f"{where} has an adapter of the shapes {list(left)} and {list(right)}, which don't "
            f"fit a matrix of {list(shape)}"
        )
    if update.magnitude is None:
        return
    count = columns if update.by_column else rows
    if update.magnitude.shape not in ((count,), (count, 1), (1, count)):
        axis = "columns" if update.by_column else "rows"
        raise InputError(
            f"{where} has magnitudes of the shape {list(update.magnitude.shape)}; the matrix has "
            f"{count} {axis}"
        )


# ---------------------------------------------------------------------------------------------
# In memory


def apply_adapter(
    adapter: Adapter[mx.array],
    arrays: Mapping[str, mx.array],
    config: OpenELMConfig,
    quantization: Quantization | None,
) -> tuple[dict[str, mx.array], OpenELMConfig, Quantization | None]:
    """A model's tensors with an adapter merged into them, computed in float32 when evaluated.

    A quantized matrix that the adapter changes is dequantized and stays so: the result is what
    the quantized matrix and the adapter give side by side, and needs that matrix's memory at the
    width that the model computes in.

    Args:
        adapter: by its own names for the weights.
        arrays: by their name on disk.
        config, quantization: the model's.

    Returns:
        Tensors (changed matrices in their dtype, dequantized ones in float32), geometry, and
        quantization.

    Raises:
        InputError: when the adapter doesn't fit the model; names the matrix.
    """
    arrays = dict(arrays)
    adapter, _ = by_canonical_names(adapter)
    changed = adapted_config(adapter, config)
    untied = config.share_input_output_layers and not changed.share_input_output_layers
    if untied and EMBEDDINGS not in adapter.tensors:
        quantization = _untie(arrays, quantization)
    for name in {*adapter.updates, *adapter.tensors, *adapter.rows}:
        _dequantize(arrays, name.removesuffix(".weight"), quantization)
    merged, config = merge(arrays, adapter, config, _add, _put)
    return merged, config, quantization


def _untie(arrays: dict[str, mx.array], quantization: Quantization | None) -> Quantization | None:
    """Let the output matrix be the embeddings as they are, quantized ones too."""
    embeddings, head = EMBEDDINGS.removesuffix("weight"), HEAD.removesuffix("weight")
    for part in ("weight", "scales", "biases"):
        if embeddings + part in arrays:
            arrays[head + part] = arrays[embeddings + part]
    if quantization is None:
        return None
    scheme = quantization.scheme(embeddings.removesuffix("."))
    return Quantization(
        quantization.default, {**quantization.exceptions, head.removesuffix("."): scheme}
    )


def _dequantize(
    arrays: dict[str, mx.array], module: str, quantization: Quantization | None
) -> None:
    scales = arrays.pop(f"{module}.scales", None)
    if scales is None:
        return
    scheme = quantization.scheme(module) if quantization else None
    if scheme is None:
        raise InputError(f"tensor {module} is quantized, but the config doesn't say how")
    weight, biases = arrays.get(f"{module}.weight"), arrays.pop(f"{module}.biases", None)
    if weight is None:
        raise InputError(f"tensor {module}.weight is missing")
    try:
        plain = Matrix(weight, scales, biases, scheme).dequantize(mx.float32)
    except ValueError as error:
        raise InputError(f"tensor {module} is not quantized as the config says ({error})") from None
    arrays[f"{module}.weight"] = plain.weight


def _add(matrix: mx.array, update: Update[mx.array]) -> mx.array:
    left, right = _float32(update.left), _float32(update.right)
    if update.transposed:
        left, right = left.T, right.T
    merged = _float32(matrix) + update.scale * (left @ right)
    if update.magnitude is not None:
        shape, axis = ((1, -1), 0) if update.by_column else ((-1, 1), 1)
        lengths = mx.linalg.norm(merged, axis=axis, keepdims=True)
        merged = merged * (_float32(update.magnitude).reshape(shape) / lengths)
    return merged.astype(matrix.dtype)


def _put(matrix: mx.array, indices: list[int], values: mx.array) -> mx.array:
    merged = mx.array(matrix)
    merged[mx.array(indices)] = _float32(values).astype(matrix.dtype)
    return merged


def _float32(array: mx.array) -> mx.array:
    stream = mx.cpu if array.dtype == mx.float64 else None  # a GPU has no float64
    return array.astype(mx.float32, stream=stream)
