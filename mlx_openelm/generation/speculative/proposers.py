"""Sources of drafts: a smaller model, or earlier passages of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from ...model.openelm import OpenELM
from .draft_length import Kind

SIZES = (8, 5, 3, 2)  # of the text's end, that must have occurred before; the longest counts
SURE = {8: 0.9, 5: 0.8, 3: 0.6, 2: 0.4}  # a first guess of the acceptance after such an end
CATCH_UP = 32  # tokens of the text that a draft model reads at most before it drafts

Pick = Callable[[mx.array, list[mx.array]], mx.array]
"""(logits [1, vocab], tokens drafted before, each [1]) -> the token [1] to draft, begun."""


class Draft(NamedTuple):
    """Tokens that may follow the text.

    Attributes:
        tokens: [n]; perhaps not computed yet.
        kind: what is known of such drafts.
        probs: [n, vocab], the probabilities the tokens were drawn with; None where they weren't.
        check: called with (text, drafted tokens, rows); raises OpenELMError when the draft model's
            logits for one of these rows aren't finite.
    """

    tokens: mx.array
    kind: Kind
    probs: mx.array | None = None
    check: Callable[[list[int], list[int], range], None] | None = None


class PromptLookup:
    """Drafts what followed when the text's last few tokens occurred before.

    The index holds, for each size, where the latest occurrence of each n-gram went on; a token
    costs as many insertions as there are sizes. (A. Saxena's prompt lookup decoding.)
    """

    SOURCE = "lookup"

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._goes_on: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append these tokens to the text."""
        text, goes_on = self.tokens, self._goes_on
        for token in tokens:
            end = len(text)
            for size in SIZES:
                if size <= end:
                    goes_on[tuple(text[end - size :])] = end
            text.append(token)

    def kind(self) -> Kind | None:
        """The kind of draft that is possible; None: the text's last tokens didn't occur before."""
        found = self._find()
        return None if found is None else Kind(self.SOURCE, found[0], SURE[found[0]], 0.08)

    def draft(self, length: int) -> list[int]:
        """The `length` tokens that followed; past the end of the text, the same tokens again."""
        found = self._find()
        assert found is not None
        period = len(self.tokens) - found[1]
        return [self.tokens[found[1] + i % period] for i in range(length)]

    def _find(self) -> tuple[int, int] | None:
        """Length of the longest repeated suffix, and the index after its earlier occurrence."""
        text = self.tokens
        for size in SIZES:
            at = self._goes_on.get(tuple(text[-size:])) if size <= len(text) else None
            if at is not None:
                return size, at
        return None


class DraftModel:
    """Drafts what a smaller model of the same vocabulary would say.

    It follows the text only when it drafts, and reads at most its latest `CATCH_UP` tokens then.
    """

    kind = Kind("model")

    def __init__(self, model: OpenELM) -> None:
        self.model = model
        self._cache = model.make_cache()
        self._start = 0  # position in the text of the cache's first token
        context = model.config.max_context_length
        self._window = min(CATCH_UP, context // 2)
        self.longest = context - self._window

    @property
    def _read(self) -> int:
        return self._start + self._cache.offset

    def draft(self, text: list[int], length: int, pick: Pick) -> list[mx.array]:
        """`length` tokens, each [1], that may follow `text`; none is waited for."""
        self._forget(len(text) - 1)
        behind, room = len(text) - self._read, self._cache.room()
        if behind > self._window or (room is not None and behind + length - 1 > room):
            self._cache.trim(self._cache.offset)
            self._start = max(len(text) - self._window, 0)
        tokens = mx.array(self.known(text[self._read :]))
        drafts: list[mx.array] = []
        while True:
            logits = self.model.step(tokens[None], self._cache, last_only=True)[:, 0]
            tokens = pick(logits, drafts)
            drafts.append(tokens)
            if len(drafts) == length:
                return drafts

    def known(self, text: list[int]) -> list[int]:
        """`text` as this model can read it: ids that only the larger model has become 0."""
        size = self.model.config.vocab_size
        return [token if token < size else 0 for token in text]

    def _forget(self, tokens: int) -> None:
        """Trim the cache to the first `tokens` of the text: removes rejected drafts."""
        self._cache.trim(max(self._read - tokens, 0))
