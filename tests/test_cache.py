"""Keys and values: growth, trimming, sliding."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import InputError, KVCache, OpenELM
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.buffers import KEPT_TOKENS, SLIDING_STEP
from mlx_openelm.model.cache import FIRST_CAPACITY, merge
from mlx_openelm.models.cache import trim_prompt_cache
from mlx_openelm.tokenizer.tokenizer import Tokenizer

from . import bounds, reference
from .models import CONFIGS, UNEVEN, random_model
from .test_model import POLICIES

CONFIG = CONFIGS["uneven"]
_WIDE = OpenELMConfig(**{**UNEVEN, "head_dim": 32, "model_dim": 128})  # a group fits into a head


def random_tokens(length: int) -> mx.array:
    return mx.array(np.random.default_rng(2).integers(0, CONFIG.vocab_size, (1, length)))


def test_buffers_double_up_to_the_context() -> None:
    model = random_model(CONFIG)
    cache = model.make_cache()
    capacities = []
    for _ in range(CONFIG.max_context_length):
        model(mx.array([[1]]), cache)
        mx.eval(cache.buffers)
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [*(FIRST_CAPACITY << n for n in range(4)), 600]
    per_position = 4 * sum(2 * k * CONFIG.head_dim for k in CONFIG.num_kv_heads)
    assert cache.nbytes == 600 * per_position
    with pytest.raises(InputError, match="600 tokens long: 600 are in the cache and 1 more"):
        model(mx.array([[1]]), cache)


def test_a_token_is_written_in_place() -> None:
    """Decoding may not need a second copy of the cache, nor one that stays."""
    config = OpenELMConfig(**{**UNEVEN, "max_context_length": 1 << 16})
    model = random_model(config)
    cache = model.make_cache()
    cache.reserve(1, 1 << 15)
    mx.eval(cache.buffers)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        mx.eval(model(mx.array([[1]]), cache), cache.buffers)
    largest_buffer = max(array.nbytes for (array,) in cache.buffers)
    assert mx.get_peak_memory() - held < largest_buffer


@pytest.mark.parametrize("count", [1, 5, 30])
def test_trimming_is_exact(count: int) -> None:
    model = random_model(CONFIG)
    tokens = random_tokens(40)
    cache = model.make_cache()
    model(tokens, cache)
    cache.trim(count)
    again = model(tokens[:, 40 - count :], cache)
    assert mx.abs(again - model(tokens)[:, 40 - count :]).max().item() < 1e-5


def test_trimming_too_much_is_refused() -> None:
    cache = random_model(CONFIG).make_cache()
    with pytest.raises(InputError, match="can't trim 1 of 0"):
        cache.trim(1)


def sliding_logits(max_size: int, steps: list[int], tokens: mx.array) -> mx.array:
    model = random_model(CONFIG)
    cache = model.make_cache(max_size)
    parts, done = [], 0
    for wanted in itertools.cycle(steps):
        if done == tokens.shape[1]:
            return mx.concatenate(parts, axis=1)
        count = cache.longest_step(min(wanted, tokens.shape[1] - done))
        parts.append(model(tokens[:, done : done + count], cache))
        mx.eval(parts[-1], cache.buffers)
        done += count
    raise AssertionError


def windowed_logits(max_size: int, tokens: np.ndarray) -> np.ndarray:
    """One pass of the reference, with the window as a mask."""
    q, k = np.ogrid[: tokens.shape[1], : tokens.shape[1]]
    visible = (k <= q) & ((k < KEPT_TOKENS) | (k > q - (max_size - KEPT_TOKENS)))
    return reference.logits(CONFIG, reference.random_weights(CONFIG, 0), tokens, visible)


@pytest.mark.parametrize("steps", [[1], [512], [3, SLIDING_STEP, 1, 17]], ids=str)
@pytest.mark.parametrize("max_size", [5, 12, 100])
def test_a_sliding_context_is_a_window_however_it_is_cut(max_size: int, steps: list[int]) -> None:
    tokens = random_tokens(330)
    wanted = windowed_logits(max_size, np.array(tokens))
    assert np.abs(np.array(sliding_logits(max_size, steps, tokens)) - wanted).max() < 1e-4


def test_a_sliding_context_has_no_end() -> None:
    model = random_model(CONFIG)
    cache = model.make_cache(8)
    for _ in range(CONFIG.max_context_length + 100):
        logits = model(mx.array([[3]]), cache)
        mx.eval(logits, cache.buffers)
    assert cache.offset == 700
    assert cache.capacity == 8 + SLIDING_STEP - 1
    assert np.isfinite(np.array(logits)).all()


@pytest.mark.parametrize("size", [-1, 0, KEPT_TOKENS])
def test_sizes_that_make_no_sense_are_refused(size: int) -> None:
    with pytest.raises(InputError, match="max_kv_size must be more than 4, not"):
        random_model(CONFIG).make_cache(size)


def test_a_size_above_the_context_is_the_context() -> None:
    assert random_model(CONFIG).make_cache(4096).max_size == CONFIG.max_context_length


def test_a_cache_belongs_to_one_batch_size() -> None:
    model = random_model(CONFIG)
    cache = model.make_cache()
    model(mx.array([[1, 2]]), cache)
    with pytest.raises(InputError, match="holds 1 sequences, the tokens are of 2"):
        model(mx.array([[1], [2]]), cache)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.004), (4, 0.05)])
def test_a_quantized_cache_is_smaller_and_near(
    demo: tuple[OpenELM, Tokenizer], bits: int, error: float
) -> None:
    """The error is that of the logits, root mean square over root mean square.

    64 values of `bits` have a scale and a bias, in the dtype of the values. What half precision
    rounds differently adds up with the error of the quantization.
    """
    model, tokenizer = demo
    tokens = mx.array([tokenizer.encode("There was once a king who had three daughters. " * 12)])
    plain, small = model.make_cache(), model.make_cache(kv_bits=bits)
    wanted = bounds.numbers(model(tokens, plain))
    parts = [model(tokens[:, :100], small), model(tokens[:, 100:], small)]
    found = bounds.numbers(mx.concatenate(parts, axis=1))
    value = 8 * model.dtype.size
    size = (bits + 2 * value / 64) / value
    at_a_position = [cache.nbytes / cache.capacity for cache in (small, plain)]
    assert at_a_position[0] / at_a_position[1] == pytest.approx(size)
    if model.dtype != mx.float32:
        error = math.hypot(error, bounds.relative(model.dtype, model.config.num_transformer_layers))
    assert 0 < bounds.rms(found - wanted) < error * bounds.rms(wanted)


def test_a_quantized_cache_slides_and_is_trimmed(demo: tuple[OpenELM, Tokenizer]) -> None:
    model, _ = demo
    tokens = mx.array([list(range(3, 90))])
    cache = model.make_cache(32, kv_bits=8)
    done = 0
    while done < tokens.shape[1]:
        count = cache.longest_step(tokens.shape[1] - done)
        logits = model(tokens[:, done : done + count], cache)
        done += count
    assert np.isfinite(np.array(logits)).all()
    cache = model.make_cache(kv_bits=4)
    whole = model(tokens, cache)
    cache.trim(5)
    again = model(tokens[:, -5:], cache)
    assert mx.abs(again - whole[:, -5:]).max().item() < 0.5


def test_a_head_that_no_group_divides_is_refused() -> None:
    with pytest.raises(InputError, match="kv_bits needs a head_dim that is a multiple of 32"):
        random_model(CONFIG).make_cache(kv_bits=8)


def _deepcopy(cache: KVCache) -> KVCache:
    return copy.deepcopy(cache)


def _restored(cache: KVCache) -> KVCache:
    other = KVCache(CONFIG, bits=cache.scheme.bits if cache.scheme else None)
    other.restore(cache.state, cache.length)
    return other


def _merged(cache: KVCache) -> KVCache:
    return merge([cache])


def _one_of_a_batch(cache: KVCache) -> KVCache:
    return cache.sequence(0, cache.length)


def _shared(cache: KVCache) -> KVCache:
    other = _deepcopy(cache)
    other.buffers = cache.buffers
    return other


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("length", [FIRST_CAPACITY - 5, FIRST_CAPACITY, FIRST_CAPACITY + 1])
@pytest.mark.parametrize("take", [_deepcopy, _restored, _merged, _one_of_a_batch, _shared])
def test_what_is_taken_from_a_cache_goes_on_by_itself(
    take: Callable[[KVCache], KVCache], length: int, policy: str
) -> None:
    """The original and the other one are trimmed and go on in different ways, in any order."""
    model = random_model(CONFIG, POLICIES[policy])
    text = random_tokens(length)
    texts = [mx.array([[3, 4, 5, 6]]), mx.array([[90, 80, 70, 60]])]

    def continued(cache: KVCache, more: mx.array) -> mx.array:
        cache.trim(cache.offset - (length - 3))
        return mx.concatenate([model(token, cache) for token in mx.split(more, 4, axis=1)])

    wanted = [model(mx.concatenate([text[:, :-3], more], axis=1))[0, -4:] for more in texts]
    orders = ((1, 0),) if take is _shared else ((0, 1), (1, 0))
    for order in orders:
        cache = model.make_cache()
        model(text, cache)
        both = [cache, take(cache)]
        for turn in (*order, *order):
            found = continued(both[turn], texts[turn])[:, 0]
            assert mx.abs(found - wanted[turn]).max().item() < 1e-4


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_stays_as_it_was(policy: str) -> None:
    model = random_model(CONFIG, POLICIES[policy])
    cache = model.make_cache()
    model(random_tokens(20), cache)
    state = cache.state
    wanted = {name: np.array(array) for name, array in cache.state.items()}
    cache.trim(10)
    model(mx.array([[9] * 10]), cache)
    assert state.keys() == wanted.keys()
    for name, array in state.items():
        assert np.array_equal(np.array(array), wanted[name])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("max_size", [None, 40])
@pytest.mark.parametrize("start", [0, 10, 70])
def test_quantizing_later_is_the_same_on_every_policy(
    start: int, max_size: int | None, policy: str
) -> None:
    tokens = [(7 * i) % 90 for i in range(100)]

    def logits(name: str) -> mx.array:
        model = random_model(_WIDE, POLICIES[name])
        cache = model.make_cache(max_size, 8, quantized_from=start)
        found = [model(mx.array([[token]]), cache)[0] for token in tokens]
        assert cache.scheme is not None
        return mx.concatenate(found)

    wanted = logits("MLX's kernels")
    assert mx.abs(logits(policy) - wanted).max().item() < 1e-2 * mx.abs(wanted).max().item()


def _half(model: OpenELM) -> KVCache:
    return KVCache(model.config, dtype=mx.float16)


def _too_many(model: OpenELM) -> KVCache:
    return model.make_cache(lengths=[3, 5, 4])


def _fewer_layers(model: OpenELM) -> KVCache:
    return random_model(CONFIGS["no GLU"]).make_cache()


def _another_buffer(model: OpenELM) -> KVCache:
    cache = model.make_cache()
    model(mx.array([[1, 2]]), cache)
    cache.buffers = [tuple(array[:, :, :1] for array in buffer) for buffer in cache.buffers]
    cache.buffers[0] = tuple(mx.repeat(array, FIRST_CAPACITY, axis=2) for array in cache.buffers[0])
    return cache


def _before_the_beginning(model: OpenELM) -> KVCache:
    cache = model.make_cache()
    model(mx.array([[1, 2]]), cache)
    cache.offset -= 20
    return cache


@pytest.mark.parametrize(
    "wrong", [_half, _too_many, _fewer_layers, _another_buffer, _before_the_beginning]
)
def test_nothing_is_written_beyond_the_buffers_of_a_wrong_cache(
    wrong: Callable[[OpenELM], KVCache],
) -> None:
    """The C library writes where it is told to: what doesn't fit the model is refused before."""
    model = random_model(CONFIGS["scaled"])
    if wrong in (_half, _another_buffer) and not model.policy.native:
        pytest.skip("MLX's operations look at the arrays that they are given")
    cache = wrong(model)
    with pytest.raises((InputError, ValueError)):
        model(mx.array([[1, 2, 3]]), cache)


def test_half_a_position_can_not_be_forgotten() -> None:
    model = random_model(CONFIG)
    cache = model.make_cache()
    model(mx.array([[1, 2, 3]]), cache)
    for forget in (cache.trim, lambda count: trim_prompt_cache([cache], count)):
        with pytest.raises(TypeError):
            forget(1.5)  # type: ignore[arg-type]
    assert cache.offset == 3


def test_a_sequence_that_a_cache_does_not_hold_is_refused() -> None:
    model = random_model(CONFIG)
    cache = model.make_cache(lengths=[3, 1])
    model(mx.array([[1, 2, 3], [0, 0, 4]]), cache)
    assert cache.sequence(1, 1).length == 1
    for row, length in ((2, 1), (-1, 1), (1, 2), (0, 4)):
        with pytest.raises(InputError, match="there is no|positions"):
            cache.sequence(row, length)
    with pytest.raises(InputError, match="no sequences"):
        cache.select([])
    with pytest.raises(InputError, match="at least 0"):
        model.make_cache(lengths=[-1, 1])
