"""Stop strings: held back until they can't match any more."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError


class StopStrings:
    """Finds the first of several strings in text that comes in pieces.

    Attributes:
        found: whether one has been found; what follows it is dropped, and so is the string.

    Raises:
        InputError: when one of the strings is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if any(not s for s in strings):
            raise InputError("a stop string must not be empty")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Add `piece`; returns the text that is now known to come before any stop string."""
        if self.found:
            return ""
        text = self._held + piece
        matches = [i for i in map(text.find, self._strings) if i >= 0]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was still held back, now that no more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._strings):
                return length
        return 0
