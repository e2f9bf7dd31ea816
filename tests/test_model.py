"""The network against the float64 reference."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import InputError, OpenELM, OpenELMError, device, load
from mlx_openelm.backends import cpu
from mlx_openelm.dtypes import dtype_name
from mlx_openelm.model.cache import FIRST_CAPACITY
from mlx_openelm.model.openelm import LENGTHS, SHORT
from mlx_openelm.model.quantization import Quantization, Scheme, quantize

from . import bounds, reference
from .models import CONFIGS, UNEVEN, random_model

BOUND = bounds.FLOAT32
POLICIES = {
    "MLX's kernels, compiled": device.Policy("a GPU"),
    "MLX's kernels": device.Policy("a GPU", compiled=False),
}
if cpu.missing() is None:
    POLICIES["the C library"] = device.Policy("CPU", mx.float32, native=True)


def tokens_for(vocab: int, batch: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (batch, length))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_logits_are_the_references(name: str, policy: str) -> None:
    config = CONFIGS[name]
    weights = reference.random_weights(config, seed=0)
    tokens = tokens_for(config.vocab_size, 3, 40)
    wanted = reference.logits(config, weights, tokens)
    logits = random_model(config, POLICIES[policy])(mx.array(tokens))
    assert np.abs(wanted).max() > 1
    assert np.abs(np.array(logits) - wanted).max() < BOUND


def rope_of_metal(x: mx.array, dims: int, *, offset: Any, **options: Any) -> mx.array:
    """`mx.fast.rope` as MLX's Metal kernels read an offset.

    From an array of one dimension they take one for each row, a stride apart, whatever its size is
    (emulated: what comes after the first is 100); of a scalar and one token each, kernels of some
    versions of MLX compute only the first row (MLX issues 3494, 3795, 3949; emulated: the others
    become 0).
    """
    B = x.shape[0]
    if isinstance(offset, mx.array) and offset.ndim == 1:
        offset = mx.concatenate([offset, mx.full(max(0, B - offset.size), 100, mx.int32)])
    elif x.shape[-2] == 1:
        first = ROPE(x[:1], dims, offset=offset, **options)
        return mx.concatenate([first, mx.zeros_like(x[1:])])
    return ROPE(x, dims, offset=offset, **options)


ROPE = mx.fast.rope


@pytest.mark.parametrize("lengths", [None, [9, 9, 9], [9, 4, 7]])
def test_every_row_of_a_batch_has_its_offset_on_metal(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int] | None
) -> None:
    monkeypatch.setattr(mx.fast, "rope", rope_of_metal)
    config = CONFIGS["uneven"]
    weights = reference.random_weights(config, seed=0)
    tokens = tokens_for(config.vocab_size, 3, 12)
    model = random_model(config, device.Policy("a GPU", compiled=False))
    cache = model.make_cache(lengths=lengths)
    parts = [model(mx.array(tokens[:, i:j]), cache) for i, j in ((0, 9), (9, 10), (10, 12))]
    found = np.array(mx.concatenate(parts, axis=1))
    for row, length in enumerate(lengths or [9, 9, 9]):
        wanted = reference.logits(config, weights, tokens[row : row + 1, 9 - length :])
        assert np.abs(found[row : row + 1, 9 - length :] - wanted).max() < BOUND


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("compiled", [True, False])
def test_logits_in_half_precision_are_near_the_references(
    name: str, dtype: mx.Dtype, compiled: bool
) -> None:
    config = CONFIGS[name]
    weights = reference.random_weights(config, seed=0)
    arrays = {key: mx.array(value).astype(dtype) for key, value in weights.items()}
    tokens = tokens_for(config.vocab_size, 3, 40)
    stored = {key: bounds.numbers(array) for key, array in arrays.items()}
    wanted = reference.logits(config, stored, tokens)
    policy = device.Policy("a GPU", compiled=compiled)
    logits = OpenELM(config, arrays, dtype=dtype, policy=policy)(mx.array(tokens))
    assert logits.dtype == dtype
    bounds.assert_near(logits, wanted, config.num_transformer_layers)


def test_logits_of_the_demo_are_the_references() -> None:
    model, tokenizer = load("demo")
    weights = {name: bounds.numbers(array) for name, array in model.parameters().items()}
    text = "Once upon a time there was a king who had three daughters, and the youngest said:"
    tokens = np.array([tokenizer.encode(text)])
    wanted = reference.logits(model.config, weights, tokens)
    assert np.abs(wanted).max() > 5
    layers = model.config.num_transformer_layers
    bounds.assert_near(model(mx.array(tokens)), wanted, layers)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_through_the_cache_give_the_logits_of_one_pass(
    name: str, policy: str, chunk: int
) -> None:
    config = CONFIGS[name]
    weights = reference.random_weights(config, seed=0)
    tokens = tokens_for(config.vocab_size, 3, 70)
    wanted = reference.logits(config, weights, tokens)
    model = random_model(config, POLICIES[policy])
    cache = model.make_cache()
    parts = [
        model(mx.array(tokens[:, i : i + chunk]), cache) for i in range(0, tokens.shape[1], chunk)
    ]
    assert cache.offset == tokens.shape[1]
    assert np.abs(np.array(mx.concatenate(parts, axis=1)) - wanted).max() < BOUND


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lengths", [(256, 256), (37, 256, 140)])
def test_steps_whose_attention_is_computed_in_blocks(lengths: tuple[int, ...], policy: str) -> None:
    config = CONFIGS["uneven"]
    weights = reference.random_weights(config, seed=0)
    tokens = tokens_for(config.vocab_size, 2, sum(lengths))
    wanted = reference.logits(config, weights, tokens)
    model = random_model(config, POLICIES[policy])
    cache, parts, start = model.make_cache(), [], 0
    for length in lengths:
        parts.append(model(mx.array(tokens[:, start : start + length]), cache))
        start += length
    assert np.abs(np.array(mx.concatenate(parts, axis=1)) - wanted).max() < BOUND


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("length", [1, 7, 9, 200])
def test_last_only_is_the_last_position(length: int, policy: str) -> None:
    model = random_model(CONFIGS["uneven"], POLICIES[policy])
    tokens = mx.array(tokens_for(96, 2, length))
    cache = model.make_cache()
    logits = model(tokens, cache, last_only=True)
    assert logits.shape == (2, 1, 96)
    whole = model(mx.concatenate([tokens, tokens[:, :1]], axis=1))
    assert mx.abs(logits[:, 0] - whole[:, -2]).max().item() < 1e-5
    assert mx.abs(model(tokens[:, :1], cache)[:, 0] - whole[:, -1]).max().item() < 1e-5


@pytest.mark.parametrize(
    "scheme",
    [Scheme(32, 4), Scheme(32, 8), Scheme(32, 3), Scheme(32, 4, "mxfp4"), Scheme(16, 4, "nvfp4")],
    ids=lambda s: f"{s.mode}-{s.bits}",
)
def test_a_quantized_model_computes_with_the_dequantized_weights(scheme: Scheme) -> None:
    if cpu.missing():
        pytest.skip(cpu.missing())
    config = CONFIGS["untied"].__class__(
        **{**UNEVEN, "ffn_dim_divisor": 32, "head_dim": 16}, share_input_output_layers=False
    )
    weights = reference.random_weights(config, seed=0)
    stored, dequantized = {}, {}
    multiplied = set()  # as they are
    for name, value in weights.items():
        array = mx.array(value)
        stored[name], dequantized[name] = array, value
        if array.ndim == 2:
            matrix = quantize(array, scheme)
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{part}": a for part, a in matrix.arrays()}
            if cpu.can_multiply(matrix):
                multiplied |= {f"{module}.{part}" for part, _ in matrix.arrays()}
            dequantized[name] = np.array(matrix.take(mx.arange(array.shape[0]), mx.float32))
    tokens = tokens_for(config.vocab_size, 2, 12)
    wanted = reference.logits(config, dequantized, tokens)
    model = OpenELM(config, stored, Quantization(scheme), policy=POLICIES["the C library"])
    assert model.parameters().keys() == dequantized.keys() | multiplied
    assert np.abs(np.array(model(mx.array(tokens))) - wanted).max() < BOUND
    assert bool(multiplied) == (scheme.mode == "affine" and scheme.bits in (4, 8))


def test_parameters_are_the_tensors_it_was_made_of() -> None:
    weights = reference.random_weights(CONFIGS["untied"], seed=0)
    parameters = random_model(CONFIGS["untied"]).parameters()
    assert parameters.keys() == weights.keys()
    assert all(np.array_equal(np.array(parameters[k]), v) for k, v in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.layers.1.attn.k_norm.weight"), "k_norm.weight is missing"),
        (lambda w: w.update({"transformer.extra": mx.zeros(1)}), "transformer.extra is not part"),
        (
            lambda w: w.update({"transformer.norm.weight": mx.zeros(5)}),
            r"transformer.norm.weight has the shape \[5\]; \[32\] is expected",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, message: str) -> None:  # type: ignore[no-untyped-def]
    weights = reference.random_weights(CONFIGS["uneven"], seed=0)
    arrays = {name: mx.array(value) for name, value in weights.items()}
    change(arrays)
    with pytest.raises(InputError, match=message):
        OpenELM(CONFIGS["uneven"], arrays)


STRIDED = {
    "every second": lambda a: mx.repeat(a, 2, axis=-1)[..., ::2],
    "reversed twice": lambda a: a[..., ::-1][..., ::-1],
    "transposed": lambda a: mx.contiguous(a.T).T,
    "part of more": lambda a: mx.concatenate([a, a, a], axis=-1)[..., : a.shape[-1]],
    "broadcast": lambda a: mx.broadcast_to(mx.array(0.5), a.shape),
    "NumPy": np.array,
}


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("policy", POLICIES)
def test_weights_may_have_any_strides(kind: str, policy: str) -> None:
    config, tokens = CONFIGS["untied"], mx.array(tokens_for(96, 2, 12))
    weights = reference.random_weights(config, seed=0)
    arrays = {name: STRIDED[kind](mx.array(value)) for name, value in weights.items()}
    mx.eval(list(arrays.values()) if kind != "NumPy" else [])
    model = OpenELM(config, arrays, policy=POLICIES[policy])
    wanted = reference.logits(
        config, {name: np.array(array) for name, array in arrays.items()}, np.array(tokens)
    )
    assert np.abs(np.array(model(tokens)) - wanted).max() < BOUND


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.uint32, mx.bool_, mx.complex64])
@pytest.mark.parametrize(
    "name", ["transformer.layers.1.ffn.proj_1.weight", "transformer.norm.weight"]
)
def test_weights_that_are_not_floating_point_are_refused(name: str, dtype: mx.Dtype) -> None:
    weights = reference.random_weights(CONFIGS["uneven"], seed=0)
    arrays = {key: mx.array(value) for key, value in weights.items()}
    arrays[name] = (arrays[name] * 100).astype(dtype)
    kind = dtype_name(dtype)
    with pytest.raises(InputError, match=f"tensor {name} is {kind}; floating point is expected"):
        OpenELM(CONFIGS["uneven"], arrays)


def test_quantized_weights_have_their_dtypes() -> None:
    config = CONFIGS["untied"]
    name = "transformer.layers.0.attn.qkv_proj"
    weights = reference.random_weights(config, seed=0)
    arrays = {key: mx.array(value) for key, value in weights.items()}
    for scheme, part, dtype, message in (
        (Scheme(32, 8), "weight", mx.int32, "is int32; uint32 is expected"),
        (Scheme(32, 8), "scales", mx.int8, "is int8; floating point is expected"),
        (Scheme(32, 4, "mxfp4"), "scales", mx.float32, "is float32; uint8 is expected"),
    ):
        matrix = dict(quantize(arrays[f"{name}.weight"], scheme).arrays())
        stored = arrays | {f"{name}.{key}": array for key, array in matrix.items()}
        quantization = Quantization(scheme, dict.fromkeys(shapes_of(arrays) - {name}))
        OpenELM(config, stored, quantization)
        stored[f"{name}.{part}"] = stored[f"{name}.{part}"].astype(dtype)
        with pytest.raises(InputError, match=f"tensor {name}.{part} {message}"):
            OpenELM(config, stored, quantization)


def shapes_of(arrays: dict[str, mx.array]) -> set[str]:
    return {name.removesuffix(".weight") for name, array in arrays.items() if array.ndim == 2}


def test_a_forked_child_is_told_that_it_can_not_compute() -> None:
    """MLX's threads are the parent's: without an error the child waits for ever."""
    model = random_model(CONFIGS["uneven"])
    mx.eval(model(mx.array([[1]])))
    child = os.fork()
    if not child:
        signal.alarm(10)  # ends it if it waits
        try:
            model.step(mx.array([[1]]))
        except OpenELMError as error:
            os._exit(3 if "start processes with spawn" in str(error) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_half_precision_stays_near_the_reference() -> None:
    config = CONFIGS["uneven"]
    weights = reference.random_weights(config, seed=0)
    tokens = tokens_for(config.vocab_size, 1, 12)
    wanted = reference.logits(config, weights, tokens)
    arrays = {k: mx.array(v) for k, v in weights.items()}
    policy = device.Policy("a GPU", compiled=False)  # on a CPU MLX would compile C++ for this
    model = OpenELM(config, arrays, dtype=mx.bfloat16, policy=policy)
    logits = model(mx.array(tokens))
    assert logits.dtype == mx.bfloat16
    assert np.abs(np.array(logits.astype(mx.float32)) - wanted).max() < 0.25


def padded_logits(model: OpenELM, tokens: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Logits of sequences of different lengths in one cache, padded in front, two steps."""
    longest = max(lengths)
    cache = model.make_cache(lengths=lengths)
    rows = np.zeros((len(lengths), longest), int)
    for row, sequence, n in zip(rows, tokens, lengths, strict=True):
        row[longest - n :] = sequence[:n]
    parts = [model(mx.array(rows[:, :-3]), cache), model(mx.array(rows[:, -3:]), cache)]
    logits = np.array(mx.concatenate(parts, axis=1))
    return [row[longest - n :] for row, n in zip(logits, lengths, strict=True)]


@pytest.mark.parametrize("policy", POLICIES)
def test_sequences_of_different_lengths_share_a_cache(policy: str) -> None:
    config = CONFIGS["uneven"]
    weights = reference.random_weights(config, seed=0)
    tokens, lengths = tokens_for(config.vocab_size, 3, 20), [20, 3, 11]
    found = padded_logits(random_model(config, POLICIES[policy]), tokens, lengths)
    for sequence, n, logits in zip(tokens, lengths, found, strict=True):
        wanted = reference.logits(config, weights, sequence[None, :n])[0]
        assert np.abs(logits - wanted).max() < BOUND


def test_a_step_is_compiled_once_a_shape_and_memory_is_the_caches() -> None:
    """3,000 tokens: one trace for every capacity, and no memory but the buffers."""
    config = CONFIGS["uneven"].__class__(**{**UNEVEN, "max_context_length": 4096})
    model = random_model(config, POLICIES["MLX's kernels, compiled"])
    cache = model.make_cache()
    mx.eval(model(mx.array([[1]]), cache), cache.buffers)
    mx.clear_cache()
    held = mx.get_active_memory() - cache.nbytes
    for _ in range(2999):
        mx.eval(model(mx.array([[1]]), cache, last_only=True), cache.buffers)
    mx.clear_cache()
    capacities = [FIRST_CAPACITY << n for n in range(7)]
    assert cache.capacity == capacities[-1]
    assert model.traces == len(capacities)
    per_position = 4 * sum(2 * heads * config.head_dim for heads in config.num_kv_heads)
    assert cache.nbytes == cache.capacity * per_position
    assert mx.get_active_memory() - held - cache.nbytes < 10_000


def test_steps_of_many_lengths_are_few_shapes() -> None:
    model = random_model(CONFIGS["uneven"], POLICIES["MLX's kernels, compiled"])
    for length in range(1, 130):
        model(mx.zeros((1, length), mx.int32), last_only=True)
    assert model.traces == len([n for n in LENGTHS if n < 130]) + 1


def test_short_steps_are_compiled_when_their_length_comes_again() -> None:
    """Once it is cheaper done than traced; a single token's step comes again for sure."""
    policy = replace(POLICIES["MLX's kernels, compiled"], compile_after=2)
    model = random_model(CONFIGS["uneven"], policy)
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2]])
    logits = [model(tokens) for _ in range(5)]
    assert model.traces == 2 + 1
    for later in logits[1:]:
        assert mx.abs(later - logits[0]).max().item() < 1e-5
    for length, traces in [(1, 1), (SHORT + 1, 1)]:
        model.traces = 0
        for _ in range(3):
            model(mx.zeros((1, length), mx.int32), last_only=True)
        assert model.traces == traces
