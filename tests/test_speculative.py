"""Drafted tokens: the same text as without them, sampled from the same distribution."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import (
    InputError,
    OpenELM,
    OpenELMConfig,
    generate,
    load,
    make_logits_processors,
    make_sampler,
    stream_generate,
)
from mlx_openelm.checkpoint.directory import load_draft
from mlx_openelm.checkpoint.hub import BUNDLED
from mlx_openelm.generation.decoding import generate_step
from mlx_openelm.generation.speculative.draft_length import Kind, Pace
from mlx_openelm.generation.speculative.loop import Speculation, speculative_generate_step
from mlx_openelm.generation.speculative.proposers import PromptLookup
from mlx_openelm.generation.speculative.verify import verify
from mlx_openelm.model.shapes import tensor_shapes
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from .models import EVEN

Demo = tuple[OpenELM, Tokenizer]
PROMPTS = (
    "Once upon a time",
    "The king said to his daughter",
    "the cat and the dog, the cat and the dog, the cat and",
)


class Always(Pace):
    """Drafts as many tokens as it may, each time from the next kind there is."""

    def __init__(self, *lengths: int) -> None:
        super().__init__()
        self.turns = 0
        self.wanted = lengths

    def acceptance(self, kind: Kind) -> float:
        return 1.0

    def choose(self, kinds: Sequence[Kind], longest: int) -> tuple[Kind, int] | None:
        self.turns += 1
        length = min(self.wanted[self.turns % len(self.wanted)], longest)
        return (kinds[self.turns % len(kinds)], length) if length and kinds else None


@pytest.fixture(scope="module")
def draft() -> OpenELM:
    return load("demo-draft")[0]


@pytest.fixture(scope="module")
def sources(draft: OpenELM) -> dict[str, dict[str, Any]]:
    return {
        "model": {"draft_model": draft},
        "lookup": {"prompt_lookup": True},
        "both": {"draft_model": draft, "prompt_lookup": True},
    }


def tiny(vocab_size: int = 8, context: int = 128, strangeness: float = 0.0) -> OpenELM:
    """A random model whose distributions are neither uniform nor certain.

    `strangeness`: how far its matrices are from those of the model with none, as a ratio.
    """
    config = OpenELMConfig.scaled(
        **{**EVEN, "vocab_size": vocab_size}, num_transformer_layers=1, max_context_length=context
    )
    arrays: dict[str, mx.array] = {}
    for i, (name, shape) in enumerate(tensor_shapes(config).items()):
        base, other = (mx.random.normal(shape, key=mx.random.key(2 * i + j)) for j in (0, 1))
        matrix = 0.26 * (base + strangeness * other)
        arrays[name] = matrix if len(shape) == 2 else mx.ones(shape)
    return OpenELM(config, arrays)


def plain(model: OpenELM, prompt: Sequence[int], **options: Any) -> list[int]:
    return [token for token, _ in generate_step(mx.array(prompt), model, **options)]


def drafted(model: OpenELM, prompt: Sequence[int], **options: Any) -> list[int]:
    return [token for token, *_ in speculative_generate_step(mx.array(prompt), model, **options)]


@pytest.mark.parametrize("source", ["model", "lookup", "both"])
@pytest.mark.parametrize("lengths", [(1,), (2, 0, 16), (5, 3), ()])
def test_greedy_tokens_are_those_of_plain_decoding(
    demo: Demo, sources: dict[str, dict[str, Any]], source: str, lengths: tuple[int, ...]
) -> None:
    model, tokenizer = demo
    for text in PROMPTS:
        ids = tokenizer.encode(text)
        statistics = Speculation()
        pace = Always(*lengths) if lengths else None
        tokens = drafted(
            model, ids, max_tokens=40, pace=pace, statistics=statistics, **sources[source]
        )
        assert tokens == plain(model, ids, max_tokens=40)
        assert statistics.tokens == 40
        if lengths and source != "lookup":
            assert 0 < statistics.acceptance < 1
            assert statistics.tokens_per_step > 1


@pytest.mark.parametrize("source", ["model", "lookup", "both"])
def test_a_seed_gives_the_text_that_it_gives_without_drafts(
    demo: Demo, sources: dict[str, dict[str, Any]], source: str
) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode(PROMPTS[2])
    for seed in range(2):
        statistics = Speculation()
        options: dict[str, Any] = {"temp": 0.8, "top_p": 0.9, "top_k": 50, "seed": seed}
        tokens = drafted(
            model,
            ids,
            max_tokens=60,
            sampler=make_sampler(**options),
            pace=Always(4, 1),
            statistics=statistics,
            **sources[source],
        )
        assert tokens == plain(model, ids, max_tokens=60, sampler=make_sampler(**options))
        assert statistics.accepted > 5 or source == "lookup"


def test_a_custom_sampler_is_asked_at_every_position(demo: Demo, draft: OpenELM) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode(PROMPTS[0])

    def second(logprobs: mx.array) -> mx.array:
        return mx.argsort(-logprobs, axis=-1)[:, 1]

    tokens = drafted(model, ids, draft_model=draft, sampler=second, max_tokens=30, pace=Always(3))
    assert tokens == plain(model, ids, sampler=second, max_tokens=30)


@pytest.mark.parametrize("seed", [None, 1])
def test_processors_see_the_text_up_to_each_position(
    demo: Demo, sources: dict[str, dict[str, Any]], seed: int | None
) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode(PROMPTS[2])

    def options() -> dict[str, Any]:
        return {
            "logits_processors": make_logits_processors(
                logit_bias={40: 1.5}, repetition_penalty=1.3, frequency_penalty=0.2
            ),
            "sampler": make_sampler(0.0 if seed is None else 0.7, seed=seed),
            "max_tokens": 60,
        }

    wanted = plain(model, ids, **options())
    assert wanted != plain(model, ids, max_tokens=60)
    for source in sources.values():
        assert drafted(model, ids, **source, **options(), pace=Always(3, 8, 0, 0)) == wanted


def test_each_token_has_its_log_probabilities(demo: Demo, draft: OpenELM) -> None:
    model, tokenizer = demo
    ids = mx.array(tokenizer.encode(PROMPTS[0]))
    ours = list(
        speculative_generate_step(ids, model, draft, max_tokens=30, vocab_size=4000, pace=Always(4))
    )
    theirs = list(generate_step(ids, model, max_tokens=30, vocab_size=4000))
    for (token, logprobs, _), (_, wanted) in zip(ours, theirs, strict=True):
        assert mx.abs(logprobs - wanted).max().item() < 1e-4
        assert mx.argmax(logprobs).item() == token
    assert {from_draft for *_, from_draft in ours} == {True, False}


# The distribution


Rule = Callable[[mx.array, mx.array, mx.array], mx.array]


def biased(p: mx.array, q: mx.array, drafts: mx.array) -> mx.array:
    """As `verify`, but a token that is rejected is drawn again from p: a popular mistake."""
    n = drafts.size
    rows = mx.arange(n)
    holds = mx.random.uniform(shape=(n,)) * q[rows, drafts] < p[rows, drafts]
    others = mx.random.categorical(mx.log(p))
    return mx.concatenate([mx.where(holds, drafts, others[:n]), others[n:]])


def chi_square(counts: Counter[tuple[int, ...]], wanted: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its bound: above 1, the counts don't follow `wanted`.

    The bound is the 1 - 1e-6 quantile of the chi-square distribution (Wilson and Hilferty's
    approximation, 1931). Outcomes expected less than 5 times are counted together.
    """
    draws = sum(counts.values())
    observed, expected, rare = [], [], [0.0, 0.0]
    for outcome, probability in wanted.items():
        if probability * draws < 5:
            rare[0] += counts[outcome]
            rare[1] += probability * draws
        else:
            observed.append(counts[outcome])
            expected.append(probability * draws)
    cells = [*zip(observed, expected, strict=True), *([(rare[0], rare[1])] if rare[1] else [])]
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    freedom = len(cells) - 1
    spread = 2 / (9 * freedom)
    return float(statistic / (freedom * (1 - spread + 4.753 * spread**0.5) ** 3))


def random_probs(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    return rng.dirichlet(np.full(size, 0.7), rows)


@pytest.mark.parametrize(("rule", "follows"), [(verify, True), (biased, False)])
def test_verified_tokens_follow_the_distribution_of_the_model(rule: Rule, follows: bool) -> None:
    rng = np.random.default_rng(1)
    p, q = random_probs(rng, 1, 6), random_probs(rng, 1, 6)
    p_two = np.concatenate([p, random_probs(rng, 1, 6)])
    mx.random.seed(2)

    draws = 20_000
    drafts = mx.random.categorical(mx.log(mx.array(q, mx.float32)), num_samples=draws)[0]
    # The draws at one position are independent, so that positions can stand in for repetitions.
    tokens = rule(
        mx.repeat(mx.array(p_two[:1], mx.float32), draws + 1, axis=0),
        mx.repeat(mx.array(q, mx.float32), draws, axis=0),
        drafts,
    )
    counts = Counter((t,) for t in tokens[:-1].tolist())  # type: ignore[union-attr]
    score = chi_square(counts, {(i,): float(x) for i, x in enumerate(p[0])})
    assert (score < 1) == follows, score


def exact(
    model: OpenELM, prompt: list[int], length: int, scaled: Any
) -> dict[tuple[int, ...], float]:
    """The probability of each continuation of `length` tokens."""
    if length == 0:
        return {(): 1.0}
    logits = model(mx.array([prompt]))[:, -1]
    probs = mx.softmax(scaled(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))[0].tolist()
    return {
        (token, *rest): probability * after
        for token, probability in enumerate(probs)  # type: ignore[arg-type]
        if probability > 0
        for rest, after in exact(model, [*prompt, token], length - 1, scaled).items()
    }


@pytest.mark.parametrize(
    ("source", "rule"),
    [("model", "verify"), ("model", "seeds"), ("lookup", "verify"), ("model", "biased")],
)
def test_sampled_texts_follow_the_distribution_of_the_model(
    source: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tiny(), tiny(strangeness=0.7)
    # Nearly every pair of tokens occurs, so that there is something to copy whatever is drawn.
    prompt = [t for a in range(8) for b in range(a, 8) for t in (a, b)]
    draws, length = 1000, 4
    if rule == "biased":
        monkeypatch.setattr("mlx_openelm.generation.speculative.verify.verify", biased)
    options = {"temp": 1.3, "top_k": 3}
    mx.random.seed(3)
    counts: Counter[tuple[int, ...]] = Counter()
    statistics = Speculation()
    sources = {"draft_model": other} if source == "model" else {"prompt_lookup": True}
    for i in range(draws):
        sampler = make_sampler(**options, seed=i if rule == "seeds" else None)  # type: ignore[arg-type]
        tokens = drafted(
            model,
            prompt,
            max_tokens=length,
            sampler=sampler,
            pace=Always(2),
            statistics=statistics,
            **sources,  # type: ignore[arg-type]
        )
        counts[tuple(tokens)] += 1
    assert 0.05 < statistics.acceptance < 0.95
    assert statistics.accepted > 100
    scaled = make_sampler(**options).scaled  # type: ignore[attr-defined, arg-type]
    score = chi_square(counts, exact(model, prompt, length, scaled))
    assert (score < 1) == (rule != "biased"), score


# Ends and caches


def test_the_context_ends_generation(demo: Demo, sources: dict[str, dict[str, Any]]) -> None:
    model, tokenizer = demo
    ids = (tokenizer.encode("the cat and the dog, ") * 200)[: model.config.max_context_length - 9]
    for source in sources.values():
        tokens = drafted(model, ids, max_tokens=-1, pace=Always(16, 4), **source)
        assert tokens == plain(model, ids, max_tokens=-1)
        assert len(tokens) == 10


def test_a_draft_model_may_have_a_shorter_context() -> None:
    model, other = tiny(32, context=256), tiny(32, context=32)
    tokens = drafted(model, [1, 2, 3], draft_model=other, max_tokens=200, pace=Always(16, 2, 0))
    assert tokens == plain(model, [1, 2, 3], max_tokens=200)


def test_stop_strings_and_end_of_sequence_end_the_text(demo: Demo, draft: OpenELM) -> None:
    model, tokenizer = demo
    whole = generate(model, tokenizer, PROMPTS[0], max_tokens=40)
    for options in (
        {"stop": whole[30:36]},
        {"logits_processors": make_logits_processors(logit_bias={tokenizer.eos_token_id: 9.0})},
    ):
        alone = list(stream_generate(model, tokenizer, PROMPTS[0], 60, **options))  # type: ignore[arg-type]
        with_draft = list(
            stream_generate(
                model,
                tokenizer,
                PROMPTS[0],
                60,
                draft_model=draft,
                pace=Always(4),
                **options,  # type: ignore[arg-type]
            )
        )
        assert [r.token for r in alone] == [r.token for r in with_draft]
        assert [r.text for r in alone] == [r.text for r in with_draft]
        assert with_draft[-1].finish_reason == "stop"


def test_a_cache_that_is_left_holds_what_was_given(demo: Demo, draft: OpenELM) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode(PROMPTS[0])
    wanted = plain(model, ids, max_tokens=40)
    for count in range(1, 9):
        cache = model.make_cache()
        steps = speculative_generate_step(
            mx.array(ids), model, draft, prompt_cache=cache, pace=Always(4)
        )
        tokens = [token for token, *_ in islice(steps, count)]
        steps.close()
        assert tokens == wanted[:count]
        assert len(ids) + count - 1 <= cache.offset <= len(ids) + count
        cache.trim(cache.offset - (len(ids) + count - 1))
        more = plain(model, tokens[-1:], prompt_cache=cache, max_tokens=20)
        assert more == wanted[count : count + 20]


def test_responses_tell_what_drafts_brought(demo: Demo, draft: OpenELM) -> None:
    model, tokenizer = demo
    responses = list(
        stream_generate(model, tokenizer, PROMPTS[0], 40, draft_model=draft, pace=Always(4))
    )
    speculation = responses[-1].speculation
    assert speculation is not None
    assert speculation.tokens == 40
    assert speculation.accepted == sum(r.from_draft for r in responses)
    assert speculation.steps + speculation.accepted == 40
    assert next(stream_generate(model, tokenizer, PROMPTS[0], 1)).speculation is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kv_size": 64}, "can't be combined with a context that slides"),
        ({"num_draft_tokens": 0}, "num_draft_tokens must be at least 1, not 0"),
        ({"draft_model": tiny(8)}, "the draft model knows 8 tokens, the model 4096"),
    ],
)
def test_bad_input_is_refused(demo: Demo, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(*demo, PROMPTS[0], **{"prompt_lookup": True, **options})


def test_a_draft_model_must_have_the_tokenizer(demo: Demo, tmp_path: Path) -> None:
    _, tokenizer = demo
    other = tmp_path / "other"
    shutil.copytree(BUNDLED["demo-draft"], other)
    config = json.loads((other / "config.json").read_text())
    pieces = bytearray((other / "tokenizer.model").read_bytes())
    at = pieces.index("▁the".encode())
    pieces[at + 3 : at + 6] = b"teh"
    (other / "tokenizer.model").write_bytes(pieces)
    (other / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="its tokenizer is not the model's .token .* instead of"):
        load_draft(other, tokenizer)
    for file in other.glob("tokenizer*"):
        file.unlink()
    assert load_draft(other, tokenizer).config.vocab_size == config["vocab_size"]


# Prompt lookup


def test_lookup_copies_what_followed_the_longest_end_seen_before() -> None:
    lookup = PromptLookup([1, 2, 3, 9, 5, 2, 3, 7, 8, 1, 2, 3])
    assert lookup.draft(3) == [9, 5, 2]  # after 1 2 3, not after 2 3
    lookup.extend([4])
    assert lookup.kind() is None
    lookup.extend([2, 3])
    assert lookup.draft(2) == [4, 2]  # the latest 2 3


def test_lookup_goes_on_with_a_loop() -> None:
    assert PromptLookup([7, 1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]
    assert PromptLookup([5, 5, 5]).draft(4) == [5, 5, 5, 5]


def test_lookup_of_a_repeated_passage_holds_for_long(demo: Demo) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode("and the wind said: " + PROMPTS[2] * 3)
    statistics = Speculation()
    drafted(model, ids, prompt_lookup=True, max_tokens=40, pace=Always(8), statistics=statistics)
    assert statistics.drafted > 0
