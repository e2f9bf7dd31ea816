"""Whether a converted model has its source's weights, and still computes what its source does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.checkpoint.names import EMBEDDINGS, HEAD
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.model.quantization import Quantization
from mlx_openelm.model.shapes import tensor_shapes

from .floats import trial_tokens
from .forward import Stage, stages
from .sources import LazyTensor

TOKENS = 32
# Largest relative difference that rounding weights to a format may make (docs/decisions.md
# says what was measured), by dtype, and by the fewest bits of a quantized matrix
DTYPE_BOUNDS = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.1}
BITS_BOUNDS = {8: 0.15, 6: 0.3, 5: 0.5, 4: 0.8, 3: 1.2, 2: 1.5}
# The same of one tensor. Uniform rounding in groups of g makes at most √(g / 6) / (2^bits - 1),
# 8-bit floats half a unit of 3 bits. Another tensor in its place makes about √2, zeros make 1.
DTYPE_ROUNDING = {"float32": 1e-6, "float16": 0.005, "bfloat16": 0.005}
BITS_ROUNDING = {8: 0.1, 6: 0.1, 5: 0.2, 4: 0.4, 3: 0.7, 2: 0.95}
_BLOCK = 1 << 20  # elements of a tensor, compared at once


@dataclass(frozen=True)
class Verdict:
    """How far two models are apart on the same tokens, both computed in float32.

    Attributes:
        stages: (name, difference) from the embeddings to the logits: the root mean square of the
            difference over that of the source's values.
        largest, mean: differences between logits.
        divergence: Kullback-Leibler, of the converted model's distribution from the source's,
            in nats per position.
        agreement: share of positions at which both have the same likeliest token.
        bound: of the last stage's difference.
        damaged: (name, difference, bound) of the tensors that rounding doesn't explain. Logits
            alone don't show them all: one matrix of many adds little to the sum of the layers.
    """

    stages: list[tuple[str, float]]
    largest: float
    mean: float
    divergence: float
    agreement: float
    bound: float
    damaged: list[tuple[str, float, float]]

    @property
    def passed(self) -> bool:
        """Whether the logits' difference is within the bound (NaN isn't), and each tensor's."""
        return self.stages[-1][1] <= self.bound and not self.damaged

    @property
    def first_apart(self) -> str | None:
        """The first stage with any difference at all; None when there is none."""
        return next((name for name, apart in self.stages if apart != 0), None)

    @property
    def parting(self) -> str | None:
        """The first stage whose difference is beyond the bound; None when there is none."""
        return next((name for name, apart in self.stages if not apart <= self.bound), None)


def verify(
    source: Mapping[str, LazyTensor],
    source_config: OpenELMConfig,
    converted: Mapping[str, LazyTensor],
    config: OpenELMConfig,
    quantization: Quantization | None,
    *,
    count: int = TOKENS,
) -> Verdict:
    """Compare their tensors, and run both on the same `count` tokens.

    One layer of each is in memory at a time.

    Args:
        source, converted: tensors by the names of a model directory.
        source_config, config: their geometries, the same but for a trimmed vocabulary: logits are
            compared over the rows that both have.
        quantization: of the converted model.

    Raises:
        InputError: when the geometries differ.
    """
    if source_config.num_transformer_layers != config.num_transformer_layers or (
        source_config.model_dim != config.model_dim
    ):
        raise InputError(
            f"these are not the same model: {source_config.num_transformer_layers} layers of "
            f"width {source_config.model_dim} and {config.num_transformer_layers} of "
            f"{config.model_dim}"
        )
    damaged = [
        (name, difference, bound)
        for name, wanted, got in _pairs(source, source_config, converted, config)
        for bound in [_rounding(name, got, quantization)]
        if not (difference := _apart(name, wanted, got)) <= bound
    ]
    rows = min(config.vocab_size, source_config.vocab_size)
    smaller = config if config.vocab_size == rows else source_config
    tokens = trial_tokens(smaller, count)
    apart: list[tuple[str, float]] = []
    for before, after in zip(
        stages(source, source_config, tokens), stages(converted, config, tokens), strict=True
    ):
        a, b = _shared(before, rows), _shared(after, rows)
        apart.append((before.name, _relative(a, b)))
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (a, b))
    differences = mx.abs(a - b)
    return Verdict(
        apart,
        largest=_number(mx.max(differences)),
        mean=_number(mx.mean(differences)),
        divergence=_number(mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1))),
        agreement=_number(mx.mean(mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1))),
        bound=bound_for({tensor.dtype for tensor in converted.values()}, quantization),
        damaged=damaged,
    )


def bound_for(dtypes: set[str], quantization: Quantization | None) -> float:
    """The bound for a model stored in these dtypes, or in as few bits as its scheme has."""
    if quantization is not None:
        schemes = (quantization.default, *quantization.exceptions.values())
        return max(BITS_BOUNDS[scheme.bits] for scheme in schemes if scheme)
    return max(DTYPE_BOUNDS.get(dtype, 0.0) for dtype in dtypes)


def _pairs(
    source: Mapping[str, LazyTensor],
    source_config: OpenELMConfig,
    converted: Mapping[str, LazyTensor],
    config: OpenELMConfig,
) -> Iterator[tuple[str, LazyTensor, LazyTensor]]:
    """Each tensor of the two models; tied embeddings are the output matrix, too."""
    wanted, found = tensor_shapes(source_config), tensor_shapes(config)
    for name in wanted | found:
        other = EMBEDDINGS if name == HEAD else name
        a = name if name in wanted else other
        b = name if name in found else other
        if a not in wanted or b not in found:
            raise InputError(f"these are not the same model: only one has the tensor {name}")
        yield name, source[a], converted[b]


def _apart(name: str, a: LazyTensor, b: LazyTensor) -> float:
    """The root mean square of the difference over that of `a`, of the rows that both have."""
    trimmed = name in (EMBEDDINGS, HEAD)
    if a.shape[trimmed:] != b.shape[trimmed:]:
        raise InputError(
            f"these are not the same model: tensor {name} is {list(a.shape)} and {list(b.shape)}"
        )
    rows = min(a.shape[0], b.shape[0])
    step = max(1, _BLOCK // math.prod(a.shape[1:]))
    difference = size = 0.0
    for start in range(0, rows, step):
        x, y = (_float32(t.rows(start, min(start + step, rows))) for t in (a, b))
        difference += _number(mx.sum(mx.square(x - y)))
        size += _number(mx.sum(mx.square(x)))
    return _ratio(difference, size)


def _rounding(name: str, tensor: LazyTensor, quantization: Quantization | None) -> float:
    """What the converted model's format may make of a tensor."""
    matrix = quantization is not None and len(tensor.shape) == 2
    scheme = quantization.scheme(name.removesuffix(".weight")) if matrix and quantization else None
    return BITS_ROUNDING[scheme.bits] if scheme else DTYPE_ROUNDING.get(tensor.dtype, 0.0)


def _shared(stage: Stage, rows: int) -> mx.array:
    return stage.hidden[..., :rows] if stage.name == "logits" else stage.hidden


def _relative(a: mx.array, b: mx.array) -> float:
    return _ratio(_number(mx.mean(mx.square(a - b))), _number(mx.mean(mx.square(a))))


def _ratio(difference: float, size: float) -> float:
    """Of root mean squares, from squares."""
    if not difference:
        return 0.0
    return math.sqrt(difference / size) if size else math.inf


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32, stream=mx.cpu)


def _number(array: mx.array) -> float:
    return float(array.item())  # type: ignore[arg-type]
