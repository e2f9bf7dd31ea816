"""The options of a generation: mlx-lm's keyword arguments, those of drafts, and stop strings."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import InputError
from ..model.cache import KVCache
from ..model.openelm import OpenELM
from .sampling import LogitsProcessor, Sampler

if TYPE_CHECKING:
    from ..prompt_cache.prompt_cache import PromptCache
    from .speculative.draft_length import Pace

Progress = Callable[[int, int], None]
"""Called with (tokens of the prompt that are done, tokens in all)."""

UNSUPPORTED = {
    "stream": "steps run on MLX's default stream; use `with mx.stream(...)` around the call",
    "input_embeddings": "OpenELM's prompts are token ids",
}
"""Arguments of mlx-lm that have no meaning here, and why. None is accepted."""


_ALWAYS = ("max_tokens", "quantized_kv_start", "num_draft_tokens")
_INTEGERS = (*_ALWAYS, "max_kv_size", "kv_bits", "kv_group_size", "prefill_step_size")


@dataclass(frozen=True)
class Options:
    """The options of one generation, checked.

    Attributes:
        max_tokens: how many tokens at most; -1: until the context is full.
        sampler: log-probabilities [1, vocab] -> token [1]; greedy by default.
        logits_processors: applied in order, before the sampler.
        max_kv_size: let the context slide (see `KVCache`).
        kv_bits: keep keys and values in 8 or 4 bits.
        kv_group_size: values that share a scale there: 32, 64 or 128 (default: the larger of 64
            and 32 that divides head_dim).
        quantized_kv_start: positions that the cache holds before `kv_bits` applies.
        prompt_cache: what came before the prompt; updated in place. A `KVCache`, or a list with
            one as `make_prompt_cache` returns it, is appended to: the prompt and all tokens that
            are given out. For a `PromptCache` the prompt is the whole text.
        prefill_step_size: tokens of the prompt that one step takes; by default what suits the
            device.
        prompt_progress_callback: called with (prompt tokens done, prompt tokens in all).
        stop: strings that end the text; they are not part of it.
        draft_model: a smaller model with the same tokenizer, which drafts several tokens a step.
        prompt_lookup: draft what followed when the last few tokens occurred before.
        num_draft_tokens: how many tokens are drafted at most.
        pace: decides how many are; by default it begins with what was measured when the same
            models generated before.
        input_embeddings, stream: of mlx-lm; only None.

    Raises:
        InputError: when a value is out of its range, or can't be combined with another.
    """

    max_tokens: int = 256
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int | None = None
    quantized_kv_start: int = 0
    prompt_cache: PromptCache | KVCache | Sequence[KVCache] | None = None
    prefill_step_size: int | None = None
    prompt_progress_callback: Progress | None = None
    stop: str | Sequence[str] = ()
    draft_model: OpenELM | None = None
    prompt_lookup: bool = False
    num_draft_tokens: int = 16
    pace: Pace | None = None
    input_embeddings: None = None
    stream: None = None

    def __post_init__(self) -> None:
        for name, why in UNSUPPORTED.items():
            if getattr(self, name) is not None:
                raise InputError(f"{name} isn't supported: {why}")
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is None and name not in _ALWAYS:
                continue
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise InputError(f"{name} must be an integer, not {value!r}") from None
        if self.max_tokens < -1:
            raise InputError(
                f"max_tokens must be at least 1 (or -1: no limit), not {self.max_tokens}"
            )
        for name in ("prefill_step_size", "num_draft_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        for name in ("sampler", "prompt_progress_callback"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise InputError(f"{name} must be a function")
        processors, stop = self.logits_processors or (), self.stop
        if not isinstance(processors, Iterable) or not all(map(callable, processors)):
            raise InputError("logits_processors must be a list of functions")
        if not isinstance(stop, Iterable) or not all(isinstance(s, str) for s in stop):
            raise InputError("stop must be a string or a list of strings")
        if not isinstance(self.draft_model, OpenELM | None):
            raise InputError("draft_model must be a model, as load returns it")
        if self.kv_bits is None and (self.kv_group_size, self.quantized_kv_start) != (None, 0):
            # mlx-lm's scripts pass its defaults always; without kv_bits they mean nothing there.
            object.__setattr__(self, "kv_group_size", None)
            object.__setattr__(self, "quantized_kv_start", 0)
        if self.drafts and self.max_kv_size is not None:
            raise InputError(
                "speculative decoding can't be combined with a context that slides (max_kv_size)"
            )

    @property
    def drafts(self) -> bool:
        """Whether several tokens are proposed a step."""
        return self.draft_model is not None or self.prompt_lookup

    def cache(self, model: OpenELM) -> KVCache:
        """The cache to generate with: the `prompt_cache` that was given, or a new one.

        Raises:
            InputError: when it is of another model or of other options, or can't be made.
        """
        given = self.prompt_cache
        if given is None:
            return model.make_cache(
                self.max_kv_size,
                self.kv_bits,
                group_size=self.kv_group_size,
                quantized_from=self.quantized_kv_start,
            )
        cache = given_cache(given, 2 if self.draft_model is not None else 1)
        fits(cache, model)
        if self.max_kv_size is not None and self.max_kv_size != cache.max_size:
            raise InputError(
                f"max_kv_size={self.max_kv_size} can't be given with a prompt_cache that has "
                f"{cache.max_size}; give it to make_prompt_cache"
            )
        if self.drafts and cache.max_size is not None:
            raise InputError(
                "speculative decoding can't be combined with a context that slides (max_kv_size)"
            )
        if self.kv_bits is not None:
            cache.quantize(self.kv_bits, self.kv_group_size, self.quantized_kv_start)
        return cache


class Keywords(TypedDict, total=False):
    """The keyword arguments of `stream_generate` and `generate`: the fields of `Options`."""

    sampler: Sampler | None
    logits_processors: Sequence[LogitsProcessor] | None
    max_kv_size: int | None
    kv_bits: int | None
    kv_group_size: int | None
    quantized_kv_start: int
    prompt_cache: PromptCache | KVCache | Sequence[KVCache] | None
    prefill_step_size: int | None
    prompt_progress_callback: Progress | None
    stop: str | Sequence[str]
    prompt_lookup: bool
    num_draft_tokens: int
    pace: Pace | None
    input_embeddings: None


def given_cache(given: PromptCache | KVCache | Sequence[Any], most: int = 1) -> KVCache:
    """The keys and values of any of the forms of a prompt cache.

    Args:
        given: a `PromptCache`, a `KVCache`, or a list of one as `make_prompt_cache` returns it.
        most: caches that a list may have; 2 where a draft model's follows (it isn't needed).

    Raises:
        InputError: when it is something else.
    """
    from ..prompt_cache.prompt_cache import PromptCache

    if isinstance(given, PromptCache):
        return given.cache
    if isinstance(given, KVCache):
        return given
    if isinstance(given, Sequence) and 1 <= len(given) <= most and isinstance(given[0], KVCache):
        return given[0]
    raise InputError(
        "prompt_cache must be what make_prompt_cache(model) returns, a KVCache or a PromptCache"
    )


def fits(cache: KVCache, model: OpenELM) -> None:
    """Check that a cache holds the keys and values of this model.

    Raises:
        InputError: when it is another model's.
    """
    if cache.batch not in (None, 1):
        raise InputError(f"the prompt cache holds {cache.batch} sequences; one is needed")
    if cache.made_for is model:
        return
    if (cache.config, cache.dtype) != (model.config, model.dtype):
        raise InputError("the prompt cache is of a model of another geometry or dtype")
    if cache.made_for is not None:
        from ..prompt_cache.fingerprint import fingerprint

        if fingerprint(cache.made_for) != fingerprint(model):
            raise InputError("the prompt cache is another model's")
    cache.made_for = model
