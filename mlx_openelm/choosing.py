"""Logits -> tokens, for every way of decoding: cut, processors, log-probabilities, sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, cast

import mlx.core as mx

from .diagnosis import explain
from .drafts import Draft
from .errors import InputError
from .model import OpenELM
from .sampling import Draws, LogitsProcessor, Sampler, greedy

NO_TOKEN = -1
"""Marks a token outside the vocabulary. (As an index it would be the last row.)"""


class Choice(NamedTuple):
    """The tokens of one step; the device may still be computing them.

    Attributes:
        tokens: [n] integers.
        logprobs: [n, vocab] float32, log-probabilities of all tokens; not computed until used.
        norms: [n], logsumexp of the logits: not finite where no token could be chosen.
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
        tokens, norms = greedy(changed), mx.logsumexp(changed, axis=-1)
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


class Chooser:
    """Chooses at several positions of one text at once, some of them after drafted tokens.

    Args:
        seen: the text so far [n].
        vocab_size: ids from here on are never chosen.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        processors: Sequence[LogitsProcessor],
        seen: mx.array,
        vocab_size: int,
    ) -> None:
        self.draws = sampler.restarted() if isinstance(sampler, Draws) else None
        self.sampler = begin(sampler)
        self.processors = tuple(processors)
        self.vocab_size = vocab_size
        self._seen = seen  # not kept up to date without processors

    def extend(self, tokens: list[int]) -> None:
        """Append accepted tokens to the text."""
        if self.processors:
            self._seen = mx.concatenate([self._seen, mx.array(tokens)])
        if self.draws:
            self.draws.advance(len(tokens))

    def choose(
        self,
        logits: mx.array,
        ahead: mx.array | None = None,
        offset: int = 0,
        draft: Draft | None = None,
        first: bool = False,
    ) -> Choice:
        """Tokens after the text and after each of the tokens that may follow it.

        A custom sampler is asked at every position: the drafts that hold are those it agrees with.

        Args:
            logits: [n, …].
            ahead: tokens after the text, before the last row. The row before follows all of them
                but one, and so on: what each row's processors see is the text up to there.
            offset: how many positions ahead of the text the first row is.
            draft: the tokens that are verified.
            first: as in `choose`.
        """
        draw = self.sampler
        if self.draws and draft and draft.probs is not None:
            draw = self._verified(draft.tokens, draft.probs)
        elif self.draws:
            draw = self._ahead(offset)
        texts = self._texts(logits.shape[0], ahead)
        return choose(logits, draw, self.processors, texts, self.vocab_size, first)

    def propose(
        self, logits: mx.array, ahead: mx.array | None, offset: int, probs: list[mx.array]
    ) -> Choice:
        """The token [1] that a draft model proposes, by `logits` [1, …] of its own.

        Greedily, and for a custom sampler, the likeliest. With a seed, the token that the model's
        own draw would give if it had these logits (arXiv 2408.07978): then text does not depend on
        drafts. Otherwise a draw, and its probabilities are added to `probs`, for `verify`.
        """
        draw: Sampler = greedy
        if self.draws:
            draw = self._ahead(offset) if self.draws.seed is not None else self._drawn(probs)
        return choose(logits, draw, self.processors, self._texts(1, ahead), self.vocab_size)

    def _texts(self, rows: int, ahead: mx.array | None) -> list[mx.array]:
        if not self.processors:
            return []
        tokens = self._seen if ahead is None else mx.concatenate([self._seen, ahead])
        return [tokens[: tokens.size - later] for later in reversed(range(rows))]

    def _ahead(self, offset: int) -> Sampler:
        assert self.draws
        return partial(self.draws.ahead, first=offset)

    def _drawn(self, probs: list[mx.array]) -> Sampler:
        def draw(logprobs: mx.array) -> mx.array:
            assert self.draws
            scaled = self.draws.scaled(logprobs)
            probs.append(mx.softmax(scaled, axis=-1))
            return mx.random.categorical(scaled)

        return draw

    def _verified(self, drafted: mx.array, probs: mx.array) -> Sampler:
        def draw(logprobs: mx.array) -> mx.array:
            assert self.draws
            return verify(mx.softmax(self.draws.scaled(logprobs), axis=-1), probs, drafted)

        return draw


def verify(p: mx.array, q: mx.array, drafts: mx.array) -> mx.array:
    """Tokens [n + 1] with the distribution `p`, the first of them `drafts` as far as they hold.

    Algorithm 1 of arXiv 2211.17192: draft `x`, drawn from `q`, holds with the probability
    `min(1, p(x) / q(x))`; otherwise a token is drawn from `max(0, p - q)`, normalised, which is
    never `x`. After drafts that hold, all of them, one more is drawn from `p`. The tokens after
    the first that isn't a draft mean nothing.

    Args:
        p: probabilities [n + 1, vocab] of the model.
        q: probabilities [n, vocab] that the drafts were drawn from.
        drafts: [n].
    """
    n = drafts.size
    p_drafts, q_drafts = (
        mx.take_along_axis(probs, drafts[:, None], axis=-1)[:, 0] for probs in (p[:n], q)
    )
    holds = mx.random.uniform(shape=(n,)) * q_drafts < p_drafts
    rest = mx.concatenate([mx.maximum(p[:n] - q, 0), p[n:]])
    others = mx.random.categorical(mx.log(rest))
    return mx.concatenate([mx.where(holds, drafts, others[:n]), others[n:]])
