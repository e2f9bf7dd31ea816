"""Whether a converted model still computes what its source does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.quantization import Quantization

from .floats import trial_tokens
from .forward import Stage, stages
from .sources import LazyTensor

TOKENS = 32
# Largest relative difference that rounding weights to a format may make (docs/decisions.md
# says what was measured), by dtype, and by the fewest bits of a quantized matrix
DTYPE_BOUNDS = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.1}
BITS_BOUNDS = {8: 0.15, 6: 0.3, 5: 0.5, 4: 0.8, 3: 1.2, 2: 1.5}


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
    """

    stages: list[tuple[str, float]]
    largest: float
    mean: float
    divergence: float
    agreement: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the logits' difference is within the bound (NaN isn't)."""
        return self.stages[-1][1] <= self.bound

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
    bound: float,
    *,
    count: int = TOKENS,
) -> Verdict:
    """Run both on the same `count` tokens; one layer of each is in memory at a time.

    Args:
        source, converted: tensors by the names of a model directory.
        source_config, config: their geometries, the same but for a trimmed vocabulary: logits are
            compared over the rows that both have.
        bound: see `bound_for`.

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
    rows = min(config.vocab_size, source_config.vocab_size)
    smaller = config if config.vocab_size == rows else source_config
    tokens = trial_tokens(smaller, count)
    apart: list[tuple[str, float]] = []
    for wanted, got in zip(
        stages(source, source_config, tokens), stages(converted, config, tokens), strict=True
    ):
        a, b = _shared(wanted, rows), _shared(got, rows)
        apart.append((wanted.name, _relative(a, b)))
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (a, b))
    difference = mx.abs(a - b)
    return Verdict(
        apart,
        largest=_number(mx.max(difference)),
        mean=_number(mx.mean(difference)),
        divergence=_number(mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1))),
        agreement=_number(mx.mean(mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1))),
        bound=bound,
    )


def bound_for(dtypes: set[str], quantization: Quantization | None) -> float:
    """The bound for a model stored in these dtypes, or in as few bits as its scheme has."""
    if quantization is not None:
        schemes = (quantization.default, *quantization.exceptions.values())
        return max(BITS_BOUNDS[scheme.bits] for scheme in schemes if scheme)
    return max(DTYPE_BOUNDS.get(dtype, 0.0) for dtype in dtypes)


def _shared(stage: Stage, rows: int) -> mx.array:
    return stage.hidden[..., :rows] if stage.name == "logits" else stage.hidden


def _relative(a: mx.array, b: mx.array) -> float:
    size = math.sqrt(_number(mx.mean(mx.square(a))))
    return math.sqrt(_number(mx.mean(mx.square(a - b)))) / size if size else math.inf


def _number(array: mx.array) -> float:
    return float(array.item())  # type: ignore[arg-type]
