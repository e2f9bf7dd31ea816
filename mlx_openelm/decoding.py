"""The loop: prefill, decode, stop. Names, arguments and responses are mlx-lm's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from .cache import KVCache
from .choosing import Choice, begin, choose
from .errors import InputError
from .model import OpenELM
from .prompt_cache import PromptCache
from .sampling import LogitsProcessor, Sampler
from .stopping import StopStrings
from .token_ids import as_token_ids

if TYPE_CHECKING:
    from .speculative import Speculation
    from .tokenizer import Tokenizer

Prompt = str | Sequence[int] | mx.array


@dataclass(frozen=True)
class GenerationResponse:
    """One generated token.

    Attributes:
        text: the text that is now certain; may be empty.
        token: its id.
        logprobs: log-probabilities of all tokens, [vocab]; not computed until used.
        from_draft: whether a draft model, or prompt lookup, proposed it.
        prompt_tokens, generation_tokens: counts; the latter includes this token.
        prompt_tps: prompt tokens per second until the first token.
        generation_tps: generated tokens per second since the first.
        peak_memory: the most that MLX has held so far, in GB (1e9 bytes).
        finish_reason: "stop" after an end-of-sequence token or a stop string, "length" when
            `max_tokens` or the context is used up, None while there is more.
        cached_tokens: those of the prompt that a `PromptCache` held already.
        speculation: what drafting has brought so far; None without drafts.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    cached_tokens: int = 0
    speculation: Speculation | None = None


def prefill(
    model: OpenELM,
    prompt: mx.array,
    cache: KVCache,
    step_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Put `prompt` [L] or [B, L] into the cache, in chunks; returns the last logits [B, vocab].

    The ids aren't checked (`token_ids` does that).

    `progress` is called with (tokens done, tokens in all) between the chunks.

    Raises:
        InputError: when the prompt doesn't fit into the context.
    """
    step_size = step_size or model.policy.prefill_step
    rows = prompt[None] if prompt.ndim == 1 else prompt
    total, done = rows.shape[1], 0
    room = cache.room()
    if room is not None and total > room:
        raise InputError(
            f"the prompt has {total} tokens, more than the {room} that are left of the model's "
            f"context of {model.config.max_context_length}; shorten it, or let the context slide "
            "with --max-kv-size (max_kv_size= in Python)"
        )
    while True:
        count = cache.longest_step(min(step_size, total - done))
        logits = model.step(rows[:, done : done + count], cache, last_only=True)
        done += count
        if done == total:
            return logits[:, 0]
        mx.eval(cache.buffers)
        mx.clear_cache()
        if progress:
            progress(done, total)


def generate_step(
    prompt: mx.array,
    model: OpenELM,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    prompt_cache: KVCache | None = None,
    cached_tokens: Sequence[int] = (),
    prefill_step_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    vocab_size: int | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Token ids that continue `prompt` [L], each with its log-probabilities [vocab_size].

    The next step is built while the device works on the current one, but for the first token, which
    is given out as soon as it is there.

    Args:
        max_tokens: how many at most; -1: until the context is full.
        sampler: log-probabilities [1, vocab] -> token [1]; greedy by default.
        logits_processors: applied in order, before the sampler.
        max_kv_size: let the context slide (see `KVCache`).
        kv_bits: keep keys and values in 8 or 4 bits.
        prompt_cache: what came before the prompt; updated in place.
        cached_tokens: the tokens of that, for the processors to see.
        prefill_step_size: tokens of the prompt that one step takes; by default what suits the
            device.
        prompt_progress_callback: called with (prompt tokens done, prompt tokens in all).
        vocab_size: ids from here on are never sampled (the tokenizer doesn't know them).

    Raises:
        InputError: when the prompt is empty, holds what isn't a token of the model, or doesn't fit
            into the context.
        OpenELMError: when the logits aren't finite; says where that began.
    """
    prompt = as_token_ids(prompt, model.config.vocab_size)
    earlier = as_token_ids(cached_tokens, model.config.vocab_size, "cached_tokens")
    if prompt.size == 0:
        raise InputError("the prompt is empty")
    if prefill_step_size is not None and prefill_step_size < 1:
        raise InputError(f"prefill_step_size must be at least 1, not {prefill_step_size}")
    cache = prompt_cache if prompt_cache is not None else model.make_cache(max_kv_size, kv_bits)
    draw = begin(sampler)
    processors = tuple(logits_processors or ())
    seen = mx.concatenate([earlier, prompt])
    made: list[int] = []

    def chosen(logits: mx.array, first: bool = False) -> Choice:
        return choose(logits, draw, processors, [seen], vocab_size, first)

    def text(_: int) -> list[int]:
        return [*cast("list[int]", earlier.tolist()), *cast("list[int]", prompt.tolist()), *made]

    limit = token_limit(cache, prompt.size, max_tokens)
    logits = prefill(model, prompt, cache, prefill_step_size, prompt_progress_callback)
    choice = chosen(logits, first=True)
    if prompt_progress_callback:
        mx.eval(choice.tokens)
        prompt_progress_callback(prompt.size, prompt.size)

    def after(token: mx.array) -> Choice:
        nonlocal seen
        if processors:
            seen = mx.concatenate([seen, token])
        return chosen(model.step(token[None], cache, last_only=True)[:, 0])

    for count in itertools.count(1):
        # The first token is given out before the next step is built, which may have to be traced.
        more = model.policy.overlapped and 1 < count != limit
        following = after(choice.tokens) if more else None
        made += choice.wait(model, text)
        yield made[-1], choice.logprobs[0]
        if count == limit:
            return
        choice = following or after(choice.tokens)


def token_limit(cache: KVCache, prompt_tokens: int, max_tokens: int) -> int | None:
    """How many tokens can follow a prompt: `max_tokens` (-1: any), or what the context leaves."""
    room = cache.room()
    limits = [max_tokens] if max_tokens >= 0 else []
    if room is not None:
        limits.append(max(room - prompt_tokens, 0) + 1)  # the last token needs no room
    return min(limits, default=None)


def stream_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Continue a prompt; one response per token, the last one with a `finish_reason`.

    Args:
        prompt: text (a `<s>` is put in front unless it is there) or token ids (taken as is).
        max_tokens: how many tokens at most; -1: until the context is full.
        stop: strings that end the text; they are not part of it.
        options: see `generate_step`. `prompt_cache` may be a `PromptCache` too: then the prompt is
            the whole text, and only what isn't in the cache already is computed. With
            `draft_model` or `prompt_lookup`, see `speculative.speculative_generate_step`.

    Raises:
        InputError: when the prompt is empty or too long, or an argument is out of its range.
    """
    if max_tokens == 0 or max_tokens < -1:
        raise InputError(f"max_tokens must be at least 1 (or -1: no limit), not {max_tokens}")
    strings = StopStrings((stop,) if isinstance(stop, str) else stop)
    ids = encode_prompt(tokenizer, prompt, model.config.vocab_size)
    return _stream(model, tokenizer, ids, max_tokens, strings, options)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int) -> mx.array:
    """Token ids [L], int32, of text or of ids.

    Raises:
        InputError: when there is no text, or what isn't a token of the model.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("the prompt is empty")
        bos = tokenizer.bos_token
        ids = tokenizer.encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))
        return as_token_ids(ids, vocab_size)
    return as_token_ids(prompt, vocab_size)


class TextStream:
    """One sequence's tokens as text: whole characters, up to a stop string, and why it ended.

    `limit`: how many tokens there are at most; None: any number.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings, limit: int | None) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._eos, self._stop, self._left = tokenizer.eos_token_ids, stop, limit

    def add(self, token: int) -> tuple[str, str | None]:
        """The text that is certain with one more token; the `finish_reason` if it is the last."""
        if self._left is not None:
            self._left -= 1
        ended, full = token in self._eos, self._left == 0
        if not ended:
            self._detokenizer.add_token(token)
        if ended or full:
            self._detokenizer.finalize()
        text = self._stop.feed(self._detokenizer.last_segment)
        if not (ended or full or self._stop.found):
            return text, None
        reason = "stop" if ended or self._stop.found else "length"
        return text + self._stop.finish(), reason


def _stream(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: mx.array,
    max_tokens: int,
    stop: StopStrings,
    options: dict[str, Any],
) -> Iterator[GenerationResponse]:
    start = time.perf_counter()
    prompt_size, reused, text_cache = prompt.size, 0, options.pop("prompt_cache", None)
    fresh = model.make_cache(options.pop("max_kv_size", None), options.pop("kv_bits", None))
    cache = text_cache or fresh
    if isinstance(text_cache, PromptCache):
        tokens = cast("list[int]", prompt.tolist())
        reused, cache = text_cache.begin(tokens), text_cache.cache
        options["cached_tokens"], prompt = tokens[:reused], prompt[reused:]
    limit = token_limit(cache, prompt.size, max_tokens)
    output = TextStream(tokenizer, stop, limit)
    options |= {
        "max_tokens": max_tokens,
        "prompt_cache": cache,
        "vocab_size": tokenizer.vocab_size,
    }
    steps, speculation = _steps(prompt, model, options)
    for count, (token, logprobs, from_draft) in enumerate(steps, 1):
        now = time.perf_counter()
        if count == 1:
            first = now
        if isinstance(text_cache, PromptCache):
            text_cache.tokens.append(token)
        text, finish_reason = output.add(token)
        yield GenerationResponse(
            text=text,
            token=token,
            logprobs=logprobs,
            from_draft=from_draft,
            prompt_tokens=prompt_size,
            prompt_tps=prompt_size / (first - start),
            generation_tokens=count,
            generation_tps=(count - 1) / (now - first) if count > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            cached_tokens=reused,
            speculation=speculation,
        )
        if finish_reason:
            steps.close()  # the cache then holds what was given, and nothing that was drafted
            return


def _steps(
    prompt: mx.array, model: OpenELM, options: dict[str, Any]
) -> tuple[Generator[tuple[int, mx.array, bool], None, None], Speculation | None]:
    """Tokens with their log-probabilities, and whether they were drafted: with drafts, or plain."""
    if options.get("draft_model") is None and not options.get("prompt_lookup"):
        for name in ("draft_model", "prompt_lookup", "num_draft_tokens"):
            options.pop(name, None)
        return ((*step, False) for step in generate_step(prompt, model, **options)), None
    from .speculative import Speculation, speculative_generate_step

    speculation = Speculation()
    return speculative_generate_step(prompt, model, statistics=speculation, **options), speculation


def generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    verbose: bool = False,
    **options: Any,
) -> str:
    """The text that continues a prompt.

    Args:
        verbose: print the text as it comes, and the speed.
        options: see `stream_generate`.
    """
    text = ""
    for response in stream_generate(model, tokenizer, prompt, **options):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(f"\n{summary(response)}")
    return text


def summary(response: GenerationResponse) -> str:
    """The speeds of a finished generation, in mlx-lm's lines, and what drafts have brought."""
    speculation, cached = response.speculation, response.cached_tokens
    kept = f" ({cached} from the prompt cache)" if cached else ""
    drafts = (
        f"\nDrafts: {speculation.acceptance:.0%} of {speculation.drafted} tokens accepted, "
        f"{speculation.tokens_per_step:.2f} tokens per step"
        if speculation
        else ""
    )
    return (
        f"Prompt: {response.prompt_tokens} tokens{kept}, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB{drafts}"
    )
