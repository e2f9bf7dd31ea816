"""Many sequences at once give what each gives by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import (
    InputError,
    OpenELM,
    batch_generate,
    generate,
    make_logits_processors,
    make_sampler,
    stream_generate,
)
from mlx_openelm.generation.batching import batch_generate_step
from mlx_openelm.generation.decoding import generate_step
from mlx_openelm.generation.sampling import LogitsProcessor
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from . import bounds

Demo = tuple[OpenELM, Tokenizer]
PROMPTS = [
    "Once upon a time",
    "The king said to his daughter that",
    "There",
    "The old witch lived in a house at the end of the wood, and nobody who went there",
]


def alone(demo: Demo, prompt: str, max_tokens: int, **options: object) -> str:
    return generate(*demo, prompt, max_tokens=max_tokens, **options)


@pytest.mark.parametrize("size", [1, 3, 32])
def test_each_sequence_is_what_it_is_alone(demo: Demo, size: int) -> None:
    limits = [3, 40, 17, 25]
    response = batch_generate(*demo, PROMPTS, max_tokens=limits, completion_batch_size=size)
    assert response.texts == [alone(demo, p, n) for p, n in zip(PROMPTS, limits, strict=True)]
    assert [len(ids) for ids in response.token_ids] == limits
    assert response.finish_reasons == ["length"] * 4
    assert response.stats.generation_tokens == sum(limits)
    assert response.stats.prompt_tokens == sum(len(demo[1].encode(p)) for p in PROMPTS)
    assert response.stats.generation_tps > 0


def test_prompts_in_chunks_and_ids(demo: Demo) -> None:
    ids = [demo[1].encode(p) for p in PROMPTS]
    response = batch_generate(*demo, ids, max_tokens=12, prefill_step_size=4)
    assert response.texts == [alone(demo, p, 12) for p in PROMPTS]


def test_stop_strings_and_eos_end_one_sequence(demo: Demo) -> None:
    stop = alone(demo, PROMPTS[0], 20)[8:14]
    response = batch_generate(*demo, PROMPTS, max_tokens=20, stop=[stop])
    assert response.texts == [alone(demo, p, 20, stop=[stop]) for p in PROMPTS]
    assert response.finish_reasons[0] == "stop"
    bias = make_logits_processors(logit_bias={demo[1].eos_token_id: 1e4})
    ended = batch_generate(*demo, PROMPTS, max_tokens=20, logits_processors=bias)
    assert ended.texts == [""] * 4
    assert ended.finish_reasons == ["stop"] * 4


def test_processors_see_their_own_sequence(demo: Demo) -> None:
    penalty = make_logits_processors(repetition_penalty=1.7)
    response = batch_generate(*demo, PROMPTS, max_tokens=[30, 4, 30, 9], logits_processors=penalty)
    for prompt, text, n in zip(PROMPTS, response.texts, [30, 4, 30, 9], strict=True):
        assert text == alone(demo, prompt, n, logits_processors=penalty)


def test_processors_change_the_row_whose_tokens_they_see(demo: Demo) -> None:
    """Also after rows have left the batch, and others have moved up."""

    def spy(seen: dict[tuple[int, ...], mx.array]) -> LogitsProcessor:
        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            seen[tuple(tokens.tolist())] = logits  # type: ignore[arg-type]
            return logits

        return process

    limits = [2, 12, 2, 12]
    together: dict[tuple[int, ...], mx.array] = {}
    batch_generate(*demo, PROMPTS, max_tokens=limits, logits_processors=[spy(together)])
    for prompt, limit in zip(PROMPTS, limits, strict=True):
        by_itself: dict[tuple[int, ...], mx.array] = {}
        alone(demo, prompt, limit, logits_processors=[spy(by_itself)])
        assert len(by_itself) == limit
        for text, logits in by_itself.items():
            assert mx.allclose(together[text], logits, atol=1e-3).item()


def test_the_next_step_is_built_before_tokens_are_waited_for(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = demo[0], 0
    monkeypatch.setattr(model, "policy", replace(model.policy, native=False))
    step = model.step

    def counted(*arguments: Any, **options: Any) -> mx.array:
        nonlocal steps
        steps += 1
        return step(*arguments, **options)

    monkeypatch.setattr(model, "step", counted)
    prompts = [mx.array([1, 7, 9]), mx.array([1, 5])]
    assert [steps for _ in batch_generate_step(prompts, model, [4, 4])] == [2, 3, 4, 4]
    steps = 0
    # One text's first token is given out before.
    assert [steps for _ in generate_step(prompts[0], model, max_tokens=5)] == [1, 3, 4, 5, 5]


def test_sequences_are_sampled_apart_without_a_seed(demo: Demo) -> None:
    def texts() -> list[str]:
        mx.random.seed(3)
        return batch_generate(
            *demo, [PROMPTS[0]] * 4, max_tokens=20, sampler=make_sampler(1.0)
        ).texts

    assert texts() == texts()
    assert len(set(texts())) == 4


@pytest.mark.parametrize("size", [1, 3, 32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.9, "top_k": 50, "min_p": 0.01},
        {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    ],
    ids=str,
)
def test_a_seeded_text_is_its_own_whoever_else_is_in_the_batch(
    demo: Demo, size: int, options: dict[str, float]
) -> None:
    sampler = make_sampler(1.0, seed=7, **options)  # type: ignore[arg-type]
    limits = [3, 20, 17, 25]
    wanted = [alone(demo, p, n, sampler=sampler) for p, n in zip(PROMPTS, limits, strict=True)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 1], [2]):
        prompts, most = [PROMPTS[i] for i in order], [limits[i] for i in order]
        response = batch_generate(
            *demo, prompts, max_tokens=most, completion_batch_size=size, sampler=sampler
        )
        assert response.texts == [wanted[i] for i in order]


def test_the_context_ends_each_sequence_by_itself(demo: Demo) -> None:
    context = demo[0].config.max_context_length
    prompts = [[1] * (context - 5), [1, 7, 9]]
    response = batch_generate(*demo, prompts, max_tokens=40)
    assert [len(ids) for ids in response.token_ids] == [6, 40]
    wanted = [r.token for r in stream_generate(*demo, [1, 7, 9], max_tokens=40)]
    assert response.token_ids[1] == wanted


def test_nothing_in_nothing_out(demo: Demo) -> None:
    assert batch_generate(*demo, []).texts == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([""], {}, "the prompt is empty"),
        ([[1], []], {}, "prompt 1: the prompt is empty"),
        (
            [[1] * 1025],
            {},
            "prompt 0 has 1025 tokens; from 1 to 1024 are possible in the model's context of 1024",
        ),
        (["a"], {"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        (["a"], {"max_tokens": [1, 2]}, "max_tokens has 2 entries for 1 prompts"),
        (["a"], {"completion_batch_size": 0}, "completion_batch_size must be at least 1"),
    ],
)
def test_bad_input_is_refused(
    demo: Demo, prompts: list[object], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        batch_generate(*demo, prompts, **options)  # type: ignore[arg-type]


def test_a_sliding_cache_takes_one_length(demo: Demo) -> None:
    with pytest.raises(InputError, match="sequences of one length"):
        demo[0].make_cache(64, lengths=[1, 2])
    cache = demo[0].make_cache(lengths=[3, 3])
    assert cache.starts is None
    assert cache.room() == demo[0].config.max_context_length
    demo[0](mx.array([[1, 2, 3], [1, 4, 5]]), cache)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_batch_goes_on_from_caches_and_leaves_them_alone(demo: Demo, kv_bits: int | None) -> None:
    model, tokenizer = demo
    caches = [[model.make_cache(kv_bits=kv_bits)] for _ in range(3)]
    for cache, prompt in zip(caches, PROMPTS, strict=False):
        generate(model, tokenizer, prompt, max_tokens=5, prompt_cache=cache)
    lengths = [cache[0].offset for cache in caches]
    more = [tokenizer.encode(p, add_special_tokens=False) for p in (" and", " who had", ",")]
    response = batch_generate(model, tokenizer, more, caches, max_tokens=9)
    assert [cache[0].offset for cache in caches] == lengths
    alone_texts = [
        generate(model, tokenizer, prompt, max_tokens=9, prompt_cache=cache)
        for prompt, cache in zip(more, caches, strict=True)
    ]
    assert response.texts == alone_texts
    first = batch_generate(model, tokenizer, PROMPTS[:2], [None, None], max_tokens=6)
    assert first.texts == [alone(demo, p, 6) for p in PROMPTS[:2]]


def test_caches_and_logprobs_of_a_batch_are_those_of_its_sequences(demo: Demo) -> None:
    model, tokenizer = demo
    layers = model.config.num_transformer_layers
    response = batch_generate(
        model,
        tokenizer,
        PROMPTS,
        max_tokens=[3, 12, 7, 12],
        return_prompt_caches=True,
        return_logprobs=True,
    )
    assert response.caches is not None and response.logprobs is not None
    for prompt, ids, (cache,), logprobs in zip(
        PROMPTS, response.token_ids, response.caches, response.logprobs, strict=True
    ):
        text = [*tokenizer.encode(prompt), *ids]
        fresh = model.make_cache()
        logits = model(mx.array([text]), fresh)[0]
        assert cache.offset == len(text)
        for name, array in cache.state.items():
            found, wanted = bounds.numbers(array), bounds.numbers(fresh.state[name])
            bounds.assert_alike(found, wanted, bounds.rms(wanted), model.dtype, layers)
        known = bounds.numbers(logits[len(text) - len(ids) - 1 : -1, : tokenizer.vocab_size])
        sums = np.logaddexp.reduce(known, axis=-1)
        wanted = known[np.arange(len(ids)), ids] - sums
        bounds.assert_alike(np.array(logprobs), wanted, bounds.rms(known), model.dtype, layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_caches": [[]]}, "prompt_cache must be"),
        ({"prompt_caches": []}, "prompt_caches has 0 entries for 1 prompts"),
        ({"prefill_batch_size": 0}, "prefill_batch_size must be at least 1"),
        ({"max_kv_size": 64}, "max_kv_size isn't supported for a batch"),
        ({"stream": 1}, "stream isn't supported"),
    ],
)
def test_what_a_batch_does_not_take_is_refused(
    demo: Demo, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        batch_generate(*demo, ["a"], **options)  # type: ignore[arg-type]
