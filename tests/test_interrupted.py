"""A generation may end by an exception at any point: the cache is then that of a text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest

import mlx_openelm
from mlx_openelm import InputError, KVCache, PromptCache
from mlx_openelm.generation.decoding import generate_step
from mlx_openelm.generation.speculative.loop import speculative_generate_step
from mlx_openelm.models.cache import make_prompt_cache

from .models import CONFIGS, random_model
from .test_model import POLICIES
from .test_speculative import Always

MODELS = {
    name: random_model(CONFIGS["uneven"], policy)
    for name, policy in POLICIES.items()
    if not policy.compiled or policy.native
}
MODEL = next(iter(MODELS.values()))
DRAFT = random_model(CONFIGS["uneven"], seed=1)
PACKAGE = str(Path(mlx_openelm.__file__).parent)
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6, 8, 9, 5, 6]
LENGTH = 8
MOMENTS = 120
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drafted": {"draft_model": DRAFT, "pace": Always(3)},
    "lookup": {"prompt_lookup": True, "pace": Always(3)},
}


@pytest.fixture(autouse=True, params=MODELS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is of a model whose steps overlap with building the next, and of one in C."""
    monkeypatch.setattr(sys.modules[__name__], "MODEL", MODELS[request.param])


class Stop(BaseException):
    """As Ctrl-C: no `except Exception` catches it."""


class Words:
    """A tokenizer for a model without one: each token is its number."""

    vocab_size, bos_token, eos_token_ids = 96, None, frozenset({95})

    @property
    def detokenizer(self) -> Words:
        return self

    def add_token(self, token: int) -> None:
        self.last_segment = f"{token} "

    def finalize(self) -> None:
        pass


def tokens_of(prompt: list[int], **options: Any) -> list[int]:
    steps = mlx_openelm.stream_generate(MODEL, Words(), prompt, LENGTH, **options)  # type: ignore[arg-type]
    return [response.token for response in steps]


ALONE = tokens_of(PROMPT)
WHOLE = PROMPT + ALONE


@contextmanager
def stopped_at(line: int) -> Iterator[None]:
    """Raise `Stop` when that many lines of the package have run in the block."""
    left = line

    def local(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise Stop
        return local

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def some_lines(work: Callable[[], object]) -> range:
    """Numbers of some `MOMENTS` of the lines of the package that `work` runs."""
    lines = 0
    for step in (2048, 256, 32):
        while True:
            try:
                with stopped_at(lines + step):
                    work()
            except Stop:
                lines += step
            else:
                break
    assert lines > 300
    return range(1, lines, lines // MOMENTS)


def check_is_of_the_text(cache: KVCache, text: list[int]) -> None:
    """The cache holds what computing the beginning of `text` gives."""
    fresh = MODEL.make_cache()
    held = cache.length
    if held:
        MODEL(mx.array([text[:held]]), fresh)
    assert cache.state.keys() == fresh.state.keys()
    for name, array in cache.state.items():
        assert mx.abs(array - fresh.state[name]).max().item() < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_cache_survives_a_stop_at_any_line(way: str, tmp_path: Path) -> None:
    def work(cache: PromptCache) -> None:
        tokens_of(PROMPT, prompt_cache=cache, prefill_step_size=5, **WAYS[way])

    for line in some_lines(lambda: work(PromptCache(MODEL))):
        cache = PromptCache(MODEL)
        with suppress(Stop), stopped_at(line):
            work(cache)
        check_is_of_the_text(cache.cache, WHOLE)
        cache.save(tmp_path / "cache")
        for again in (PromptCache.load(tmp_path / "cache", MODEL), cache):
            assert again.held == WHOLE[: len(again.held)]
            assert tokens_of(PROMPT, prompt_cache=again, **WAYS[way]) == ALONE


@pytest.mark.parametrize("way", WAYS)
def test_a_list_holds_what_was_given_out_whatever_line_stops_it(way: str) -> None:
    given: list[int] = []

    def work(caches: list[KVCache]) -> None:
        given.clear()
        if WAYS[way]:
            drafted = speculative_generate_step(
                mx.array(PROMPT),
                MODEL,
                max_tokens=LENGTH,
                prompt_cache=caches,
                prefill_step_size=5,
                **WAYS[way],
            )
            given.extend(token for token, *_ in drafted)
            return
        steps = generate_step(
            mx.array(PROMPT), MODEL, max_tokens=LENGTH, prompt_cache=caches, prefill_step_size=5
        )
        given.extend(token for token, _ in steps)

    caches = make_prompt_cache(MODEL)
    work(caches)
    assert given == ALONE
    assert caches[0].offset == len(WHOLE)
    for line in some_lines(lambda: work(make_prompt_cache(MODEL))):
        caches = make_prompt_cache(MODEL)
        with suppress(Stop), stopped_at(line):
            work(caches)
        caches[0].settle()  # as the next generation does
        # Between being counted and being received, a token is the text's.
        assert caches[0].offset in (0, *(len(PROMPT) + len(given) + more for more in (0, 1)))
        check_is_of_the_text(caches[0], WHOLE)
        rest = [*WHOLE[caches[0].offset :], 3]
        assert tokens_of(rest, prompt_cache=caches) == tokens_of([*WHOLE, 3])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["sampler", "logits_processors", "prompt_progress_callback"])
def test_a_function_of_the_user_may_raise_at_any_call(way: str, where: str) -> None:
    calls = last = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise RuntimeError("the user's")

    option: Any = {
        "sampler": lambda logprobs: (count(), mx.argmax(logprobs, axis=-1))[1],
        "logits_processors": [lambda _, logits: (count(), logits)[1]],
        "prompt_progress_callback": lambda *_: count(),
    }[where]
    for last in range(1, LENGTH + 2):  # noqa: B007
        for cache in (PromptCache(MODEL), make_prompt_cache(MODEL), MODEL.make_cache()):
            calls = 0
            options = {"prompt_cache": cache, "prefill_step_size": 2, **WAYS[way]}
            with suppress(RuntimeError):
                tokens_of(PROMPT, **options, **{where: option})
            inner = cache.cache if isinstance(cache, PromptCache) else cache
            one = inner if isinstance(inner, KVCache) else inner[0]
            check_is_of_the_text(one, WHOLE)
            if isinstance(cache, PromptCache):
                assert tokens_of(PROMPT, prompt_cache=cache) == ALONE
            else:
                assert tokens_of([*WHOLE[one.offset :], 3], prompt_cache=cache) == tokens_of(
                    [*WHOLE, 3]
                )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", range(1, LENGTH + 1))
def test_a_stream_that_is_left_lies_open_or_is_closed(way: str, count: int) -> None:
    for close in (True, False):
        for cache in (PromptCache(MODEL), make_prompt_cache(MODEL)):
            steps = mlx_openelm.stream_generate(
                MODEL,
                Words(),  # type: ignore[arg-type]
                PROMPT,
                50,
                prompt_cache=cache,
                **WAYS[way],
            )
            made = [next(steps).token for _ in range(count)]
            assert made == ALONE[:count]
            if close:
                steps.close()
            if isinstance(cache, PromptCache):
                assert tokens_of(PROMPT, prompt_cache=cache) == ALONE
            else:
                assert cache[0].length == len(PROMPT) + count
                assert tokens_of([3], prompt_cache=cache) == tokens_of([*PROMPT, *made, 3])
            if not close:
                with pytest.raises(InputError, match="used for another text"):
                    next(steps)


def test_a_context_that_slides_survives_too() -> None:
    prompt = PROMPT * 12
    alone = tokens_of(prompt, max_kv_size=16)
    calls = last = 0

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == last:
            raise Stop
        return mx.argmax(logprobs, axis=-1)

    for last in range(1, LENGTH + 1):  # noqa: B007
        calls = 0
        cache = PromptCache(MODEL, max_kv_size=16)
        with suppress(Stop):
            tokens_of(prompt, prompt_cache=cache, sampler=sampler)
        assert tokens_of(prompt, prompt_cache=cache) == alone
        caches = make_prompt_cache(MODEL, 16)
        calls = 0
        with suppress(Stop):
            tokens_of(prompt, prompt_cache=caches, sampler=sampler)
        text = (prompt + alone)[caches[0].offset :]
        assert tokens_of([*text, 3], prompt_cache=caches) == tokens_of(
            [*prompt, *alone, 3], max_kv_size=16
        )


def test_a_ring_forgets_only_what_it_has_not_overwritten() -> None:
    tokens = [(7 * i) % 90 for i in range(200)]
    for count in (1, 30, 63):
        cache = MODEL.make_cache(16)
        done = 0
        while done < len(tokens):
            step = cache.longest_step(len(tokens) - done)
            MODEL(mx.array([tokens[done : done + step]]), cache)
            done += step
        cache.trim(count)
        found = [MODEL(mx.array([[t]]), cache)[0, -1] for t in tokens[-count:]]
        other = MODEL.make_cache(16)
        wanted = [MODEL(mx.array([[t]]), other)[0, -1] for t in tokens][-count:]
        assert mx.abs(mx.stack(found) - mx.stack(wanted)).max().item() < 1e-4
        with pytest.raises(InputError, match="slid"):
            cache.trim(64)


def test_a_cache_that_is_trimmed_to_nothing_is_saved(tmp_path: Path) -> None:
    cache = PromptCache(MODEL)
    tokens_of(PROMPT, prompt_cache=cache)
    cache.begin([9, 9])
    assert cache.held == []
    cache.save(tmp_path / "cache")
    assert PromptCache.load(tmp_path / "cache", MODEL).held == []
