"""Choosing tokens after drafted ones: which drafts hold, by rejection sampling or equal draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from ..choosing import Choice, begin, choose
from ..sampling import Draws, LogitsProcessor, Sampler, greedy
from .proposers import Draft


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
