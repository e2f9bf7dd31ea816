"""What is measured: which prompts a runtime is given, and what is read off its answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import InputError
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from .peers import OURS, PEERS, Workload
from .results import Trial, Work

PROMPTS = Path(__file__).parent / "prompts"
TEXT, ANOTHER_TEXT, REPEATING = "ice_maiden", "badger", "repeating"
RANDOM_TOKENS = "random tokens"

KINDS = {
    "load": "seconds until the weights are ready, in a new process",
    "cold": "process start to the first token",
    "prefill": "prompt processing, tokens/s; its seconds are the time to the first token",
    "decode": "generation after prompts of growing length, tokens/s",
    "batch": "several sequences at once, tokens/s of all",
    "long": "a long generation, for drift in speed or memory",
    "speculative": "generation with a draft model, beside the same without",
    "lookup": "generation by prompt lookup where the text repeats, beside the same without",
}
NEW_PROCESS = ("load", "cold")  # a process for every trial
SERIES = 10  # parts of a long generation whose speeds are told apart


@dataclass(frozen=True)
class Plan:
    """How much is to be measured."""

    kinds: tuple[str, ...] = tuple(KINDS)
    prompt_tokens: tuple[int, ...] = (32, 128, 512, 2048)
    gen_tokens: int = 128
    batches: tuple[int, ...] = (4,)
    long_tokens: int = 1024
    trials: int = 5
    draft_model: str | None = None

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise InputError(f"no workload {unknown[0]!r}; known are {', '.join(KINDS)}")
        for name in ("trials", "gen_tokens", "long_tokens", "prompt_tokens", "batches"):
            value = getattr(self, name)
            least = min(value, default=0) if isinstance(value, tuple) else value
            if least < (2 if name in ("gen_tokens", "long_tokens") else 1):
                raise InputError(f"--{name.replace('_', '-')}: {least} is too few")


@dataclass(frozen=True)
class Task:
    """One run of a runtime, and the works that are read off it.

    `workload` is None where a process is started for every trial.
    """

    works: tuple[Work, ...]
    workload: Workload | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def kind(self) -> str:
        """Of the last work, which decides who can do it."""
        return self.works[-1].kind

    def fits(self, peer: str) -> bool:
        """Whether a runtime can do it."""
        if self.kind == "cold":
            return peer in ("mlx-openelm", "mlx-lm")
        if self.workload is None:
            return True
        if self.kind in ("speculative", "lookup") or self.works[0].text in (
            ANOTHER_TEXT,
            REPEATING,
        ):
            return peer == OURS
        return len(self.workload.prompts) == 1 or (peer in PEERS and PEERS[peer].batches)


def tasks(
    plan: Plan, config: OpenELMConfig, tokenizer: Tokenizer | None
) -> tuple[list[Task], list[str]]:
    """What a plan means for one model, and notes about what had to be left out.

    Without a tokenizer (a model of random weights) prompts are random tokens.
    """
    context, notes = config.max_context_length, []
    lengths = [n for n in plan.prompt_tokens if n <= context]
    if left_out := [str(n) for n in plan.prompt_tokens if n > context]:
        notes.append(f"no prompts of {', '.join(left_out)} tokens: the context is {context}")

    def prompts(text: str, length: int, count: int = 1) -> tuple[str, list[list[int]]]:
        if tokenizer is None:
            return RANDOM_TOKENS, random_prompts(config.vocab_size, length, count)
        return text, text_prompts(tokenizer, text, length, count)

    found: list[Task] = []
    for kind in NEW_PROCESS:
        if kind in plan.kinds and not (kind == "cold" and tokenizer is None):
            found.append(Task((Work(kind),)))
    for length in lengths:
        gen = min(plan.gen_tokens, context + 1 - length) if "decode" in plan.kinds else 1
        text, given = prompts(TEXT, length)
        works = [Work("prefill", length, 0, text=text)] if "prefill" in plan.kinds else []
        if gen > 1:
            works.append(Work("decode", length, gen, text=text))
        if works:
            found.append(Task(tuple(works), Workload(given, max(gen, 1))))
    if "batch" in plan.kinds and lengths:
        found += _batches(plan, lengths[0], context, prompts)
    if "long" in plan.kinds and lengths:
        gen = min(plan.long_tokens, context + 1 - lengths[0])
        text, given = prompts(TEXT, lengths[0])
        if gen > SERIES:
            found.append(Task((Work("long", lengths[0], gen, text=text),), Workload(given, gen)))
    if tokenizer is not None:
        found += _several_at_a_step(plan, context, prompts, notes)
    elif {"speculative", "lookup"} & set(plan.kinds):
        notes.append("no drafted tokens: with random weights they'd say nothing")
    return found, notes


def _batches(plan: Plan, length: int, context: int, prompts: Any) -> Sequence[Task]:
    gen = min(plan.gen_tokens, context + 1 - length)
    made = []
    for batch in plan.batches:
        if batch > 1:
            text, given = prompts(TEXT, length, batch)
            made.append(Task((Work("batch", length, gen, batch, text),), Workload(given, gen)))
    return made


def _several_at_a_step(plan: Plan, context: int, prompts: Any, notes: list[str]) -> Sequence[Task]:
    """Speculative decoding and prompt lookup, each beside plain generation of the same."""
    made = []
    for kind, text, option, value in (
        ("speculative", ANOTHER_TEXT, "draft_model", plan.draft_model),
        ("lookup", REPEATING, "prompt_lookup", True),
    ):
        if kind not in plan.kinds:
            continue
        if not value:
            notes.append("no speculative: name a draft model with --draft-model")
        else:
            length = min(128 if kind == "speculative" else 400, context // 2)
            text, given = prompts(text, length)
            length = len(given[0])
            gen = min(plan.gen_tokens, context + 1 - length)
            plain = Workload(given, gen)
            made += [
                Task((Work("decode", length, gen, text=text),), plain),
                Task((Work(kind, length, gen, text=text),), Workload(given, gen, {option: value})),
            ]
    return made


def text_prompts(tokenizer: Tokenizer, name: str, length: int, count: int) -> list[list[int]]:
    """`count` prompts of `length` tokens out of a bundled text, one passage after the other.

    The text that repeats isn't cut nor begun anew: its prompt may be shorter.
    """
    ids = tokenizer.encode((PROMPTS / f"{name}.txt").read_text(encoding="utf-8").rstrip())
    if name == REPEATING:
        return [ids[-length:]]
    needed = ids * -(-length * count // len(ids))
    return [needed[i * length : (i + 1) * length] for i in range(count)]


def random_prompts(vocab_size: int, length: int, count: int) -> list[list[int]]:
    """`count` prompts of `length` random tokens, the same at every call."""
    numbers = random.Random(0)
    return [[1, *numbers.choices(range(3, vocab_size), k=length - 1)] for _ in range(count)]


def read_off(work: Work, turn: int, measured: Mapping[str, Any]) -> tuple[Trial, dict[str, float]]:
    """The trial of one work in what a worker answered, and further statistics."""
    prefill, decode = measured["prefill_seconds"], measured["decode_seconds"]
    made = sum(map(len, measured["tokens"])) or work.gen_tokens
    if work.kind == "prefill":
        value, seconds = work.prompt_tokens / prefill, prefill
    elif work.kind == "batch":
        value, seconds = made / (prefill + decode), prefill + decode
    else:
        value, seconds = (made - 1) / decode, decode
    trial = Trial(
        turn,
        value,
        seconds,
        measured.get("peak_bytes"),
        measured.get("mlx_peak_bytes"),
        series=series(measured.get("times", [])) if work.kind == "long" else [],
    )
    return trial, dict(measured.get("statistics", {}))


def series(times: Sequence[float]) -> list[float]:
    """Tokens/s in each tenth of a generation, from the seconds at which its tokens came."""
    if len(times) <= SERIES:
        return []
    ends = [round(i * (len(times) - 1) / SERIES) for i in range(SERIES + 1)]
    return [(b - a) / (times[b] - times[a]) for a, b in pairwise(ends)]
