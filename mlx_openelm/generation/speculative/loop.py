"""The loop of `decoding.py` with several tokens a step: drafted, then verified at once.

Speculative decoding (Y. Leviathan et al., arXiv 2211.17192): a cheap source drafts tokens, the
model computes the logits after all of them in one step, and those that hold are kept. What comes
out is what the model alone gives: greedily the same tokens, sampled the same distribution, and
with a seed the same tokens again.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import mlx.core as mx

from ...errors import InputError
from ...model.cache import KVCache, Use
from ...model.openelm import OpenELM
from ...model.token_ids import as_prompt
from ..choosing import Choice
from ..decoding import prefill, token_limit
from ..options import Options, Progress
from ..sampling import LogitsProcessor, Sampler
from .draft_length import LENGTHS, Costs, Kind, Pace
from .proposers import Draft, DraftModel, PromptLookup
from .verify import Chooser

SURE_ENOUGH = 0.5  # the acceptance that makes it worth to wait whether a passage goes on


@dataclass
class Speculation:
    """Statistics of speculative decoding so far.

    Attributes:
        tokens: generated tokens.
        steps: steps of the model that they took.
        drafted, accepted: tokens that were proposed, and those that the model accepted.
    """

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Generated tokens per step of the model."""
        return self.tokens / self.steps if self.steps else 0.0

    def report(self) -> dict[str, float]:
        """All of it by name."""
        return {
            **asdict(self),
            "acceptance": self.acceptance,
            "tokens_per_step": self.tokens_per_step,
        }


class Step(NamedTuple):
    """A step of the model on its way.

    Attributes:
        choice: n + 1 tokens, what the model says after the text and after each of n drafted ones.
        draft: those n; None for a plain step.
        in_time: whether it was begun before the step before it was over.
    """

    choice: Choice
    draft: Draft | None = None
    in_time: bool = False

    def wait(self, model: OpenELM, text: list[int]) -> list[int]:
        """The tokens that hold: the draft as far as the model agrees, then the model's own.

        Args:
            model: whose step it is.
            text: the token ids before it.

        Raises:
            OpenELMError: when the logits aren't finite.
        """
        drafted = cast("list[int]", self.draft.tokens.tolist()) if self.draft else []
        tokens = cast("list[int]", self.choice.tokens.tolist())
        agree = (ours == theirs for ours, theirs in zip(tokens, drafted, strict=False))
        rows = range(sum(takewhile(bool, agree)) + 1)
        if self.draft and self.draft.check:
            self.draft.check(text, drafted, rows)
        # Attention gives NaN of later tokens to earlier ones too, masked or not: 0 · NaN is NaN.
        return self.choice.wait(model, lambda _: [*text, *drafted], rows)[: len(rows)]


def speculative_generate_step(
    prompt: mx.array,
    model: OpenELM,
    draft_model: OpenELM | None = None,
    stream: None = None,
    *,
    prompt_lookup: bool = False,
    num_draft_tokens: int = LENGTHS[-1],
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: KVCache | Sequence[KVCache] | None = None,
    prefill_step_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,
    quantized_kv_start: int = 0,
    max_kv_size: int | None = None,
    prompt_progress_callback: Progress | None = None,
    vocab_size: int | None = None,
    statistics: Speculation | None = None,
    pace: Pace | None = None,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """Token ids that continue `prompt` [L], as `decoding.generate_step` gives them, but sooner.

    With both sources, a passage that repeats is copied, and elsewhere the draft model is asked.
    Logits processors must depend on their arguments only: they also see drafts that don't hold.

    Args:
        draft_model: a smaller model with the same tokenizer.
        prompt_lookup: draft what followed when the last few tokens occurred before.
        num_draft_tokens: how many tokens are drafted at most; how many are is decided by `pace`.
        statistics: is kept up to date.
        pace: decides the length of each draft; by default it begins with what was measured when
            the same models generated before.
        stream, max_tokens, sampler, logits_processors, prompt_cache, prefill_step_size, kv_bits,
            kv_group_size, quantized_kv_start, max_kv_size, prompt_progress_callback, vocab_size:
            as in `decoding.generate_step`.

    Yields:
        The token, the log-probabilities [vocab] it was chosen by, and whether it was drafted.

    Raises:
        InputError: as `generate_step`; and for a context that slides, since what was drafted in
            vain can't be taken back there.
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
        draft_model=draft_model,
        prompt_lookup=prompt_lookup,
        num_draft_tokens=num_draft_tokens,
        pace=pace,
        stream=stream,
    )
    return drafted_steps(
        as_prompt(prompt, model.config.vocab_size),
        model,
        options,
        options.cache(model),
        vocab_size=vocab_size,
        statistics=statistics,
    )


def drafted_steps(
    prompt: mx.array,
    model: OpenELM,
    options: Options,
    cache: KVCache,
    *,
    use: Use | None = None,
    cached_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    statistics: Speculation | None = None,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """The tokens of `speculative_generate_step`.

    Args:
        use: of the cache; by default a new one.
        cached_tokens: what the cache holds of the text, for processors and lookup to see.
        prompt, model, options, cache, vocab_size, statistics: as there.

    Raises:
        InputError: when the draft model can't have the model's tokenizer.
    """
    draft_model = options.draft_model
    vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    if draft_model is not None and draft_model.config.vocab_size < vocab_size:
        raise InputError(
            f"the draft model knows {draft_model.config.vocab_size} tokens, the model "
            f"{vocab_size}: they can't have the same tokenizer"
        )
    seen = mx.concatenate([mx.array(list(cached_tokens), mx.int32), prompt])
    return _Loop(
        model,
        cache,
        Chooser(options.sampler, options.logits_processors or (), seen, vocab_size),
        DraftModel(draft_model) if draft_model is not None else None,
        PromptLookup() if options.prompt_lookup else None,
        options.pace or Pace(options.num_draft_tokens, _costs(model, draft_model)),
        statistics or Speculation(),
    ).run(prompt, cached_tokens, options, use)


_measured: WeakKeyDictionary[OpenELM, WeakKeyDictionary[OpenELM, Costs]] = WeakKeyDictionary()


def _costs(model: OpenELM, draft_model: OpenELM | None) -> Costs:
    """What has been measured with these models in this process."""
    by_draft = _measured.setdefault(model, WeakKeyDictionary())
    return by_draft.setdefault(draft_model or model, Costs())


class _Loop:
    """What `speculative_generate_step` keeps between two steps."""

    def __init__(
        self,
        model: OpenELM,
        cache: KVCache,
        chooser: Chooser,
        draft_model: DraftModel | None,
        lookup: PromptLookup | None,
        pace: Pace,
        statistics: Speculation,
    ) -> None:
        self.model, self.cache, self.chooser = model, cache, chooser
        self.draft_model, self.lookup = draft_model, lookup
        self.pace, self.statistics = pace, statistics
        self.text: list[int] = []
        self.traces = 0  # of all models, when a step was over last
        self.before = 0  # positions of the cache that aren't of the text

    def run(
        self,
        prompt: mx.array,
        cached_tokens: Sequence[int],
        options: Options,
        use: Use | None,
    ) -> Generator[tuple[int, mx.array, bool], None, None]:
        cache, progress = self.cache, options.prompt_progress_callback
        use = use or cache.begin_use(appends=options.prompt_cache is not None)
        try:
            self.before = cache.offset - len(cached_tokens)
            left = token_limit(cache, prompt.size, options.max_tokens)
            assert left is not None  # the context doesn't slide
            logits = prefill(self.model, prompt, cache, options.prefill_step_size, progress)
            step = Step(self.chooser.choose(logits, first=True))
            self._extend([*cached_tokens, *cast("list[int]", prompt.tolist())])
            if progress or left == 0:
                mx.eval(step.choice.tokens, cache.buffers)
            if progress:
                progress(prompt.size, prompt.size)
            given = len(self.text)
            use.text = self.before + given
            if left == 0:
                return
            then: float | None = None
            while True:
                following = None
                plain = step.draft is None and left > 1 and self.model.policy.overlapped
                if plain and not self._worth_waiting(left - 1):
                    # Whatever this step gives, a plain one follows: begun before this is over.
                    following = self._plain(step.choice.tokens, unknown=True)
                tokens = step.wait(self.model, self.text)
                now = time.perf_counter()
                self._note(step, tokens, None if then is None else now - then)
                then = now
                left -= len(tokens)
                self._extend(tokens)
                self.chooser.extend(tokens)
                if following is None and left:
                    following = self._next(left)
                elif use.appends and not left and cache.room() != 0:
                    self.model.step(mx.array([tokens[-1:]]), cache, last_only=True)  # for it
                for i, token in enumerate(tokens):
                    given += 1
                    use.text = self.before + given
                    yield token, step.choice.logprobs[i], i < len(tokens) - 1
                    cache.still_in(use)
                if following is None:
                    return
                step = following
        finally:
            if cache.use is use:
                cache.settle()

    def _extend(self, tokens: Sequence[int]) -> None:
        self.text += tokens
        if self.lookup:
            self.lookup.extend(tokens)

    def _trim(self, tokens: int) -> None:
        """Forget what the cache holds beyond so many tokens of the text."""
        self.cache.trim(max(self.cache.offset - self.before - tokens, 0))

    def _note(self, step: Step, tokens: list[int], seconds: float | None) -> None:
        """Keep the accounts of a step that is over."""
        drafted = step.draft.tokens.size if step.draft else 0
        self.statistics.steps += 1
        self.statistics.tokens += len(tokens)
        self.statistics.drafted += drafted
        self.statistics.accepted += len(tokens) - 1
        traces = self.model.traces + (self.draft_model.model.traces if self.draft_model else 0)
        built, self.traces = traces != self.traces, traces
        if seconds is None:
            return
        if step.draft:
            self.pace.round(step.draft.kind, drafted, len(tokens) - 1, seconds, built)
        else:
            self.pace.plain_step(seconds, step.in_time, built)

    def _choice(self, longest: int) -> tuple[Kind, int] | None:
        """What to draft from next, and how many tokens, if it pays."""
        kinds = []
        if self.lookup and (found := self.lookup.kind()):
            kinds.append(found)
        if self.draft_model:
            kinds.append(self.draft_model.kind)
            longest = min(longest, self.draft_model.longest)
        return self.pace.choose(kinds, longest)

    def _worth_waiting(self, longest: int) -> bool:
        """Whether to draft as soon as the step that is on its way is over.

        Where a passage would be copied, that step has to go on with it first.
        """
        choice = self._choice(longest)
        if choice is None:
            return False
        copied = choice[0].source == PromptLookup.SOURCE
        return not copied or self.pace.acceptance(choice[0]) >= SURE_ENOUGH

    def _next(self, left: int) -> Step:
        """The step that the text so far calls for; `left` tokens may follow it."""
        self._trim(len(self.text) - 1)
        last = mx.array(self.text[-1:])
        choice = self._choice(left - 1)
        if choice is None:
            return self._plain(last)
        kind, length = choice
        if self.lookup and kind.source == self.lookup.SOURCE:
            draft = Draft(mx.array(self.lookup.draft(length)), kind)
        else:
            assert self.draft_model is not None
            draft = self._ask(self.draft_model, length)
        logits = self.model.step(mx.concatenate([last, draft.tokens])[None], self.cache)[0]
        return Step(self.chooser.choose(logits, draft.tokens, draft=draft), draft)

    def _ask(self, draft_model: DraftModel, length: int) -> Draft:
        """A draft of the draft model, by the rule that lets most of it hold."""
        probs: list[mx.array] = []
        choices: list[Choice] = []

        def propose(logits: mx.array, drafts: list[mx.array]) -> mx.array:
            ahead = mx.concatenate(drafts) if drafts and self.chooser.processors else None
            choices.append(self.chooser.propose(logits, ahead, len(drafts), probs))
            return choices[-1].tokens

        def check(text: list[int], drafted: list[int], rows: range) -> None:
            for row in rows[: len(choices)]:
                read = draft_model.known([*text, *drafted[:row]])
                choices[row].wait(draft_model.model, lambda _, read=read: read)  # type: ignore[misc]

        tokens = draft_model.draft(self.text, length, propose)
        return Draft(
            mx.concatenate(tokens),
            draft_model.kind,
            mx.concatenate(probs) if probs else None,
            check,
        )

    def _plain(self, token: mx.array, unknown: bool = False) -> Step:
        """A step after `token` [1]; `unknown`: whether the text doesn't have it yet."""
        logits = self.model.step(token[None], self.cache, last_only=True)[:, 0]
        ahead = token if unknown else None
        return Step(self.chooser.choose(logits, ahead, int(unknown)), in_time=unknown)
