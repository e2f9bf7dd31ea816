"""Logits -> tokens, for every way of decoding: cut, processors, log-probabilities, sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, cast

import mlx.core as mx

from ..errors import InputError
from ..model.openelm import OpenELM
from .diagnosis import explain
from .sampling import Draws, LogitsProcessor, Sampler, greedy

NO_TOKEN = -1
"""Marks a token outside the vocabulary. (As an index it would be the last row.)"""


class Choice(NamedTuple):
    """The tokens of one step; the device may still be computing them.

    Attributes:
        tokens: [n] integers.
        logprobs: [n, vocab] float32, log-probabilities of all tokens; not computed until used.
        norms: [n], logsumexp of the logits, of greedy choices their maximum: not finite where no
            token could be chosen. (MLX's maximum of NaN is NaN on every backend.)
        logits: [n, vocab], as the model gave them.
    """

    tokens: mx.array
    logprobs: mx.array
    norms: mx.array
    logits: mx.array

    def wait(
        self,
        model: OpenELM,
        text: Callable[[int], Sequence[int]],
        rows: Iterable[int] | None = None,
    ) -> list[int]:
        """The tokens, once they are there.

        Args:
            model: whose logits these are.
            text: row -> the token ids that its logits follow, as far as they are known.
            rows: those whose tokens matter; all by default.

        Raises:
            OpenELMError: when the logits of such a row aren't finite; says where that began.
            InputError: when the sampler gave a token that isn't in the vocabulary.
        """
        tokens = cast("list[int]", self.tokens.tolist())
        norms = cast("list[float]", self.norms.tolist())
        for row in range(len(tokens)) if rows is None else rows:
            if not math.isfinite(norms[row]):
                raise explain(model, text(row), self.logits[row], norms[row])
            if tokens[row] == NO_TOKEN:
                raise InputError("the sampler gave a token that isn't in the vocabulary")
        return tokens


def choose(
    logits: mx.array,
    draw: Sampler,
    processors: Sequence[LogitsProcessor] = (),
    texts: Sequence[mx.array] = (),
    vocab_size: int | None = None,
    first: bool = False,
) -> Choice:
    """Tokens by the model's `logits` [n, vocab], and their computation begun.

    Args:
        draw: log-probabilities [n, vocab] -> tokens [n]; see `begin`.
        processors: applied in order, to one row at a time.
        texts: for each row the tokens [length] that processors see; not looked at without any.
        vocab_size: ids from here on are never chosen.
        first: of a text. Then the logits are also refused for -inf, once, as that costs more.
    """
    logits = logits[:, :vocab_size]
    changed = _processed(logits, processors, texts)
    if draw is greedy:  # needs neither log-probabilities nor float32
        tokens, norms = greedy(changed), mx.max(changed, axis=-1)
        logprobs = _log_softmax(changed)
    else:
        wide = changed.astype(mx.float32)
        norms = mx.logsumexp(wide, axis=-1)
        logprobs = wide - norms[:, None]
        tokens = draw(logprobs)
    if first:
        norms = mx.where(mx.all(mx.isfinite(logits), axis=-1), norms, math.nan)
    mx.async_eval(tokens, norms)  # type: ignore[no-untyped-call]
    return Choice(tokens, logprobs, norms, logits)


def begin(sampler: Sampler | None) -> Sampler:
    """A sampler for the rows of `choose`, at the beginning of texts; greedy by default.

    Seeded draws start again. The tokens of a user's own sampler are checked.
    """
    if sampler is None or sampler is greedy:
        return greedy
    if isinstance(sampler, Draws):
        return sampler.restarted().each
    return partial(_of_vocabulary, sampler)


def _processed(
    logits: mx.array, processors: Sequence[LogitsProcessor], texts: Sequence[mx.array]
) -> mx.array:
    if not processors:
        return logits
    rows = []
    for i, text in enumerate(texts):
        row = logits[i : i + 1]
        for process in processors:
            changed = process(text, row)
            if not isinstance(changed, mx.array) or changed.shape != row.shape:
                shape = list(changed.shape) if isinstance(changed, mx.array) else changed
                raise InputError(
                    f"a logits processor must return logits {list(row.shape)}, not {shape}"
                )
            if not mx.issubdtype(changed.dtype, mx.floating):
                raise InputError(f"a logits processor must return floats, not {changed.dtype}")
            row = changed
        rows.append(row)
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


def _of_vocabulary(sampler: Sampler, logprobs: mx.array) -> mx.array:
    """The sampler's tokens [n]; `NO_TOKEN` where one isn't in the vocabulary."""
    rows, vocab = logprobs.shape
    tokens = sampler(logprobs)
    fits = isinstance(tokens, mx.array) and tokens.shape == (rows,)
    if not fits or not mx.issubdtype(tokens.dtype, mx.integer):
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, mx.array) else tokens
        raise InputError(f"a sampler must return integers [{rows}], not {found}")
    known = (tokens >= 0) & (tokens < vocab)
    return mx.where(known, tokens.astype(mx.int32), NO_TOKEN)


def _log_softmax(logits: mx.array) -> mx.array:
    wide = logits.astype(mx.float32)
    return wide - mx.logsumexp(wide, axis=-1, keepdims=True)
