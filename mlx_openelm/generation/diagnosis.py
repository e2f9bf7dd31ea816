"""Finds where logits became NaN or infinite, by computing the step again layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import mlx.core as mx

from ..errors import OpenELMError
from ..model import network
from ..model.buffers import store, view
from ..model.openelm import OpenELM
from ..model.quantization import Matrix

DAMAGED = (
    "the file is damaged, or the model was trained to this; download or convert it again, or take "
    "an earlier checkpoint"
)
OVERFLOW = (
    "activations overflow float16; compute in bfloat16 (openelm-convert --dtype bfloat16 writes "
    "such a model)"
)


def explain(model: OpenELM, text: Sequence[int], logits: mx.array, norm: float) -> OpenELMError:
    """The error for a row of logits from which no token can be chosen.

    Args:
        model: whose logits they are.
        text: the token ids they follow, as far as they are known.
        logits: [vocab], as the model gave them.
        norm: logsumexp or maximum of the logits as the logits processors changed them.
    """
    if _finite(logits):
        if norm == -math.inf:
            return OpenELMError("the logits processors leave no token that is possible")
        return OpenELMError("a logits processor made a logit NaN or infinite")
    for name, array in model.parameters().items():
        if mx.issubdtype(array.dtype, mx.floating) and not _finite(array):
            return OpenELMError(f"tensor {name} holds values that are NaN or infinite: {DAMAGED}")
    where = _first_not_finite(model, text)
    if where is None:
        return OpenELMError(
            "the logits are not finite, though those of the same text without the cache are: keys "
            "and values in the cache are damaged; begin with an empty cache"
        )
    reason = OVERFLOW if model.dtype == mx.float16 else f"the weights are of no use: {DAMAGED}"
    return OpenELMError(f"the logits are not finite: it began in {where}; {reason}")


def _first_not_finite(model: OpenELM, text: Sequence[int]) -> str | None:
    """The first part of the network whose output on `text` isn't finite, in words; None: none.

    What isn't finite stays so in every layer after it, so that a binary search finds the first.
    """
    layers = model.config.num_transformer_layers
    tokens = mx.array(list(text[-model.config.max_context_length :]), mx.int32)[None]
    if _finite(_hidden(model, tokens, layers)):
        logits = model.weights.lm_head(_hidden(model, tokens, layers)[:, -1])
        return None if _finite(logits) else "the output projection"
    low, high = -1, layers  # finite after `low` layers, not finite after `high`
    while high - low > 1:
        middle = (low + high) // 2
        if _finite(_hidden(model, tokens, middle)):
            low = middle
        else:
            high = middle
    return f"layer {high - 1} (of 0 to {layers - 1})" if high else "the embeddings"


class _Identity(Matrix):
    def __call__(self, x: mx.array) -> mx.array:
        return x


def _hidden(model: OpenELM, tokens: mx.array, layers: int) -> mx.array:
    """The normalised output [1, L, model_dim] of the first `layers` layers."""
    config, weights = model.config, model.weights
    length = tokens.shape[1]
    first = replace(weights, layers=weights.layers[:layers], lm_head=_Identity(weights.norm))
    buffers = [
        store(mx.zeros((1, 2 * heads, length, config.head_dim), model.dtype), None)
        for heads in config.num_kv_heads[:layers]
    ]
    step = network.make_step(config, first)
    return step(tokens, buffers, view(mx.array(0), length, length), None)[0]


def _finite(array: mx.array) -> bool:
    return cast(bool, mx.all(mx.isfinite(array)).item())
