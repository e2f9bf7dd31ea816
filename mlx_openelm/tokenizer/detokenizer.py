"""Tokens to text, one at a time."""

from __future__ import annotations

import codecs

from ..errors import InputError
from .vocabulary import Vocabulary


class StreamingDetokenizer:
    """Text from tokens that arrive one at a time, never half a character; from a `Tokenizer`.

    The segments together are exactly `Tokenizer.decode` of the same ids, in time linear in their
    number. With `skip_special_tokens` special tokens add nothing, else their spelling.
    """

    def __init__(
        self, vocabulary: Vocabulary, space_after: int | None, skip_special_tokens: bool = True
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._space_after = space_after if skip_special_tokens else None
        self.reset()

    def reset(self) -> None:
        """Forget everything, for another text."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._segments: list[str] = []
        self._shown = 0
        self._drop_space = False

    def add_token(self, token: int) -> None:
        """Take the next token.

        Raises:
            InputError: when the id is not in the vocabulary.
        """
        size = self._vocabulary.size
        if not 0 <= token < size:
            raise InputError(f"token id {token} is not in the tokenizer's vocabulary of {size}")
        if not self._skip and token in self._vocabulary.special:
            piece = (self._vocabulary.token(token) or "").encode("utf-8", "replace")
        else:
            piece = self._vocabulary.piece(token)
        if self._drop_space:
            piece = piece.removeprefix(b" ")
        self._drop_space = token == self._space_after
        self._segments.append(self._utf8.decode(piece))

    def finalize(self) -> None:
        """Take the end of the text: a character that was never completed becomes U+FFFD."""
        self._segments.append(self._utf8.decode(b"", final=True))

    @property
    def text(self) -> str:
        """All complete characters so far."""
        return "".join(self._segments)

    @property
    def last_segment(self) -> str:
        """The part of `text` that is new since this was last read."""
        new = self._segments[self._shown :]
        self._shown = len(self._segments)
        return "".join(new)
