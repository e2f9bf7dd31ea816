"""Logits -> token. The names, arguments and order of the filters are mlx-lm's."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from ..errors import InputError

Sampler = Callable[[mx.array], mx.array]
"""Log-probabilities [B, vocab] -> tokens [B]."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""(tokens so far [n], logits [B, vocab]) -> logits [B, vocab]."""


GREEDY_TEMP = 1e-5
"""Temperatures up to here take the likeliest token, as 0 does (vLLM's limit, too)."""

TINY = 1e-30  # smaller numbers may be 0 in float32 on some devices
COLD = 0.1  # below, logits of float32 are too coarse unless the largest is 0
HOT = 1 / TINY


@dataclass(frozen=True)
class Xtc:
    """Exclude top choices: of the tokens above a threshold only the least likely is left.

    Source: https://github.com/oobabooga/text-generation-webui/pull/6335

    Attributes:
        probability: how often, from 0 to 1.
        threshold: the probability, at most 0.5, that a token has to have to be a choice.
        special_tokens: ids that always stay.

    Raises:
        InputError: when a value is out of its range.
    """

    probability: float
    threshold: float = 0.1
    special_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_number("xtc_probability", self.probability)
        _check_number("xtc_threshold", self.threshold)
        _check("xtc_probability", self.probability, 0 <= self.probability <= 1, "between 0 and 1")
        _check("xtc_threshold", self.threshold, 0 <= self.threshold <= 0.5, "between 0 and 0.5")
        for token in self.special_tokens:
            _check_count("a token id of xtc_special_tokens", token, 0)

    def __call__(self, logprobs: mx.array, coins: mx.array) -> mx.array:
        """`logprobs` [B, vocab] where `coins` [B, 1], uniform from 0 to 1, say so changed."""
        probs = mx.softmax(logprobs.astype(mx.float32), axis=-1)
        least = mx.min(mx.where(probs > self.threshold, probs, math.inf), axis=-1, keepdims=True)
        excluded = (probs > least) & (coins <= self.probability)
        if self.special_tokens:
            ids = mx.array(self.special_tokens)
            special = mx.any(mx.arange(logprobs.shape[-1])[:, None] == ids, axis=-1)
            excluded = excluded & ~special
        return mx.where(excluded, -math.inf, logprobs)


Filter = Callable[[mx.array], mx.array] | Xtc
"""Log-probabilities [B, vocab] -> the same, with -inf for tokens that are not to be drawn."""


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: Sequence[int] | None = None,
    *,
    seed: int | None = None,
) -> Sampler:
    """A function that draws tokens from log-probabilities.

    Args:
        temp: temperature; up to `GREEDY_TEMP` takes the most likely token, and the rest is ignored.
        top_p: keep the most likely tokens that together reach this probability (nucleus,
            arXiv 1904.09751); 0 or 1 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest (arXiv 2407.01082).
        min_tokens_to_keep: how many `min_p` always leaves.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        xtc_probability, xtc_threshold, xtc_special_tokens: see `Xtc`.
        seed: from 0 to 2**64 - 1, for draws of its own. `generate` starts them again for every
            text, `batch_generate` for each of its texts: equal prompts give equal texts. Without a
            seed the draws are from MLX's global random state (`mx.random.seed`).

    The filters apply before the temperature, as in mlx-lm. All is computed in float32.

    Raises:
        InputError: when a value is out of its range.
    """
    for name, value in (("temp", temp), ("top_p", top_p), ("min_p", min_p)):
        _check_number(name, value)
    _check("temp", temp, temp >= 0, "at least 0")
    _check("temp", temp, temp < math.inf, "finite")
    _check("top_p", top_p, 0 <= top_p <= 1, "between 0 and 1")
    _check("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1")
    _check_count("min_tokens_to_keep", min_tokens_to_keep, 1)
    _check_count("top_k", top_k, 0)
    xtc = Xtc(xtc_probability, xtc_threshold, tuple(xtc_special_tokens or ()))
    if seed is not None:
        seed = _as_seed(seed)
    if temp <= GREEDY_TEMP:
        return greedy
    filters: list[Filter] = []
    if 0 < top_p < 1:
        filters.append(partial(keep_top_p, p=top_p))
    if min_p > 0:
        filters.append(partial(keep_min_p, min_p=min_p, at_least=min_tokens_to_keep))
    if xtc.probability > 0:
        filters.append(xtc)
    if top_k > 0:
        filters.append(partial(keep_top_k, k=top_k))
    return Draws(temp, tuple(filters), seed)


def _as_seed(seed: int) -> int:
    try:
        seed = operator.index(seed)
    except TypeError:
        raise InputError(f"seed must be an integer, not {seed!r}") from None
    if not 0 <= seed < 1 << 64:
        shown = seed if seed.bit_length() <= 128 else f"one of {seed.bit_length()} bits"
        raise InputError(f"seed must be between 0 and 2**64 - 1, not {shown}")
    return seed


def greedy(logprobs: mx.array) -> mx.array:
    """The likeliest tokens [B] of [B, vocab]."""
    return mx.argmax(logprobs, axis=-1)


class Draws:
    """The sampler of `make_sampler` at a temperature above `GREEDY_TEMP`.

    With a seed, draws are numbered, and a draw depends on its number and not on the draws before
    it: a token that was drafted, rejected and drawn again is the same token. A seeded draw is the
    argmax of logits plus Gumbel noise, so that texts of one batch can share the noise, and the
    coins of XTC.
    """

    def __init__(
        self,
        temp: float,
        filters: tuple[Filter, ...] = (),
        seed: int | None = None,
    ) -> None:
        self.temp = temp
        self.filters = filters
        self.seed = seed
        self._chain = None if seed is None else mx.random.key(seed)
        self._keys: list[mx.array] = []  # of the draws to come

    def restarted(self) -> Draws:
        """The same sampler before its first draw."""
        return Draws(self.temp, self.filters, self.seed)

    def scaled(self, logprobs: mx.array, coins: mx.array | None = None) -> mx.array:
        """Logits [B, vocab], float32, whose softmax is the distribution that is drawn from.

        `coins`: [B, 1] or [1, 1], for XTC; by default from MLX's global random state.
        """
        logprobs = logprobs.astype(mx.float32)
        for keep in self.filters:
            if not isinstance(keep, Xtc):
                logprobs = keep(logprobs)
            elif coins is None:
                logprobs = keep(logprobs, mx.random.uniform(shape=(logprobs.shape[0], 1)))
            else:
                logprobs = keep(logprobs, coins)
        if self.temp < COLD:
            logprobs = logprobs - mx.max(logprobs, axis=-1, keepdims=True)
        return logprobs * (1 / min(self.temp, HOT))

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Tokens [B], the next draw, each row's independent of the others'."""
        return self._next(logprobs, logprobs.shape[0])

    def each(self, logprobs: mx.array) -> mx.array:
        """Tokens [B], the next draw, where each row is a text: what it would draw alone."""
        return self._next(logprobs, 1)

    def ahead(self, logprobs: mx.array, first: int = 0) -> mx.array:
        """Tokens [n]: of row `i` [n, vocab], what the draw `first + i` after the next one gives."""
        if self.seed is None:
            return mx.random.categorical(self.scaled(logprobs))
        keys = [self._key(first + i) for i in range(logprobs.shape[0])]
        return self._drawn(logprobs, keys, 1)

    def advance(self, count: int) -> None:
        """Consume the keys of `count` draws that were made `ahead`."""
        del self._keys[:count]

    def _next(self, logprobs: mx.array, rows: int) -> mx.array:
        if self.seed is None:
            return mx.random.categorical(self.scaled(logprobs))
        tokens = self._drawn(logprobs, [self._key(0)], rows)
        self.advance(1)
        return tokens

    def _drawn(self, logprobs: mx.array, keys: list[mx.array], rows: int) -> mx.array:
        """Tokens [B], by the noise and the coins that each of `keys` gives to so many rows."""
        coins = None
        if any(isinstance(keep, Xtc) for keep in self.filters):
            coins = mx.concatenate(
                [mx.random.uniform(shape=(rows, 1), key=mx.random.split(key)[1]) for key in keys]
            )
        shape = (rows, logprobs.shape[-1])
        noise = mx.concatenate([mx.random.gumbel(shape, key=key) for key in keys])
        return mx.argmax(self.scaled(logprobs, coins) + noise, axis=-1)

    def _key(self, number: int) -> mx.array:
        """The key of the draw that comes `number` after the next one."""
        assert self._chain is not None
        while len(self._keys) <= number:
            self._chain, key = mx.random.split(self._chain)
            self._keys.append(key)
        return self._keys[number]


def keep_top_k(logprobs: mx.array, k: int) -> mx.array:
    """All but the `k` largest of [B, vocab] become -inf; of equals at the edge, any."""
    if k >= logprobs.shape[-1]:
        return logprobs
    rest = mx.argpartition(-logprobs, kth=k - 1, axis=-1)[..., k:]
    return mx.put_along_axis(logprobs, rest, mx.array(-math.inf, logprobs.dtype), axis=-1)


def keep_top_p(logprobs: mx.array, p: float) -> mx.array:
    """The smallest set of likeliest tokens that reaches probability `p`; the rest -inf."""
    order = mx.argsort(-logprobs, axis=-1)
    probs = mx.softmax(mx.take_along_axis(logprobs, order, axis=-1).astype(mx.float32), axis=-1)
    before = mx.cumsum(probs, axis=-1, inclusive=False)
    kept = mx.put_along_axis(
        mx.zeros_like(logprobs, dtype=mx.bool_), order, before < max(p, TINY), axis=-1
    )
    return mx.where(kept, logprobs, -math.inf)


def keep_min_p(logprobs: mx.array, min_p: float, at_least: int = 1) -> mx.array:
    """Tokens less than `min_p` times as likely as the likeliest become -inf."""
    edge = mx.max(logprobs, axis=-1, keepdims=True) + math.log(min_p)
    if at_least > 1:
        at_least = min(at_least, logprobs.shape[-1])
        largest = mx.topk(logprobs, at_least, axis=-1)
        edge = mx.minimum(edge, mx.min(largest, axis=-1, keepdims=True))
    return mx.where(logprobs < edge, -math.inf, logprobs)


def make_logits_processors(
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    presence_penalty: float | None = None,
    presence_context_size: int = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int = 20,
) -> list[LogitsProcessor]:
    """Functions that change the logits before sampling.

    Args:
        logit_bias: token id -> what is added to its logit: a finite number, or -inf.
        repetition_penalty: logits of recent tokens are divided by it when positive, multiplied
            when negative (CTRL, arXiv 1909.05858, with the sign fix that all runtimes have).
        presence_penalty: subtracted once from the logit of a recent token.
        frequency_penalty: subtracted for each occurrence of a recent token.
        repetition_context_size, presence_context_size, frequency_context_size: how many of the
            last tokens, prompt included, are recent.

    Tokens whose id isn't in the logits (the vocabulary is cut to the tokenizer's) get no penalty.

    Raises:
        InputError: when a penalty, bias or context size is out of its range; and from the
            processor, when the logits have no such id as `logit_bias` names.
    """
    processors: list[LogitsProcessor] = []
    if logit_bias:
        processors.append(_add_bias(logit_bias))
    for name, penalise, penalty, size in (
        ("repetition", _repetition, repetition_penalty, repetition_context_size),
        ("presence", _presence, presence_penalty, presence_context_size),
        ("frequency", _frequency, frequency_penalty, frequency_context_size),
    ):
        if penalty is None or penalty == 0:
            continue
        _check_number(f"{name}_penalty", penalty)
        finite = math.isfinite(penalty)
        _check(f"{name}_penalty", penalty, finite and (penalty > 0 or penalise is not _repetition))
        _check_count(f"{name}_context_size", size, 1)
        processors.append(_on_recent(penalise, penalty, size))
    return processors


def _add_bias(logit_bias: Mapping[int, float]) -> LogitsProcessor:
    if not isinstance(logit_bias, Mapping):
        raise InputError(f"logit_bias must map token ids to numbers, not {logit_bias!r}")
    for token, bias in logit_bias.items():
        _check_count("a token id of logit_bias", token, 0)
        _check_number(f"logit_bias of {token}", bias)
        _check(f"logit_bias of {token}", bias, bias < math.inf, "a number or -inf")
    highest, values = max(logit_bias), mx.array([float(v) for v in logit_bias.values()])

    def add(_: mx.array, logits: mx.array) -> mx.array:
        size = logits.shape[-1]
        _check("logit_bias", highest, highest < size, f"for ids below {size}")
        ids = mx.array([int(token) for token in logit_bias], mx.int32)
        return logits.at[:, ids].add(values.astype(logits.dtype))

    return add


_Penalise = Callable[[mx.array, mx.array, float], mx.array]
"""(logits [B, vocab], how often each token occurred [vocab], penalty) -> logits."""


def _on_recent(penalise: _Penalise, penalty: float, size: int) -> LogitsProcessor:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size == 0:
            return logits
        recent = tokens[max(tokens.size - size, 0) :]
        counts = occurrences(recent, logits.shape[-1])
        return penalise(logits, counts, penalty).astype(logits.dtype)

    return process


def occurrences(tokens: mx.array, vocab: int) -> mx.array:
    """How often each id below `vocab` is in `tokens` [n]: [vocab], float32. Others don't count."""
    known = (tokens >= 0) & (tokens < vocab)
    slots = mx.where(known, tokens, vocab).astype(mx.int32)  # the last slot takes the others
    return mx.zeros(vocab + 1).at[slots].add(1)[:vocab]


def _repetition(logits: mx.array, counts: mx.array, penalty: float) -> mx.array:
    penalised = mx.where(logits < 0, logits * penalty, logits / penalty)
    return mx.where(counts > 0, penalised, logits)


def _presence(logits: mx.array, counts: mx.array, penalty: float) -> mx.array:
    return mx.where(counts > 0, logits - penalty, logits)


def _frequency(logits: mx.array, counts: mx.array, penalty: float) -> mx.array:
    return logits - counts * penalty


def _check(name: str, value: float, fits: bool, wanted: str = "a positive number") -> None:
    if not fits:
        raise InputError(f"{name} must be {wanted}, not {value}")


def _check_number(name: str, value: object) -> None:
    if not hasattr(value, "__float__") or isinstance(value, bool | mx.array):
        raise InputError(f"{name} must be a number, not {value!r}")


def _check_count(name: str, value: int, least: int) -> None:
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    _check(name, value, whole and value >= least, f"at least {least}, and an integer")
