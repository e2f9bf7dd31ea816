"""Many sequences in one step: one pass over the weights gives a token to each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from .choosing import Choice, begin, choose
from .decoding import Prompt, TextStream, encode_prompt, prefill
from .errors import InputError
from .model import OpenELM
from .sampling import LogitsProcessor, Sampler
from .stopping import StopStrings
from .token_ids import as_token_ids

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


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
    """What `batch_generate` made, in the order of its prompts."""

    texts: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[str]
    stats: BatchStats


@dataclass
class _Sequence:
    """One prompt and what came of it."""

    prompt: mx.array  # [L] int32
    limit: int  # tokens at most
    output: TextStream
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def add(self, token: int) -> bool:
        """Take the next token; returns whether it is the last."""
        self.tokens.append(token)
        text, self.finish_reason = self.output.add(token)
        self.text += text
        return self.finish_reason is not None


def _add(group: Sequence[_Sequence], i: int, token: int) -> bool:
    return group[i].add(token)


def batch_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int | Sequence[int] = 128,
    *,
    stop: Sequence[str] = (),
    completion_batch_size: int = 32,
    **options: Any,
) -> BatchResponse:
    """Continue many prompts at once; results are those of one prompt at a time.

    That holds greedily and with a seed, as far as the dtype computes alike (float32 does): equal
    prompts then give equal texts. Without a seed all draws are different ones.

    Prompts of similar length are taken together, at most `completion_batch_size` of them.

    Args:
        prompts: texts, or lists of token ids.
        max_tokens: how many tokens at most, for all or for each.
        stop: strings that end a text; they are not part of it.
        completion_batch_size: sequences in one step.
        options: see `batch_generate_step`.

    Raises:
        InputError: when a prompt is empty or too long, or an argument is out of its range.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != len(prompts):
        raise InputError(f"max_tokens has {len(limits)} entries for {len(prompts)} prompts")
    if completion_batch_size < 1:
        raise InputError(f"completion_batch_size must be at least 1, not {completion_batch_size}")
    sequences = []
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        ids = encode_prompt(tokenizer, prompt, model.config.vocab_size)
        limit = min(limit, _room(model, ids, f"prompt {i}"))
        strings = StopStrings((stop,) if isinstance(stop, str) else stop)
        sequences.append(_Sequence(ids, limit, TextStream(tokenizer, strings, limit)))
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
            vocab_size=tokenizer.vocab_size,
            **options,
        )
        next(steps)
        stats.prompt_time += time.perf_counter() - start
        start = time.perf_counter()
        for _ in steps:
            pass
        stats.generation_time += time.perf_counter() - start
    stats.prompt_tokens = sum(s.prompt.size for s in sequences)
    stats.generation_tokens = sum(len(s.tokens) for s in sequences)
    after_first = stats.generation_tokens - len(sequences)
    stats.prompt_tps = stats.prompt_tokens / stats.prompt_time if sequences else 0.0
    stats.generation_tps = after_first / stats.generation_time if after_first else 0.0
    stats.peak_memory = mx.get_peak_memory() / 1e9
    return BatchResponse(
        [s.text for s in sequences],
        [s.tokens for s in sequences],
        [str(s.finish_reason) for s in sequences],
        stats,
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

    Raises:
        InputError: when a prompt is empty, too long or holds what isn't a token of the model, or
            `max_tokens` is less than 1.
        OpenELMError: when the logits aren't finite; says where that began.
    """
    prompts = [as_token_ids(p, model.config.vocab_size, "a prompt") for p in prompts]
    draw, processors = begin(sampler), tuple(logits_processors or ())
    limits = [min(n, _room(model, p, "a prompt")) for n, p in zip(max_tokens, prompts, strict=True)]
    if min(limits) < 1:
        raise InputError(f"max_tokens must be at least 1, not {min(limits)}")
    lengths = [prompt.size for prompt in prompts]
    cache = model.make_cache(lengths=lengths)
    padded = mx.stack([mx.pad(p, (max(lengths) - p.size, 0)) for p in prompts])
    rows = list(range(len(prompts)))  # which prompt each row of the batch is of
    going = set(rows)
    seen = list(prompts)  # of each row
    made: list[list[int]] = [[] for _ in prompts]

    def chosen(logits: mx.array, first: bool = False) -> Choice:
        return choose(logits, draw, processors, seen, vocab_size, first)

    def text(row: int) -> list[int]:
        return [*cast("list[int]", prompts[rows[row]].tolist()), *made[rows[row]]]

    choice = chosen(prefill(model, padded, cache, prefill_step_size), first=True)

    def after(tokens: mx.array) -> Choice:
        nonlocal seen
        if processors:
            seen = [mx.concatenate([s, tokens[i : i + 1]]) for i, s in enumerate(seen)]
        return chosen(model.step(tokens[:, None], cache, last_only=True)[:, 0])

    for count in itertools.count(1):
        more = model.policy.overlapped and count < max(limits[i] for i in going)
        following = after(choice.tokens) if more else None
        tokens = choice.wait(model, text, [row for row, i in enumerate(rows) if i in going])
        given = [(i, token) for i, token in zip(rows, tokens, strict=True) if i in going]
        for i, token in given:
            made[i].append(token)
        going -= {i for i, token in given if ends(i, token) or count == limits[i]}
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


def _room(model: OpenELM, prompt: mx.array, name: str) -> int:
    """How many tokens can follow a prompt; the last one needs no room in the cache."""
    context = model.config.max_context_length
    if not 0 < prompt.size <= context:
        raise InputError(
            f"{name} has {prompt.size} tokens; from 1 to the model's context of {context} are "
            "possible"
        )
    return context - prompt.size + 1
