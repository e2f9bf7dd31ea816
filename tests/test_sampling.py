"""Filters, penalties and draws, against NumPy and against mlx-lm."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm import InputError, make_logits_processors, make_sampler
from mlx_openelm.generation.sampling import Draws, Xtc, keep_min_p, keep_top_k, keep_top_p

logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40, unique=True).map(
    lambda row: np.array([row], np.float32)
)


def log_softmax(row: np.ndarray) -> np.ndarray:
    return row - np.log(np.exp(row.astype(np.float64)).sum(-1, keepdims=True))


def kept(filtered: mx.array) -> set[int]:
    return set(np.flatnonzero(np.isfinite(np.array(filtered)[0])))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logit_rows, st.integers(1, 40))
def test_top_k_keeps_the_k_largest(row: np.ndarray, k: int) -> None:
    k = min(k, row.shape[1] - 1)
    assert kept(keep_top_k(mx.array(row), k)) == set(np.argsort(-row[0])[:k])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logit_rows, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: np.ndarray, p: float) -> None:
    logprobs = log_softmax(row)
    order = np.argsort(-logprobs[0])
    mass = np.cumsum(np.exp(logprobs[0][order]))
    if np.abs(mass - p).min() < 1e-5:
        return  # rounding decides
    wanted = set(order[: np.searchsorted(mass, p) + 1])
    assert kept(keep_top_p(mx.array(logprobs.astype(np.float32)), p)) == wanted


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logit_rows, st.floats(0.01, 0.99), st.integers(1, 5))
def test_min_p_keeps_what_is_likely_enough(row: np.ndarray, min_p: float, least: int) -> None:
    ratio = np.exp((row - row.max()).astype(np.float64))[0]
    if np.abs(ratio - min_p).min() < 1e-5:
        return
    wanted = set(np.flatnonzero(ratio >= min_p)) | set(np.argsort(-row[0])[:least])
    assert kept(keep_min_p(mx.array(row), min_p, least)) == wanted


def frequencies(sampler, row: list[float], draws: int = 4000) -> np.ndarray:  # type: ignore[no-untyped-def]
    logprobs = mx.array(np.repeat(log_softmax(np.array([row], np.float32)), draws, 0))
    return np.bincount(np.array(sampler(logprobs.astype(mx.float32))), minlength=len(row)) / draws


@pytest.mark.parametrize("temp", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_of_the_scaled_logits(temp: float) -> None:
    row = [0.0, 1.0, 2.0, -1.0]
    wanted = np.exp(np.array(row) / temp) / np.exp(np.array(row) / temp).sum()
    got = frequencies(make_sampler(temp, seed=3), row)
    spread = np.sqrt(wanted * (1 - wanted) / 4000)
    assert (np.abs(got - wanted) < 4 * spread).all()


def test_filters_apply_before_the_temperature_as_in_mlx_lm() -> None:
    # At temperature 1 the first two tokens hold 0.5 + 0.3; a high temperature flattens that.
    row = list(np.log([0.5, 0.3, 0.15, 0.05]))
    got = frequencies(make_sampler(10.0, top_p=0.75, seed=0), row)
    assert got[0] > 0 and got[1] > 0
    assert got[2] == got[3] == 0


def test_a_seed_gives_the_same_draws_whatever_else_draws() -> None:
    logprobs = mx.zeros((1, 1000))
    first, second = make_sampler(1.0, seed=5), make_sampler(1.0, seed=5)
    a = [first(logprobs).item() for _ in range(10)]
    mx.random.seed(9)
    b = []
    for _ in range(10):
        mx.random.uniform()
        b.append(second(logprobs).item())
    assert a == b
    assert len(set(a)) > 5
    assert [make_sampler(1.0, seed=6)(logprobs).item()] != a[:1]


def test_no_seed_uses_mlx_global_state() -> None:
    sampler, logprobs = make_sampler(1.0), mx.zeros((1, 1000))
    mx.random.seed(1)
    a = [sampler(logprobs).item() for _ in range(5)]
    mx.random.seed(1)
    assert a == [sampler(logprobs).item() for _ in range(5)]


def test_temperature_zero_is_greedy() -> None:
    assert make_sampler(0, top_p=0.5, top_k=3)(mx.array([[1.0, 5.0, 2.0]])).tolist() == [1]


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"top_p": 1e-320},
        {"top_p": 0.9, "top_k": 5, "min_p": 0.1},
    ],
)
def test_a_tiny_temperature_is_greedy_in_the_limit(
    filters: dict[str, float], dtype: mx.Dtype, seed: int | None
) -> None:
    rows = mx.random.normal((6, 8000), key=mx.random.key(1)) * 6
    logits = rows - 40.0  # the largest are about -10, and neighbours 0.1 apart in bfloat16
    best = mx.max(logits, axis=-1, keepdims=True)
    logits = mx.where(logits == best, best + 0.5, logits).astype(dtype)
    wanted = mx.argmax(logits, axis=-1).tolist()
    for temp in (5e-324, 1e-40, 1e-20, 1e-8, 1e-6, 1e-5, 1.1e-5, 1e-4, 1e-3, 1e-2):
        sampler = make_sampler(temp, seed=seed, **filters)  # type: ignore[arg-type]
        assert sampler(logits).tolist() == wanted, temp


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("temp", [1e10, 1e39, 1e300])
def test_a_huge_temperature_draws_evenly_of_what_the_filters_leave(
    temp: float, seed: int | None
) -> None:
    row = list(np.log([0.5, 0.3, 0.15, 0.05]))
    got = frequencies(make_sampler(temp, top_k=2, seed=seed), row)
    assert abs(got[0] - 0.5) < 4 * math.sqrt(0.25 / 4000)
    assert got[2] == got[3] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temp": -1}, "temp must be at least 0, not -1"),
        ({"temp": math.nan}, "temp must be"),
        ({"temp": math.inf}, "temp must be finite, not inf"),
        ({"temp": -math.inf}, "temp must be at least 0"),
        ({"temp": -1e-300}, "temp must be at least 0"),
        ({"top_p": math.nan}, "top_p must be"),
        ({"min_p": math.inf}, "min_p must be"),
        ({"top_k": 2.5}, "top_k must be at least 0, and an integer, not 2.5"),
        ({"top_p": 2}, "top_p must be between 0 and 1, not 2"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"top_k": -3}, "top_k must be at least 0"),
        ({"min_tokens_to_keep": 0}, "min_tokens_to_keep must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_sampler(**arguments)  # type: ignore[arg-type]


def processed(tokens: list[int], logits: list[float], **arguments: object) -> list[float]:
    row = mx.array([logits])
    for processor in make_logits_processors(**arguments):  # type: ignore[arg-type]
        row = processor(mx.array(tokens), row)
    return row[0].tolist()  # type: ignore[no-any-return]


def test_penalties() -> None:
    logits, tokens = [2.0, -2.0, 1.0, 4.0], [0, 1, 1]
    assert processed(tokens, logits, repetition_penalty=2.0) == [1.0, -4.0, 1.0, 4.0]
    assert processed(tokens, logits, presence_penalty=0.5) == [1.5, -2.5, 1.0, 4.0]
    assert processed(tokens, logits, frequency_penalty=0.5) == [1.5, -3.0, 1.0, 4.0]
    assert processed(tokens, logits, logit_bias={3: -4.0, 2: 1.0}) == [2.0, -2.0, 2.0, 0.0]
    assert processed([3, 0], logits, presence_penalty=1.0, presence_context_size=1)[3] == 4.0
    assert processed([], logits, repetition_penalty=2.0) == logits
    assert processed(tokens, logits) == logits


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.3, "repetition_context_size": 4},
        {"presence_penalty": 0.7},
        {"frequency_penalty": 0.7, "frequency_context_size": 3},
        {"logit_bias": {2: 1.5, 7: -2.0}},
    ],
)
def test_penalties_are_those_of_mlx_lm(arguments: dict[str, object]) -> None:
    theirs = pytest.importorskip("mlx_lm.sample_utils")
    rng = np.random.default_rng(0)
    tokens, logits = mx.array([1, 5, 5, 2, 2, 2, 9]), rng.normal(size=(1, 12)).astype(np.float32)
    ours, other = mx.array(logits), mx.array(logits)
    for processor in make_logits_processors(**arguments):  # type: ignore[arg-type]
        ours = processor(tokens, ours)
    for processor in theirs.make_logits_processors(**arguments):
        other = processor(tokens, other)
    assert mx.allclose(ours, other).item()


def test_penalties_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="repetition_penalty must be a positive number, not -1"):
        make_logits_processors(repetition_penalty=-1)
    with pytest.raises(InputError, match="frequency_context_size must be at least 1"):
        make_logits_processors(frequency_penalty=1, frequency_context_size=0)
    with pytest.raises(InputError, match="for ids below 4"):
        processed([0], [0.0, 0.0, 0.0, 0.0], logit_bias={4: 1.0})


def test_xtc_leaves_the_least_likely_of_the_choices() -> None:
    logprobs = mx.log(mx.array([[0.4, 0.3, 0.15, 0.1, 0.05]]))

    def kept(xtc: Xtc, coin: float = 0.0) -> list[int]:
        row = xtc(logprobs, mx.array([[coin]]))[0].tolist()
        return [i for i, value in enumerate(row) if value > -math.inf]  # type: ignore[operator]

    assert kept(Xtc(1.0, 0.12)) == [2, 3, 4]
    assert kept(Xtc(1.0, 0.12, (0, 4096))) == [0, 2, 3, 4]
    assert kept(Xtc(1.0, 0.5)) == [0, 1, 2, 3, 4]
    assert kept(Xtc(1.0, 0.35)) == [0, 1, 2, 3, 4]  # one choice stays
    assert kept(Xtc(0.3, 0.12), coin=0.31) == [0, 1, 2, 3, 4]
    assert kept(Xtc(0.3, 0.12), coin=0.29) == [2, 3, 4]


def test_xtc_applies_as_often_as_it_should_and_to_each_row() -> None:
    logprobs = mx.log(mx.array([[0.6, 0.4]] * 4000))
    sampler = make_sampler(1.0, xtc_probability=0.25, xtc_threshold=0.1, seed=5)
    share = mx.mean(sampler(logprobs) == 0).item()
    assert share == pytest.approx(0.6 * 0.75, abs=0.03)


def test_a_seeded_xtc_draw_depends_on_its_number_only() -> None:
    logprobs = mx.log(mx.array([[0.3, 0.3, 0.2, 0.2]] * 12))

    def sampler() -> Draws:
        made = make_sampler(1.0, xtc_probability=0.5, seed=3)
        assert isinstance(made, Draws)
        return made

    one, all_at_once = sampler(), sampler().ahead(logprobs).tolist()
    assert [one(row[None]).item() for row in logprobs] == all_at_once
    later = sampler()
    later.advance(0)
    assert later.ahead(logprobs[5:], 5).tolist() == all_at_once[5:]  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xtc_probability": 1.1}, "xtc_probability must be between 0 and 1"),
        ({"xtc_probability": 0.1, "xtc_threshold": 0.6}, "xtc_threshold must be between 0 and 0.5"),
    ],
)
def test_xtc_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_sampler(0.7, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"temp": 0.8}, {"temp": 1.5, "top_k": 9}, {"temp": 0.05}])
def test_without_a_seed_draws_are_those_of_mlx_lm(options: dict[str, Any]) -> None:
    theirs = pytest.importorskip("mlx_lm.sample_utils")
    rows = [mx.random.normal((1, 300), key=mx.random.key(i)) * 3 for i in range(12)]
    logprobs = [row - mx.logsumexp(row, axis=-1, keepdims=True) for row in rows]
    drawn = []
    for sampler in (make_sampler(**options), theirs.make_sampler(**options)):
        mx.random.seed(5)
        drawn.append([sampler(row).item() for row in logprobs])
    assert drawn[0] == drawn[1]
