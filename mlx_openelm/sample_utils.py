"""Sampling by the functions of `mlx_lm.sample_utils`; what they do is in `sampling`."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .generation.sampling import (
    Draws,
    LogitsProcessor,
    Sampler,
    Xtc,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_logits_processors,
    make_sampler,
)
from .generation.sampling import greedy as greedy_sampler

__all__ = [
    "LogitsProcessor",
    "Sampler",
    "apply_min_p",
    "apply_top_k",
    "apply_top_p",
    "apply_xtc",
    "categorical_sampling",
    "greedy_sampler",
    "make_frequency_penalty",
    "make_logits_processors",
    "make_presence_penalty",
    "make_repetition_penalty",
    "make_sampler",
]


def apply_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """All but the `top_k` largest of [..., vocab] become -inf.

    Raises:
        ValueError: when `top_k` isn't above 0 and below the size of the vocabulary.
    """
    vocab = logprobs.shape[-1]
    if not isinstance(top_k, int) or not 0 < top_k < vocab:
        raise ValueError(f"top_k must be an integer from 1 to {vocab - 1}, not {top_k}")
    return keep_top_k(logprobs, top_k)


def apply_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Tokens of [..., vocab] less than `min_p` times as likely as the likeliest become -inf.

    Raises:
        ValueError: when `min_p` isn't above 0 and at most 1, or `min_tokens_to_keep` isn't an
            integer of at least 1.
    """
    if not 0 < min_p <= 1:
        raise ValueError(f"min_p must be above 0 and at most 1, not {min_p}")
    if not isinstance(min_tokens_to_keep, int) or min_tokens_to_keep < 1:
        raise ValueError(f"min_tokens_to_keep must be at least 1, not {min_tokens_to_keep}")
    return keep_min_p(logprobs, min_p, min_tokens_to_keep)


def apply_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Of [..., vocab] the smallest set of likeliest tokens that reaches `top_p`; the rest -inf."""
    return keep_top_p(logprobs, top_p)


def apply_xtc(
    logits: mx.array,
    xtc_probability: float,
    xtc_threshold: float,
    xtc_special_tokens: Sequence[int],
) -> mx.array:
    """`logits` [B, vocab] after XTC (see `sampling.Xtc`); the coin is thrown for each row.

    Raises:
        ValueError: when a value is out of its range.
    """
    xtc = Xtc(xtc_probability, xtc_threshold, tuple(xtc_special_tokens))
    return xtc(logits, mx.random.uniform(shape=(*logits.shape[:-1], 1)))


def categorical_sampling(logits: mx.array, temp: float) -> mx.array:
    """Tokens [B] drawn from `logits` [B, vocab] at a temperature above 0."""
    return Draws(temp)(logits)


def make_repetition_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """The processor of `make_logits_processors(repetition_penalty=…)`.

    Raises:
        ValueError: when the penalty isn't positive.
    """
    (processor,) = make_logits_processors(None, penalty, context_size) or [_unchanged]
    return processor


def make_presence_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """The processor of `make_logits_processors(presence_penalty=…)`."""
    (processor,) = make_logits_processors(
        presence_penalty=penalty, presence_context_size=context_size
    ) or [_unchanged]
    return processor


def make_frequency_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """The processor of `make_logits_processors(frequency_penalty=…)`."""
    (processor,) = make_logits_processors(
        frequency_penalty=penalty, frequency_context_size=context_size
    ) or [_unchanged]
    return processor


def _unchanged(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits
