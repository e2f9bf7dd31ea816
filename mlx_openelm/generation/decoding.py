"""The loop: prefill, decode. Names and arguments are mlx-lm's."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from typing import cast

import mlx.core as mx

from ..errors import InputError
from ..model.cache import KVCache, Use
from ..model.openelm import OpenELM
from ..model.token_ids import as_prompt
from .choosing import Choice, begin, choose
from .options import Options, Progress
from .sampling import LogitsProcessor, Sampler


def prefill(
    model: OpenELM,
    prompt: mx.array,
    cache: KVCache,
    step_size: int | None = None,
    progress: Progress | None = None,
) -> mx.array:
    """Put `prompt` [L] or [B, L] into the cache, in chunks; returns the last logits [B, vocab].

    The ids aren't checked (`token_ids` does that).

    `progress` is called with (tokens done, tokens in all) before the first and between the chunks.

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
    if progress:
        progress(0, total)
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
    stream: None = None,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: KVCache | Sequence[KVCache] | None = None,
    prefill_step_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,
    quantized_kv_start: int = 0,
    prompt_progress_callback: Progress | None = None,
    input_embeddings: None = None,
    vocab_size: int | None = None,
) -> Generator[tuple[int, mx.array], None, None]:
    """Token ids that continue `prompt` [L], each with its log-probabilities [vocab_size].

    Where the device computes a step while the next one is built (`Policy.overlapped`), the next
    step begins before a token is yielded; the first token is yielded at once. With a
    `prompt_cache`, a token is in the cache before it is yielded.

    Args:
        vocab_size: ids from here on are never sampled (the tokenizer doesn't know them).
        max_tokens: as in `Options`; 0 reads the prompt into the `prompt_cache` and no more.
        stream, sampler, logits_processors, max_kv_size, prompt_cache, prefill_step_size, kv_bits,
            kv_group_size, quantized_kv_start, prompt_progress_callback, input_embeddings: see
            `Options`.

    Raises:
        InputError: at the call, when the prompt is empty or holds what isn't a token of the model,
            or an argument is out of its range; with the first token, when the prompt doesn't fit
            into the context.
        OpenELMError: when the logits aren't finite; says where that began.
    """
    options = Options(
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        prompt_cache=prompt_cache,
        prefill_step_size=prefill_step_size,
        prompt_progress_callback=prompt_progress_callback,
        input_embeddings=input_embeddings,
        stream=stream,
    )
    ids = as_prompt(prompt, model.config.vocab_size)
    return plain_steps(ids, model, options, options.cache(model), vocab_size=vocab_size)


def plain_steps(
    prompt: mx.array,
    model: OpenELM,
    options: Options,
    cache: KVCache,
    *,
    use: Use | None = None,
    cached_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
) -> Generator[tuple[int, mx.array], None, None]:
    """The tokens of `generate_step`.

    Args:
        use: of the cache; by default a new one.
        cached_tokens: what the cache holds of the text, for the processors to see.
    """
    draw = begin(options.sampler)
    processors = tuple(options.logits_processors or ())
    progress = options.prompt_progress_callback
    seen = mx.concatenate([mx.array(list(cached_tokens), mx.int32), prompt])
    made: list[int] = []
    use = use or cache.begin_use(appends=options.prompt_cache is not None)

    def chosen(logits: mx.array, first: bool = False) -> Choice:
        return choose(logits, draw, processors, [seen], vocab_size, first)

    def after(token: mx.array) -> Choice:
        nonlocal seen
        if processors:
            seen = mx.concatenate([seen, token])
        return chosen(model.step(token[None], cache, last_only=True)[:, 0])

    def text(_: int) -> list[int]:
        return [*cached_tokens, *cast("list[int]", prompt.tolist()), *made]

    try:
        end = cache.offset + prompt.size
        limit = token_limit(cache, prompt.size, options.max_tokens)
        logits = prefill(model, prompt, cache, options.prefill_step_size, progress)
        if limit == 0:
            mx.eval(cache.buffers)
        else:
            choice = chosen(logits, first=True)
        if progress:
            mx.eval(cache.buffers if limit == 0 else choice.tokens)
            progress(prompt.size, prompt.size)
        use.text = end
        if limit == 0:
            return
        for count in itertools.count(1):
            following = None
            if model.policy.overlapped and count != limit and (count > 1 or use.appends):
                following = after(choice.tokens)
            made += choice.wait(model, text)
            if use.appends and following is None:
                if count != limit:
                    following = after(choice.tokens)
                elif cache.room() != 0:
                    model.step(choice.tokens[None], cache, last_only=True)  # only for the cache
            use.text = end + count
            yield made[-1], choice.logprobs[0]
            if count == limit:
                return
            cache.still_in(use)
            # Not before the first token is yielded: tracing the step would delay it.
            choice = following or after(choice.tokens)
    finally:
        if cache.use is use:
            cache.settle()


def token_limit(cache: KVCache, prompt_tokens: int, max_tokens: int) -> int | None:
    """How many tokens can follow a prompt: `max_tokens` (-1: any), or what the context leaves."""
    room = cache.room()
    limits = [max_tokens] if max_tokens >= 0 else []
    if room is not None:
        limits.append(max(room - prompt_tokens, 0) + 1)  # the last token needs no room
    return min(limits, default=None)
