"""Ids from outside never become an index that nothing has checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import (
    InputError,
    OpenELM,
    OpenELMConfig,
    batch_generate,
    generate,
    make_logits_processors,
    make_sampler,
    stream_generate,
)
from mlx_openelm.generation.batching import batch_generate_step
from mlx_openelm.generation.decoding import generate_step
from mlx_openelm.generation.sampling import occurrences
from mlx_openelm.generation.speculative.loop import speculative_generate_step
from mlx_openelm.model.token_ids import as_token_ids
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from .models import CONFIGS, EVEN, random_model
from .test_speculative import Always

Demo = tuple[OpenELM, Tokenizer]
VOCAB = CONFIGS["uneven"].vocab_size


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_prompts_may_be_numpy_arrays(demo: Demo, dtype: Any) -> None:
    ids = [1, 53, 28, 99]
    wanted = generate(*demo, ids, max_tokens=5)
    array = np.array(ids, dtype)
    assert generate(*demo, array, max_tokens=5) == wanted
    assert generate(*demo, np.repeat(array, 2)[::2], max_tokens=5) == wanted
    assert generate(*demo, list(array), max_tokens=5) == wanted
    assert generate(*demo, tuple(ids), max_tokens=5) == wanted
    assert batch_generate(*demo, [array, ids], max_tokens=5).texts == [wanted] * 2
    assert batch_generate(*demo, np.array([ids, ids], dtype), max_tokens=5).texts == [wanted] * 2
    assert generate(*demo, mx.array(array), max_tokens=5) == wanted


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.0], "holds a float"),
        ([True], "holds a bool"),
        (np.array([1.5]), "holds a float"),
        (np.array([True]), "holds a bool"),
        (mx.array([1.0]), "holds a float"),
        (mx.array([True]), "holds a bool"),
        ([[1, 2]], "holds a list; give each sequence by itself"),
        (np.array([[1, 2]]), "holds a list"),
        (mx.array([[1, 2]]), "holds a list"),
        ([None], "holds a NoneType"),
        (["1"], "holds a str"),
        (b"abc", "must be a sequence of token ids, not bytes"),
        (3, "must be a sequence of token ids, not int"),
        (mx.array(3), "must be a sequence of token ids, not array"),
        (None, "must be a sequence of token ids, not NoneType"),
        ([-1], "token id -1 is negative"),
        ([2**31], "token id 2147483648 is not below"),
        ([2**63], "token id 9223372036854775808 is not below"),
        ([-(2**70)], "token id of 71 bits is negative"),
        ([10**5000], "token id of 16610 bits is not below"),
        (np.array([2**64 - 1], np.uint64), "token id 18446744073709551615 is not below"),
        (np.array([-1], np.int8), "token id -1 is negative"),
        (mx.array([4096]), "token id 4096 is not below the model's 4096"),
    ],
)
def test_what_is_no_sequence_of_ids_is_refused(demo: Demo, ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_token_ids(ids, 4096)
    with pytest.raises(InputError, match=message):
        generate(*demo, ids, max_tokens=1)
    with pytest.raises(InputError, match=message):
        batch_generate(*demo, [[1, 2], ids], max_tokens=1)


@pytest.mark.parametrize("empty", ["", [], (), np.array([], np.int32), mx.array([], mx.int32)])
def test_an_empty_prompt_is_refused(demo: Demo, empty: Any) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(*demo, empty, max_tokens=1)
    with pytest.raises(InputError, match="prompt is empty|prompt 0 has 0 tokens"):
        batch_generate(*demo, [empty], max_tokens=1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (mx.array([[VOCAB]]), f"token id {VOCAB} is not one of the model's {VOCAB}"),
        (mx.array([[1, -1]]), "token id -1 is not one of"),
        (mx.array([[2**31]], mx.uint32), "token id 2147483648"),
        (mx.array([[1.0]]), "tokens must be integers, not mlx.core.float32"),
        (mx.array([[True]]), "tokens must be integers"),
        (mx.array([1]), r"tokens must have the shape \[B, L\], not \[1\]"),
        (mx.zeros((1, 0), mx.int32), r"not \[1, 0\]"),
        ([[1]], "tokens must be an MLX array"),
    ],
    ids=str,
)
def test_a_model_refuses_what_are_no_tokens_of_its(tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_model(CONFIGS["uneven"])(tokens)


def test_the_loops_refuse_ids_that_the_model_does_not_have() -> None:
    model, draft = random_model(CONFIGS["uneven"]), random_model(CONFIGS["scaled"])
    good, bad = mx.array([1, 2]), mx.array([1, VOCAB])
    for prompt in (bad, mx.array([-1])):
        with pytest.raises(InputError, match="token id"):
            generate_step(prompt, model)
        with pytest.raises(InputError, match="token id"):
            speculative_generate_step(prompt, model, draft)
    with pytest.raises(InputError, match="token id"):
        next(iter(batch_generate_step([good, bad], model, [1, 1])))


def test_a_draft_model_with_fewer_tokens_than_the_prompt_has() -> None:
    """The model has rows that neither the tokenizer nor the draft model knows."""
    values = {**EVEN, "num_transformer_layers": 2}
    model = random_model(OpenELMConfig.scaled(**{**values, "vocab_size": 4096}))
    draft = random_model(OpenELMConfig.scaled(**values), seed=1)
    read: list[int] = []
    inner = draft.step
    draft.step = lambda t, *rest, **more: (read.extend(t[0].tolist()), inner(t, *rest, **more))[1]  # type: ignore[method-assign, assignment, misc]
    prompt = mx.array([1, 4000, 5, 4095])
    options: dict[str, Any] = {"max_tokens": 30, "vocab_size": 96}
    wanted = [token for token, _ in generate_step(prompt, model, **options)]
    steps = speculative_generate_step(prompt, model, draft, pace=Always(3), **options)
    assert [token for token, *_ in steps] == wanted
    assert read and max(read) < 96


BEYOND = [1, VOCAB - 1, 40, 77, -1, -40, -1000, 2**31 - 1, VOCAB, 3]


@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint32])
@pytest.mark.parametrize("width", [1, 4, 40])
def test_penalties_ignore_ids_that_the_logits_do_not_have(width: int, dtype: mx.Dtype) -> None:
    """Before, such ids read and wrote beyond the logits; negative ones counted from the end."""
    logits = mx.random.normal((1, width))
    ids = [i for i in BEYOND if i >= 0 or dtype != mx.uint32]
    tokens = mx.array(ids, dtype)
    inside = [i for i in ids if 0 <= i < width]
    assert occurrences(tokens, width).tolist() == [float(inside.count(i)) for i in range(width)]
    around = mx.arange(100_000) * 1.0  # what a stray write would hit, sooner or later
    for options in (
        {"repetition_penalty": 1.5},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
    ):
        (process,) = make_logits_processors(**options)  # type: ignore[arg-type]
        changed = process(tokens, logits)
        assert changed.tolist() == process(mx.array(inside, dtype), logits).tolist()
        same = [i not in inside for i in range(width)]
        assert np.array(changed)[0][same].tolist() == np.array(logits)[0][same].tolist()
        if inside:
            assert changed.tolist() != logits.tolist()
    assert mx.array_equal(around, mx.arange(100_000) * 1.0).item()


@pytest.mark.parametrize("size", [10**30, 2**31, 1])
def test_a_context_of_any_size_is_recent(size: int) -> None:
    (process,) = make_logits_processors(presence_penalty=1.0, presence_context_size=size)
    penalised = {3} if size == 1 else {1, 3}
    changed = process(mx.array([1, 3]), mx.zeros((1, 5)))[0].tolist()
    assert {i for i, logit in enumerate(changed) if logit} == penalised


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({-1: 1.0}, "at least 0"),
        ({-(2**70): 1.0}, "at least 0"),
        ({1.5: 1.0}, "a token id of logit_bias"),
        ({"1": 1.0}, "a token id of logit_bias"),
        ({True: 1.0}, "a token id of logit_bias"),
        ({1: float("nan")}, "logit_bias of 1 must be a number or -inf, not nan"),
        ({1: float("inf")}, "logit_bias of 1 must be a number or -inf, not inf"),
    ],
    ids=str,
)
def test_a_bias_that_makes_no_sense_is_refused(bias: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_logits_processors(logit_bias=bias)


@pytest.mark.parametrize("token", [5, 2**31, 2**63, 10**30])
def test_a_bias_for_an_id_that_the_logits_do_not_have_is_refused(token: int) -> None:
    (process,) = make_logits_processors(logit_bias={2: 1.0, token: 1.0})
    with pytest.raises(InputError, match="logit_bias must be for ids below 5"):
        process(mx.array([1]), mx.zeros((1, 5)))


@pytest.mark.parametrize("token", [-1, 4096, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup": True}], ids=str)
def test_a_token_that_a_sampler_invents_is_refused(
    demo: Demo, token: int, options: dict[str, Any]
) -> None:
    turns = iter(range(1000))

    def sampler(logprobs: mx.array) -> mx.array:
        fine = mx.argmax(logprobs, axis=-1)
        return fine if next(turns) < 3 else mx.full(fine.shape, token, mx.int32)

    responses = []
    with pytest.raises(InputError, match="the sampler gave a token that isn't in the vocabulary"):
        responses += stream_generate(*demo, "The wolf", sampler=sampler, **options)
    with pytest.raises(InputError, match="the sampler gave a token"):
        batch_generate(*demo, ["The wolf", "A king"], max_tokens=9, sampler=sampler)


@pytest.mark.parametrize(
    "wrong", [lambda p: 3, lambda p: mx.array(3), lambda p: mx.array([1.0]), lambda p: p], ids=str
)
def test_a_sampler_that_returns_no_tokens_is_refused(demo: Demo, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"a sampler must return integers \[1\]"):
        generate(*demo, "The wolf", sampler=wrong)


@pytest.mark.parametrize("wrong", [lambda t, x: x[0], lambda t, x: None, lambda t, x: x[:, :9]])
def test_a_processor_that_returns_no_logits_is_refused(demo: Demo, wrong: Any) -> None:
    with pytest.raises(InputError, match="a logits processor must return logits"):
        generate(*demo, "The wolf", logits_processors=[wrong])


@pytest.mark.parametrize("rows", [[2], [-1], [0, 5]])
def test_rows_of_a_cache_that_are_not_there_are_refused(rows: list[int]) -> None:
    model = random_model(CONFIGS["uneven"])
    cache = model.make_cache()
    model(mx.array([[1], [2]]), cache)
    with pytest.raises(InputError, match="the cache holds 2 sequences"):
        cache.select(rows)
    cache.select([1, 0])


@pytest.mark.parametrize(
    "seed", [-1, 2**64, -(2**63), 10**400, pytest.param(10**5000, id="huge"), 1.5, "7"]
)
def test_seeds_out_of_range_are_refused(seed: Any) -> None:
    with pytest.raises(InputError, match="seed must be"):
        make_sampler(1.0, seed=seed)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63, 2**64 - 1, np.int64(3)])
def test_any_seed_in_range_draws(seed: int) -> None:
    assert make_sampler(1.0, seed=seed)(mx.zeros((1, 50))).item() < 50


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": None},
        {"max_tokens": 1.5},
        {"max_kv_size": 5.5},
        {"kv_bits": "8"},
        {"kv_bits": 8, "quantized_kv_start": 1.5},
        {"prefill_step_size": "512"},
        {"num_draft_tokens": 2.5, "prompt_lookup": True},
        {"stop": 5},
        {"stop": [5]},
        {"stop": b"x"},
        {"draft_model": "demo"},
        {"logits_processors": lambda tokens, logits: logits},
        {"logits_processors": [lambda tokens, logits: logits.astype(mx.complex64)]},
    ],
)
def test_options_of_a_wrong_type_are_refused_by_name(demo: Demo, options: dict[str, Any]) -> None:
    name = next(reversed(options) if len(options) == 2 and "kv_bits" in options else iter(options))
    with pytest.raises(InputError, match="logits" if name.startswith("logits") else name):
        generate(*demo, "Once", **{"max_tokens": 3, **options})


@pytest.mark.parametrize(
    "call",
    [
        lambda: make_sampler("1"),  # type: ignore[arg-type]
        lambda: make_sampler(None),  # type: ignore[arg-type]
        lambda: make_sampler(1, top_p="0.9"),  # type: ignore[arg-type]
        lambda: make_sampler(1, xtc_probability="1"),  # type: ignore[arg-type]
        lambda: make_logits_processors(repetition_penalty="1.1"),  # type: ignore[arg-type]
        lambda: make_logits_processors([1, 2]),  # type: ignore[arg-type]
        lambda: make_logits_processors({1: "2"}),  # type: ignore[dict-item]
    ],
)
def test_numbers_that_are_none_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="must"):
        call()


def test_numpy_integers_and_floats_are_numbers(demo: Demo) -> None:
    bias = make_logits_processors({np.int64(5): np.float32(-1)}, np.float32(1.1))  # type: ignore
    sampler = make_sampler(np.float32(0))  # type: ignore[arg-type]
    made = batch_generate(
        *demo,
        ["Once"],
        max_tokens=np.int32(3),  # type: ignore[arg-type]
        sampler=sampler,
        logits_processors=bias,
    )
    assert len(made.token_ids[0]) == 3
