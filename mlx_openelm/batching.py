"""Many sequences in one step: one pass over the weights gives a token to each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from .decoding import Prompt, encode_prompt, prefill
from .errors import InputError
from .model import OpenELM
from .sampling import LogitsProcessor, Sampler, make_sampler
from .stopping import StopStrings

if TYPE_CHECKING:
    from .tokenizer import StreamingDetokenizer, Tokenizer


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
    detokenizer: StreamingDetokenizer
    stop: StopStrings
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""

    def add(self, token: int, eos: set[int]) -> None:
        """Take the next token; sets `finish_reason` with the last one."""
        self.tokens.append(token)
        ended = token in eos
        if not ended:
            self.detokenizer.add_token(token)
        full = len(self.tokens) == self.limit
        if ended or full:
            self.detokenizer.finalize()
        self.text += self.stop.feed(self.detokenizer.last_segment)
        if ended or self.stop.found or full:
            self.finish_reason = "stop" if ended or self.stop.found else "length"
            self.text += self.stop.finish()


def batch_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int | Sequence[int] = 128,
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    stop: Sequence[str] = (),
    prefill_step_size: int = 512,
    completion_batch_size: int = 32,
) -> BatchResponse:
    """Continue many prompts at once; greedy results are those of one prompt at a time.

    Prompts of similar length are taken together, at most `completion_batch_size` of them, the
    shorter ones padded in front. Sequences that have ended make room as soon as they are half.

    Args:
        prompts: texts, or lists of token ids.
        max_tokens: how many tokens at most, for all or for each.
        sampler, logits_processors, stop, prefill_step_size: as in `generate_step` and
            `stream_generate`; processors see the tokens of one sequence at a time.
        completion_batch_size: sequences in one step.

    Raises:
        InputError: when a prompt is empty or too long, or an argument is out of its range.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != len(prompts):
        raise InputError(f"max_tokens has {len(limits)} entries for {len(prompts)} prompts")
    for name, least in (
        ("max_tokens", min(limits, default=1)),
        ("batch size", completion_batch_size),
    ):
        if least < 1:
            raise InputError(f"{name} must be at least 1, not {least}")
    context, vocab_size = model.config.max_context_length, model.config.vocab_size
    sequences = []
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        ids = encode_prompt(tokenizer, prompt, vocab_size)
        if not 0 < ids.size <= context:
            raise InputError(
                f"prompt {i} has {ids.size} tokens; from 1 to the model's context of {context} "
                "are possible"
            )
        limit = min(limit, context - ids.size + 1)  # the last token needs no room
        strings = StopStrings((stop,) if isinstance(stop, str) else stop)
        sequences.append(_Sequence(ids, limit, tokenizer.detokenizer, strings))
    stats = BatchStats()
    by_length = sorted(sequences, key=lambda s: s.prompt.size)
    for first in range(0, len(by_length), completion_batch_size):
        group = by_length[first : first + completion_batch_size]
        start = time.perf_counter()
        steps = _steps(
            model,
            group,
            sampler or make_sampler(),
            logits_processors,
            prefill_step_size,
            tokenizer.vocab_size,
        )
        for count, (rows, tokens) in enumerate(steps):
            if count == 0:
                stats.prompt_time += time.perf_counter() - start
                start = time.perf_counter()
            for sequence, token in zip(rows, tokens, strict=True):
                if not sequence.finish_reason:
                    sequence.add(token, tokenizer.eos_token_ids)
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
        [s.finish_reason for s in sequences],
        stats,
    )


def _steps(
    model: OpenELM,
    rows: list[_Sequence],
    sampler: Sampler,
    processors: Sequence[LogitsProcessor],
    prefill_step_size: int,
    vocab_size: int,
) -> Iterator[tuple[list[_Sequence], list[int]]]:
    """The sequences that are still in the batch, and the next token of each, until all ended.

    The caller adds the tokens to the sequences before it asks for more.
    """
    longest = max(s.prompt.size for s in rows)
    cache = model.make_cache(lengths=[s.prompt.size for s in rows])
    padded = mx.stack([mx.pad(s.prompt, (longest - s.prompt.size, 0)) for s in rows])
    seen = [s.prompt for s in rows]

    def choose(logits: mx.array) -> mx.array:
        logits = logits[:, :vocab_size]
        for process in processors:
            parts = [process(s, logits[i : i + 1]) for i, s in enumerate(seen)]
            logits = mx.concatenate(parts)
        tokens = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.async_eval(tokens)  # type: ignore[no-untyped-call]
        return tokens

    tokens = choose(prefill(model, padded, cache, prefill_step_size))
    made = 1
    while True:
        following = None
        if made < max(s.limit for s in rows if not s.finish_reason):
            if processors:
                seen = [mx.concatenate([s, tokens[i : i + 1]]) for i, s in enumerate(seen)]
            following = choose(model(tokens[:, None], cache, last_only=True)[:, 0])
        yield rows, tokens.tolist()  # type: ignore[misc]
        going = [i for i, s in enumerate(rows) if not s.finish_reason]
        if following is None or not going:
            return
        if 2 * len(going) <= len(rows):
            kept = mx.array(going)
            cache.select(going)
            following = following[kept]
            rows, seen = [rows[i] for i in going], [seen[i] for i in going]
        tokens = following
        made += 1
