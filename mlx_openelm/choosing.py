"""Logits -> tokens at several positions of a text at once, some of them after drafted tokens."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .drafts import Draft
from .sampling import Draws, LogitsProcessor, Sampler, greedy


class Chooser:
    """The processors and the sampler of a generation, with the tokens that they have to see.

    Args:
        seen: the text so far [n].
        vocab_size: ids from here on are never chosen.
    """

    def __init__(
        self,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
        seen: mx.array,
        vocab_size: int,
    ) -> None:
        self.sampler = sampler
        self.processors = tuple(processors)
        self.vocab_size = vocab_size
        self._seen = seen  # stays behind where there is no processor

    def extend(self, tokens: list[int]) -> None:
        """These follow the text."""
        if self.processors:
            self._seen = mx.concatenate([self._seen, mx.array(tokens)])
        if isinstance(self.sampler, Draws):
            self.sampler.advance(len(tokens))

    def processed(self, logits: mx.array, ahead: mx.array | None) -> mx.array:
        """`logits` [n, …] as the processors change them, without the ids that are never chosen.

        `ahead` are tokens after the text. The last row follows all of them, the row before it all
        but one, and so on: what each row's processors see is the text up to there.
        """
        logits = logits[:, : self.vocab_size]
        if not self.processors:
            return logits
        tokens = self._seen if ahead is None else mx.concatenate([self._seen, ahead])
        rows = []
        for i in range(logits.shape[0]):
            row, later = logits[i : i + 1], logits.shape[0] - 1 - i
            for process in self.processors:
                row = process(tokens[: tokens.size - later], row)
            rows.append(row)
        return mx.concatenate(rows)

    def choose(
        self, logits: mx.array, logprobs: mx.array, first: int, draft: Draft | None
    ) -> mx.array:
        """Tokens [n] of processed `logits` [n, vocab], `first` positions ahead of the text.

        A custom sampler is asked at every position: the drafts that hold are those it agrees with.
        """
        if self.sampler is greedy:
            return greedy(logits)
        if not isinstance(self.sampler, Draws):
            return self.sampler(logprobs)
        if draft is None or draft.probs is None:
            return self.sampler.ahead(logprobs, first)
        return verify(mx.softmax(self.sampler.scaled(logprobs), axis=-1), draft.probs, draft.tokens)

    def pick(self, logits: mx.array, first: int, probs: list[mx.array]) -> mx.array:
        """The token [1] that a draft model proposes, by processed `logits` [1, vocab] of its own.

        Greedily, and for a custom sampler, the likeliest. With a seed, the token that the model's
        own draw would give if it had these logits (arXiv 2408.07978): then text does not depend on
        drafts. Otherwise a draw, and its probabilities are added to `probs`, for `verify`.
        """
        if not isinstance(self.sampler, Draws):
            return greedy(logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if self.sampler.seeded:
            return self.sampler.ahead(logprobs, first)
        scaled = self.sampler.scaled(logprobs)
        probs.append(mx.softmax(scaled, axis=-1))
        return mx.random.categorical(scaled)


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
