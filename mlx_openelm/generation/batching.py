"""Many sequences in one step: one pass over the weights gives a token to each."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from ..errors import InputError
from ..model.cache import KVCache, merge
from ..model.openelm import OpenELM
from ..model.token_ids import as_token_ids
from .choosing import Choice, begin, choose
from .decoding import prefill
from .options import UNSUPPORTED, Options, fits, given_cache
from .sampling import LogitsProcessor, Sampler
from .stopping import StopStrings
from .stream import Prompt, TextStream, encode_prompt

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer


@dataclass
class BatchStats:
    """Counts, seconds and tokens per second over all sequences; `peak_memory` in GB (1e9 bytes).

    Generation begins where the prompts are processed: its first token counts to the prompt.
    """

    prompt_tokens: int = 0
    prompt_tps: float = 0.0
    prompt_time: float = 0.0
    generation_tokens: int = 0
    generation_tps: float = 0.0
    generation_time: float = 0.0
    peak_memory: float = 0.0


@dataclass(frozen=True)
class BatchResponse:
    """What `batch_generate` made, in the order of its prompts.

    Attributes:
        texts: what continues each prompt.
        token_ids: the tokens of each text, without an end-of-sequence token.
        finish_reasons: "stop" or "length", as in `GenerationResponse`.
        stats: counts and speeds.
        caches: with `return_prompt_caches`, of each sequence what `make_prompt_cache` makes, with
            the prompt and all tokens in it.
        logprobs: with `return_logprobs`, the log-probability of each of the `token_ids`.
    """

    texts: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[str]
    stats: BatchStats
    caches: list[list[KVCache]] | None = None
    logprobs: list[list[float]] | None = None


@dataclass
class _Sequence:
    """One prompt and what came of it."""

    prompt: mx.array  # [L] int32
    limit: int  # tokens at most
    output: TextStream
    before: KVCache | None = None  # what comes before the prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)  # 0-d each
    text: str = ""
    finish_reason: str | None = None
    cache: KVCache | None = None  # after the last token

    def add(self, token: int) -> bool:
        """Take the next token; returns whether it is the last."""
        self.tokens.append(token)
        text, self.finish_reason = self.output.add(token)
        self.text += text
        return self.finish_reason is not None


def _add(group: Sequence[_Sequence], i: int, token: int) -> bool:
    return group[i].add(token)


def _keep_cache(group: Sequence[_Sequence], i: int, cache: KVCache) -> None:
    group[i].cache = cache


def _keep_logprob(group: Sequence[_Sequence], i: int, logprob: mx.array) -> None:
    group[i].logprobs.append(logprob)


def batch_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    prompt_caches: Sequence[Sequence[KVCache] | None] | None = None,
    max_tokens: int | Sequence[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    stop: str | Sequence[str] = (),
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    completion_batch_size: int = 32,
    prefill_batch_size: int | None = None,
    prefill_step_size: int | None = None,
    max_kv_size: None = None,
    stream: None = None,
) -> BatchResponse:
    """Continue many prompts at once; results are those of one prompt at a time.

    That holds greedily and with a seed, as far as the dtype computes alike (float32 does): equal
    prompts then give equal texts. Without a seed all draws are different ones.

    Prompts of similar length are taken together, at most `completion_batch_size` of them.

    Args:
        prompts: texts, or lists of token ids.
        prompt_caches: of each prompt, what comes before it, as `make_prompt_cache` makes it, or
            None. They are not changed.
        max_tokens: how many tokens at most, for all or for each.
        verbose: print progress and speeds.
        return_prompt_caches: put the caches of all sequences into the response.
        return_token_ids: of mlx-lm; they always are in the response.
        return_logprobs: put the log-probability of each token into the response.
        stop: strings that end a text; they are not part of it.
        sampler, logits_processors, prefill_step_size: see `batch_generate_step`.
        completion_batch_size: sequences in one step.
        prefill_batch_size: of mlx-lm; here the prompts of a batch are read together.
        max_kv_size, stream: of mlx-lm; only None.

    Raises:
        InputError: when a prompt is empty or too long, or an argument is out of its range.
    """
    if stream is not None:
        raise InputError(f"stream isn't supported: {UNSUPPORTED['stream']}")
    if max_kv_size is not None:
        raise InputError("max_kv_size isn't supported for a batch: its context doesn't slide")
    Options(
        sampler=sampler,
        logits_processors=logits_processors,
        prefill_step_size=prefill_step_size,
        stop=stop,
    )
    given = max_tokens if isinstance(max_tokens, Iterable) else [max_tokens] * len(prompts)
    limits = [Options(max_tokens=limit).max_tokens for limit in given]
    if len(limits) != len(prompts):
        raise InputError(f"max_tokens has {len(limits)} entries for {len(prompts)} prompts")
    for name, size in (
        ("completion_batch_size", completion_batch_size),
        ("prefill_batch_size", prefill_batch_size),
    ):
        if size is not None and size < 1:
            raise InputError(f"{name} must be at least 1, not {size}")
    befores = _befores(prompt_caches, len(prompts), model)
    sequences = []
    for i, (prompt, limit, before) in enumerate(zip(prompts, limits, befores, strict=True)):
        try:
            ids = encode_prompt(tokenizer, prompt, model.config.vocab_size)
        except InputError as error:
            raise InputError(f"prompt {i}: {error}") from None
        room = _room(model, ids.size, before.length if before else 0, f"prompt {i}")
        limit = room if limit == -1 else min(limit, room)
        strings = StopStrings((stop,) if isinstance(stop, str) else stop)
        sequences.append(_Sequence(ids, limit, TextStream(tokenizer, strings, limit), before))
    stats = BatchStats()
    by_length = sorted(sequences, key=lambda s: s.prompt.size)
    for first in range(0, len(by_length), completion_batch_size):
        group = by_length[first : first + completion_batch_size]
        start = time.perf_counter()
        steps = batch_generate_step(
            [s.prompt for s in group],
            model,
            [s.limit for s in group],
            ends=partial(_add, group),
            sampler=sampler,
            logits_processors=logits_processors,
            prefill_step_size=prefill_step_size,
            vocab_size=tokenizer.vocab_size,
            before=[s.before for s in group] if prompt_caches else None,
            keep_cache=partial(_keep_cache, group) if return_prompt_caches else None,
            keep_logprob=partial(_keep_logprob, group) if return_logprobs else None,
        )
        next(steps)
        stats.prompt_time += time.perf_counter() - start
        start = time.perf_counter()
        for _ in steps:
            pass
        stats.generation_time += time.perf_counter() - start
        if verbose:
            done = first + len(group)
            print(f"[batch_generate] Finished processing {done}/{len(sequences)} ...", end="\r")
    stats.prompt_tokens = sum(s.prompt.size for s in sequences)
    stats.generation_tokens = sum(len(s.tokens) for s in sequences)
    after_first = stats.generation_tokens - len(sequences)
    stats.prompt_tps = stats.prompt_tokens / stats.prompt_time if sequences else 0.0
    stats.generation_tps = after_first / stats.generation_time if after_first else 0.0
    stats.peak_memory = mx.get_peak_memory() / 1e9
    if verbose:
        print(f"\n{_summary(stats)}")
    shown = [len(s.tokens) - (s.tokens[-1] in tokenizer.eos_token_ids) for s in sequences]
    return BatchResponse(
        [s.text for s in sequences],
        [s.tokens[:n] for s, n in zip(sequences, shown, strict=True)],
        [str(s.finish_reason) for s in sequences],
        stats,
        [[s.cache] for s in sequences if s.cache] if return_prompt_caches else None,
        [
            cast("list[float]", mx.stack(s.logprobs)[:n].tolist())
            for s, n in zip(sequences, shown, strict=True)
        ]
        if return_logprobs
        else None,
    )


def _befores(
    caches: Sequence[Sequence[KVCache] | None] | None, count: int, model: OpenELM
) -> list[KVCache | None]:
    """What comes before each prompt; None where that is nothing."""
    if caches is None:
        return [None] * count
    if len(caches) != count:
        raise InputError(f"prompt_caches has {len(caches)} entries for {count} prompts")
    found = [None if cache is None else given_cache(cache) for cache in caches]
    for cache in found:
        if cache is None:
            continue
        fits(cache, model)
        if cache.max_size is not None:
            raise InputError("a prompt cache that slides (max_kv_size) can't be used in a batch")
    return found


def _summary(stats: BatchStats) -> str:
    """Counts and speeds, in mlx-lm's lines."""
    return (
        f"[batch_generate] Prompt: {stats.prompt_tokens} tokens, "
        f"{stats.prompt_tps:.3f} tokens-per-sec\n"
        f"[batch_generate] Generation: {stats.generation_tokens} tokens, "
        f"{stats.generation_tps:.3f} tokens-per-sec\n"
        f"[batch_generate] Peak memory: {stats.peak_memory:.3f} GB"
    )


def batch_generate_step(
    prompts: Sequence[mx.array],
    model: OpenELM,
    max_tokens: Sequence[int],
    *,
    ends: Callable[[int, int], bool] = lambda i, token: False,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prefill_step_size: int | None = None,
    vocab_size: int | None = None,
    before: Sequence[KVCache | None] | None = None,
    keep_cache: Callable[[int, KVCache], None] | None = None,
    keep_logprob: Callable[[int, mx.array], None] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """For each step (index of the prompt, token) of every sequence that hasn't ended.

    Shorter prompts are padded in front. Sequences that ended leave the batch once they are half of
    it, so that few shapes are computed.

    Args:
        prompts: [L] int32 each.
        max_tokens: of each sequence, at least 1.
        ends: called with every index and token; whether that is the sequence's last.
        sampler: log-probabilities [B, vocab] -> tokens [B]; greedy by default.
        logits_processors: applied in order, to one sequence at a time.
        prefill_step_size: tokens of the prompts that one step takes; by default what suits the
            device.
        vocab_size: ids from here on are never sampled.
        before: of each sequence, what comes before its prompt; not changed.
        keep_cache: called with the index and the cache of each sequence that has ended.
        keep_logprob: called with the index and the log-probability [] of each token.

    Raises:
        InputError: when a prompt is empty, too long or holds what isn't a token of the model, or
            `max_tokens` is less than 1.
        OpenELMError: when the logits aren't finite; says where that began.
    """
    prompts = [as_token_ids(p, model.config.vocab_size, "a prompt") for p in prompts]
    draw, processors = begin(sampler), tuple(logits_processors or ())
    held = [cache.length if cache else 0 for cache in before or [None] * len(prompts)]
    limits = [
        min(limit, _room(model, prompt.size, past, "a prompt"))
        for limit, prompt, past in zip(max_tokens, prompts, held, strict=True)
    ]
    if min(limits) < 1:
        raise InputError(f"max_tokens must be at least 1, not {min(limits)}")
    rows = list(range(len(prompts)))  # which prompt each row of the batch is of
    going = set(rows)
    seen = list(prompts)  # of each row
    made: list[list[int]] = [[] for _ in prompts]

    def chosen(logits: mx.array, first: bool = False) -> Choice:
        return choose(logits, draw, processors, seen, vocab_size, first)

    def after(tokens: mx.array) -> Choice:
        nonlocal seen
        if processors:
            seen = [mx.concatenate([s, tokens[i : i + 1]]) for i, s in enumerate(seen)]
        return chosen(model.step(tokens[:, None], cache, last_only=True)[:, 0])

    def text(row: int) -> list[int]:
        return [*cast("list[int]", prompts[rows[row]].tolist()), *made[rows[row]]]

    logits, cache = _read_prompts(prompts, model, before, prefill_step_size)
    choice = chosen(logits, first=True)
    for count in itertools.count(1):
        more = count < max(limits[i] for i in going)
        following = after(choice.tokens) if more and model.policy.overlapped else None
        tokens = choice.wait(model, text, [row for row, i in enumerate(rows) if i in going])
        if keep_cache and following is None:
            if more:
                following = after(choice.tokens)
            elif cache.room() != 0:
                model.step(choice.tokens[:, None], cache, last_only=True)  # only for the cache
        given = [(i, token) for i, token in zip(rows, tokens, strict=True) if i in going]
        for i, token in given:
            made[i].append(token)
        over = {i for i, token in given if ends(i, token) or count == limits[i]}
        for row, i in enumerate(rows):
            if i in going and keep_logprob:
                keep_logprob(i, choice.logprobs[row, tokens[row]])
            if i in over and keep_cache:
                keep_cache(
                    i, cache.sequence(row, min(held[i] + prompts[i].size + count, cache.offset))
                )
        going -= over
        yield given
        if not going:
            return
        choice = following or choice
        if 2 * len(going) <= len(rows):
            kept = [row for row, i in enumerate(rows) if i in going]
            cache.select(kept)
            choice = Choice(*(array[mx.array(kept)] for array in choice))
            rows, seen = [rows[row] for row in kept], [seen[row] for row in kept]
        if following is None:
            choice = after(choice.tokens)


def _read_prompts(
    prompts: Sequence[mx.array],
    model: OpenELM,
    before: Sequence[KVCache | None] | None,
    step_size: int | None,
) -> tuple[mx.array, KVCache]:
    """The last logits [B, vocab] of the prompts, and the cache of all of them."""
    if before is None:
        lengths = [prompt.size for prompt in prompts]
        cache = model.make_cache(lengths=lengths)
        padded = mx.stack([mx.pad(p, (max(lengths) - p.size, 0)) for p in prompts])
        return prefill(model, padded, cache, step_size), cache
    caches = [copy.deepcopy(cache) if cache else model.make_cache() for cache in before]
    logits = [prefill(model, p, c, step_size) for p, c in zip(prompts, caches, strict=True)]
    return mx.concatenate(logits), merge(caches)


def _room(model: OpenELM, prompt: int, past: int, name: str) -> int:
    """How many tokens can follow `past` and `prompt` tokens; the last one needs no room."""
    context = model.config.max_context_length
    if not 0 < prompt <= context - past:
        after = f" after the {past} of its prompt cache" if past else ""
        raise InputError(
            f"{name} has {prompt} tokens{after}; from 1 to {context - past} are possible in the "
            f"model's context of {context}"
        )
    return context - past - prompt + 1
