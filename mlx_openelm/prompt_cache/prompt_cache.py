"""The KV cache of a text, kept in memory or in a file for the next text with the same prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..files import user_path
from ..model.openelm import OpenELM
from .cache_file import read_cache, write_cache
from .fingerprint import fingerprint

__all__ = ["PromptCache", "fingerprint"]


class PromptCache:
    """The tokens of the last text and its KV cache; pass it to every `stream_generate`.

    Of a prompt, only what follows the longest prefix that it shares with the last text (prompt and
    answer) is computed. The rest of the cache is trimmed, so the result is that of a new cache.

    Args:
        max_kv_size, kv_bits: as in `OpenELM.make_cache`. A context that has slid can't be trimmed:
            a prompt that doesn't extend it is computed from its first token.

    Attributes:
        cache: the keys and values.
        tokens: the text they are of; the last of it may not be in the cache yet.
    """

    def __init__(
        self, model: OpenELM, max_kv_size: int | None = None, kv_bits: int | None = None
    ) -> None:
        self.model = model
        self.cache = model.make_cache(max_kv_size, kv_bits)
        self.tokens: list[int] = []
        self._fingerprint: str | None = None  # of the model; computed when first needed

    @property
    def held(self) -> list[int]:
        """The tokens whose keys and values are in the cache."""
        return self.tokens[: self.cache.offset]

    @property
    def kv_bits(self) -> int | None:
        """The bits that keys and values are quantized to, or None."""
        return self.cache.scheme.bits if self.cache.scheme else None

    def begin(self, prompt: Sequence[int]) -> int:
        """Trim the cache to the prefix shared with `prompt`; returns its length in tokens.

        At least the last token of the prompt isn't counted: its logits are needed.
        """
        shared = 0
        for mine, theirs in zip(self.held, prompt[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        beyond = self.cache.offset - shared
        if self.cache.can_trim(beyond):
            self.cache.trim(beyond)
        else:
            scheme = self.cache.scheme
            self.cache = self.model.make_cache(
                self.cache.max_size, self.kv_bits, group_size=scheme.group_size if scheme else None
            )
            shared = 0
        self.tokens = list(prompt)
        return shared

    def save(self, file: str | Path) -> None:
        """Write all of it into a safetensors file, which appears when it is complete.

        Threads and processes may save to the same file: it is then one of theirs, complete.

        Raises:
            InputError: when it can't be written there, or the context slides.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model)
        write_cache(file, self.cache, self._fingerprint, tokens=self.held)

    @classmethod
    def load(cls, file: str | Path, model: OpenELM) -> PromptCache:
        """Read what `save` has written, for the same model.

        Raises:
            InputError: when the file can't be read, is damaged, or is of another model.
        """
        file = user_path(file)
        saved = read_cache(file)
        made = cls(model)
        made._fingerprint = fingerprint(model)
        if saved.cache.made_for != made._fingerprint:
            raise InputError(
                f"{file}: the prompt cache of another model, or of this one computed in another "
                "dtype; name another file, or delete this one"
            )
        if saved.tokens is None:
            raise InputError(
                f"{file}: doesn't say what text it is of (save_prompt_cache wrote it); read it "
                "with load_prompt_cache"
            )
        saved.cache.made_for = model
        made.cache, made.tokens = saved.cache, saved.tokens
        return made
