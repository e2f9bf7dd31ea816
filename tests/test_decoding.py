"""The loop: what comes out, when it ends, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import (
    InputError,
    OpenELM,
    batch_generate,
    generate,
    load,
    make_logits_processors,
    make_sampler,
    stream_generate,
)
from mlx_openelm.generation.decoding import generate_step, prefill
from mlx_openelm.generation.options import Keywords, Options
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from . import bounds
from .models import CONFIGS, random_model

Demo = tuple[OpenELM, Tokenizer]
PROMPT = "Once upon a time"


def test_greedy_tokens_are_the_argmax_of_whole_passes(demo: Demo) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode(PROMPT)
    wanted = list(ids)
    for _ in range(20):
        wanted.append(int(mx.argmax(model(mx.array([wanted]))[0, -1]).item()))
    responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=20))
    assert [r.token for r in responses] == wanted[len(ids) :]
    assert "".join(r.text for r in responses) == tokenizer.decode(wanted[len(ids) :])
    assert generate(model, tokenizer, ids, max_tokens=20) == tokenizer.decode(wanted[len(ids) :])


def test_responses_have_the_fields_and_values_of_mlx_lm(demo: Demo) -> None:
    model, tokenizer = demo
    responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=7))
    assert [r.generation_tokens for r in responses] == list(range(1, 8))
    assert [r.finish_reason for r in responses] == [None] * 6 + ["length"]
    last = responses[-1]
    assert last.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert last.prompt_tps > 0
    assert last.generation_tps > 0
    assert last.peak_memory > model.nbytes / 1e9
    assert last.from_draft is False
    assert last.logprobs.shape == (tokenizer.vocab_size,)
    # Each is rounded when it is subtracted, and so is what is subtracted from all of them.
    logprobs = bounds.numbers(last.logprobs)
    normalizer = bounds.rounding(last.logprobs.dtype) * np.abs(logprobs).max()
    assert np.log(np.exp(logprobs).sum()) == pytest.approx(0, abs=max(1e-5, 2 * normalizer))
    assert mx.argmax(last.logprobs).item() == last.token


def test_the_prompt_may_be_text_ids_or_an_array(demo: Demo) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode(PROMPT)
    texts = [
        generate(model, tokenizer, prompt, max_tokens=8)
        for prompt in (PROMPT, ids, mx.array(ids), "<s>" + PROMPT)
    ]
    assert len(set(texts)) == 1


def test_prefill_in_chunks_gives_the_same_text(demo: Demo) -> None:
    model, tokenizer = demo
    prompt = "There was once a king, and he had a daughter. " * 20
    chunked = generate(model, tokenizer, prompt, max_tokens=12, prefill_step_size=17)
    assert chunked == generate(model, tokenizer, prompt, max_tokens=12)


def test_prefill_makes_no_logits_but_the_last(demo: Demo) -> None:
    model, _ = demo
    logits = prefill(model, mx.array([1] * 40), model.make_cache(), step_size=16)
    assert logits.shape == (1, model.config.vocab_size)


def test_progress_counts_the_prompt(demo: Demo) -> None:
    model, tokenizer = demo
    seen: list[tuple[int, int]] = []
    generate(
        model,
        tokenizer,
        [1] * 40,
        max_tokens=1,
        prefill_step_size=16,
        prompt_progress_callback=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 40) for done in (0, 16, 32, 40)]


def test_a_seed_decides_the_text(demo: Demo) -> None:
    model, tokenizer = demo

    def text(seed: int) -> str:
        sampler = make_sampler(0.9, top_p=0.95, seed=seed)
        return generate(model, tokenizer, PROMPT, max_tokens=25, sampler=sampler)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stop_strings_end_the_text_before_them(demo: Demo) -> None:
    model, tokenizer = demo
    whole = generate(model, tokenizer, PROMPT, max_tokens=40)
    stop = whole[11:17]
    assert whole.index(stop) == 11
    responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=40, stop=[stop, "\0"]))
    assert "".join(r.text for r in responses) == whole[:11]
    assert responses[-1].finish_reason == "stop"
    assert len(responses) < 40
    assert generate(model, tokenizer, PROMPT, max_tokens=40, stop=stop) == whole[:11]


def test_an_end_of_sequence_token_ends_the_text(demo: Demo) -> None:
    model, tokenizer = demo
    bias = make_logits_processors(logit_bias={tokenizer.eos_token_id: 1e4})
    responses = list(stream_generate(model, tokenizer, PROMPT, logits_processors=bias))
    assert len(responses) == 1
    assert responses[0].finish_reason == "stop"
    assert responses[0].text == ""


def test_processors_see_prompt_and_generated_tokens(demo: Demo) -> None:
    model, tokenizer = demo
    seen: list[list[int]] = []

    def spy(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())  # type: ignore[arg-type]
        return logits

    responses = list(
        stream_generate(model, tokenizer, PROMPT, max_tokens=4, logits_processors=[spy])
    )
    ids, made = tokenizer.encode(PROMPT), [r.token for r in responses]
    assert seen == [ids + made[:n] for n in range(4)]


def test_ids_beyond_the_tokenizer_are_never_sampled() -> None:
    model = random_model(CONFIGS["uneven"])
    steps = generate_step(
        mx.array([1, 2]), model, max_tokens=300, vocab_size=40, sampler=make_sampler(5.0, seed=0)
    )
    tokens = [token for token, logprobs in steps if logprobs.shape == (40,)]
    assert len(tokens) == 300
    assert max(tokens) == 39


def test_the_context_ends_generation(demo: Demo) -> None:
    model, tokenizer = demo
    limit = model.config.max_context_length
    responses = list(stream_generate(model, tokenizer, [1] * (limit - 3), max_tokens=50))
    assert len(responses) == 4
    assert responses[-1].finish_reason == "length"
    with pytest.raises(InputError, match=f"prompt has {limit + 1} tokens, more than the {limit}"):
        generate(model, tokenizer, [1] * (limit + 1))


def test_a_sliding_context_goes_on(demo: Demo) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode("The king said to his daughter that she should go. " * 30)
    assert len(ids) > 200
    responses = list(stream_generate(model, tokenizer, ids, max_tokens=150, max_kv_size=64))
    assert len(responses) == 150


def test_a_cache_carries_what_came_before(demo: Demo) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode("Once upon a time there was a poor woodcutter")
    cache = model.make_cache()
    prefill(model, mx.array(ids[:6]), cache)
    continued = generate(model, tokenizer, ids[6:], max_tokens=10, prompt_cache=cache)
    assert continued == generate(model, tokenizer, ids, max_tokens=10)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([5000], {}, "token id 5000 is not below the model's 4096"),
        ([-1], {}, "token id -1"),
        (PROMPT, {"max_tokens": 0}, "max_tokens must be at least 1"),
        (PROMPT, {"max_tokens": -2}, "max_tokens must be at least 1"),
        (PROMPT, {"stop": [""]}, "stop string must not be empty"),
        (PROMPT, {"max_kv_size": 3}, "max_kv_size must be more than 4"),
        (PROMPT, {"prefill_step_size": 0}, "prefill_step_size must be at least 1"),
    ],
)
def test_bad_input_is_refused(
    demo: Demo, prompt: str | list[int], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(*demo, prompt, **options)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens": ({"max_tokens": 0}, "max_tokens must be"),
    "prefill_step_size": ({"prefill_step_size": 0}, "prefill_step_size must be"),
    "num_draft_tokens": ({"num_draft_tokens": 0}, "num_draft_tokens must be"),
    "sampler": ({"sampler": 0.7}, "sampler must be a function"),
    "logits_processors": ({"logits_processors": [0.7]}, "logits_processors must be a list"),
    "prompt_progress_callback": ({"prompt_progress_callback": True}, "prompt_progress_callback"),
    "max_kv_size": ({"max_kv_size": 4}, "max_kv_size must be more than 4"),
    "kv_bits": ({"kv_bits": 5}, "kv_bits must be"),
    "kv_group_size": ({"kv_bits": 8, "kv_group_size": 48}, "kv_group_size must be"),
    "quantized_kv_start": ({"kv_bits": 8, "quantized_kv_start": -1}, "quantized_kv_start must be"),
    "input_embeddings": (
        {"input_embeddings": mx.zeros((1, 8))},
        "input_embeddings isn't supported",
    ),
    "stream": ({"stream": mx.default_device()}, "stream isn't supported"),
    "prompt_cache": ({"prompt_cache": {}}, "prompt_cache must be"),
    "an empty prompt_cache": ({"prompt_cache": []}, "prompt_cache must be"),
    "sliding drafts": ({"max_kv_size": 64, "prompt_lookup": True}, "speculative decoding can't"),
    "stop": ({"stop": ""}, "a stop string must not be empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_by_name_at_the_call(demo: Demo, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        stream_generate(*demo, PROMPT, **options)  # nothing asks for a token
    if case not in ("max_tokens", "num_draft_tokens", "sliding drafts", "stop"):
        with pytest.raises(InputError, match=message):
            generate_step(mx.array([1, 2]), demo[0], **options)


def test_unknown_options_are_refused_by_name_at_the_call(demo: Demo) -> None:
    model, tokenizer = demo
    calls: list[Callable[[], object]] = [
        lambda: stream_generate(model, tokenizer, PROMPT, temperature=0.5),  # type: ignore[call-arg]
        lambda: generate(model, tokenizer, PROMPT, temperature=0.5),  # type: ignore[call-arg]
        lambda: generate_step(mx.array([1]), model, temperature=0.5),  # type: ignore[call-arg]
        lambda: batch_generate(model, tokenizer, [PROMPT], temperature=0.5),  # type: ignore[call-arg]
        lambda: load("demo", temperature=0.5),  # type: ignore[call-overload]
    ]
    for call in calls:
        with pytest.raises(TypeError, match="temperature"):
            call()


def test_the_keywords_are_the_options() -> None:
    positional = {"max_tokens", "draft_model", "stream"}
    assert {field.name for field in fields(Options)} == positional | set(Keywords.__annotations__)


@pytest.mark.parametrize("bad", [np.array([[1, 2]]), np.array([1.5]), ["a"], [None], 5.0, [[1]]])
def test_prompts_that_are_no_ids_are_refused(demo: Demo, bad: Any) -> None:
    with pytest.raises(InputError, match="the prompt must be a (flat )?sequence of"):
        stream_generate(*demo, bad)


def test_prompts_may_be_arrays_of_any_library(demo: Demo) -> None:
    ids = demo[1].encode(PROMPT)
    for prompt in (np.array(ids), np.array(ids, np.uint16), mx.array(ids, mx.uint32), tuple(ids)):
        assert generate(*demo, prompt, max_tokens=5) == generate(*demo, PROMPT, max_tokens=5)


def test_a_cache_of_another_model_is_refused(demo: Demo) -> None:
    other = random_model(CONFIGS["uneven"])
    with pytest.raises(InputError, match="another geometry or dtype"):
        stream_generate(*demo, PROMPT, prompt_cache=other.make_cache())
    arrays = other.parameters()
    arrays["transformer.norm.weight"] = -arrays["transformer.norm.weight"]
    changed = OpenELM(other.config, arrays)
    with pytest.raises(InputError, match="the prompt cache is another model's"):
        generate_step(mx.array([1, 2]), changed, prompt_cache=other.make_cache())
    generate_step(
        mx.array([1, 2]), OpenELM(other.config, other.parameters()), prompt_cache=other.make_cache()
    )


def test_options_that_contradict_the_cache_are_refused(demo: Demo) -> None:
    model, tokenizer = demo
    with pytest.raises(InputError, match="max_kv_size=64 can't be given with a prompt_cache"):
        stream_generate(*demo, PROMPT, prompt_cache=model.make_cache(), max_kv_size=64)
    with pytest.raises(InputError, match="quantized to 8 bits in groups of 64 already"):
        stream_generate(*demo, PROMPT, prompt_cache=model.make_cache(kv_bits=8), kv_bits=4)
    with pytest.raises(InputError, match="speculative decoding can't be combined"):
        stream_generate(*demo, PROMPT, prompt_cache=model.make_cache(64), prompt_lookup=True)
    cache = model.make_cache()
    generate(model, tokenizer, PROMPT, max_tokens=4, prompt_cache=cache)
    generate(model, tokenizer, [5], max_tokens=4, prompt_cache=cache, kv_bits=8)
    assert cache.scheme is not None and cache.scheme.bits == 8


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": True}])
def test_a_cache_is_quantized_once_it_is_long_enough(demo: Demo, options: dict[str, Any]) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode(PROMPT)
    for start, quantized in ((len(ids) + 3, True), (len(ids) + 30, False)):
        cache = model.make_cache()
        text = generate(
            model,
            tokenizer,
            ids,
            max_tokens=12,
            prompt_cache=cache,
            kv_bits=8,
            kv_group_size=32,
            quantized_kv_start=start,
            **options,
        )
        assert (cache.scheme is not None) == quantized
        assert cache.offset == len(ids) + 12
    assert text == generate(model, tokenizer, ids, max_tokens=12)


def test_reading_a_prompt_gives_no_token(demo: Demo) -> None:
    cache = demo[0].make_cache()
    assert list(generate_step(mx.array([1, 5, 7]), demo[0], max_tokens=0, prompt_cache=cache)) == []
    assert cache.offset == 3


def test_verbose_prints_text_and_speed(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(*demo, PROMPT, verbose=True, max_tokens=5)
    printed = capsys.readouterr().out
    assert printed.startswith(text + "\n")
    assert "Generation: 5 tokens, " in printed
