"""Random networks, quantized every way, run every way, against the float64 reference.

Each case is one network and one way to run it, both drawn from a seed. OPENELM_SEED names the
first seed, and OPENELM_CASES how many cases there are; a failure prints its seed, and
`OPENELM_SEED=<it> OPENELM_CASES=1 pytest tests/test_differential.py` shows it again.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import OpenELM, OpenELMConfig, device
from mlx_openelm.backends import cpu
from mlx_openelm.model.buffers import KEPT_TOKENS, read
from mlx_openelm.model.cache import KVCache
from mlx_openelm.model.quantization import MODES, Quantization, Scheme, quantize

from . import reference

SEED = int(os.environ.get("OPENELM_SEED", "0")) or int(time.time())
CASES = int(os.environ.get("OPENELM_CASES", "50"))
SECONDS = 10  # for all cases of a policy; those that are left then are another run's

POLICIES = {"MLX's kernels": device.Policy("a GPU", compiled=False)}
if cpu.missing() is None:
    POLICIES["the C library"] = device.Policy("CPU", mx.float32, native=True)

SCHEMES: list[Scheme | None] = [
    None,
    *(
        Scheme(group, bits, mode)
        for mode, (groups, all_bits) in MODES.items()
        for group in groups
        for bits in all_bits
    ),
]

# Max abs difference of float32 logits, relative to the largest of the reference. A float32 has 24
# bits; the sums have up to 384 terms, and errors pass through at most 3 layers: some 100 roundings
# of 6e-8 each, added up like a random walk and amplified by norms of small activations.
BOUND = 5e-5
# A quantized key or value is off by half a step of its group: amplitude / 2**bits. What becomes of
# that depends on the network: over 100 of them it was up to 0.033 and 0.50 of the largest logit,
# the median 0.008 and 0.15. So only gross errors show in logits; keys and values are compared too.
KV_BOUNDS = {8: 0.15, 4: 1.5}


@dataclass(frozen=True)
class Network:
    """A random network, and the float64 weights that it ought to compute with."""

    config: OpenELMConfig
    scheme: Scheme | None
    arrays: dict[str, mx.array]
    weights: dict[str, np.ndarray]

    def model(self, policy: device.Policy) -> OpenELM:
        quantization = None if self.scheme is None else Quantization(self.scheme)
        return OpenELM(self.config, self.arrays, quantization, policy=policy)


def network(rng: np.random.Generator, number: int) -> Network:
    """One for each of `SCHEMES` in turn; its geometry is random."""
    scheme = SCHEMES[number % len(SCHEMES)]
    unit = 32 if scheme is None else scheme.group_size
    layers = int(rng.integers(1, 4))
    kv_heads = [int(n) for n in rng.integers(1, 4, layers)]
    query_heads = [n * int(rng.integers(1, 4)) for n in kv_heads]
    head_dim = int(rng.choice([8, 16, 32, 64, 96, 128]))
    if scheme is not None:  # rows of every matrix are made of groups: those of out_proj, too
        head_dim = max(head_dim, unit) if unit <= 64 else 128
        head_dim += -head_dim % unit
    config = OpenELMConfig(
        vocab_size=int(rng.integers(40, 200)) * (2 if unit == 16 else 1),  # see `quantize`
        model_dim=unit * int(rng.integers(1, 4)),
        head_dim=head_dim,
        num_transformer_layers=layers,
        num_query_heads=tuple(query_heads),
        num_kv_heads=tuple(kv_heads),
        ffn_multipliers=tuple(float(m) for m in rng.choice([0.5, 1.0, 2.5, 4.0], layers)),
        ffn_dim_divisor=unit,
        ffn_with_glu=bool(rng.integers(2)),
        share_input_output_layers=bool(rng.integers(2)),
        normalize_qk_projections=bool(rng.integers(2)),
        rope_freq_constant=float(rng.choice([500.0, 10000.0])),
        rms_norm_eps=float(rng.choice([1e-6, 1e-2])),
        max_context_length=512,
    )
    weights = reference.random_weights(config, seed=int(rng.integers(1 << 30)))
    arrays = {}
    for name, value in weights.items():
        array, module = mx.array(value), name.removesuffix(".weight")
        if scheme is None or array.ndim == 1:
            arrays[name] = array
            continue
        matrix = quantize(array, scheme)
        arrays |= {f"{module}.{part}": part_array for part, part_array in matrix.arrays()}
        weights[name] = np.array(matrix.dequantize(mx.float32).weight)
    return Network(config, scheme, arrays, weights)


def text(rng: np.random.Generator, net: Network, *shape: int) -> np.ndarray:
    return rng.integers(0, net.config.vocab_size, shape)


def chunks(rng: np.random.Generator, length: int) -> list[tuple[int, int]]:
    """[start, end) of steps of random lengths, many of them short, as verified drafts are."""
    steps, start = [], 0
    while start < length:
        end = min(length, start + int(rng.choice([1, 1, 2, 3, 5, 8, 17, 40])))
        steps.append((start, end))
        start = end
    return steps


def run(rng: np.random.Generator, model: OpenELM, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
    """Logits [B, L, vocab], in steps of random lengths; every few of them are taken back first."""
    parts = []
    for start, end in chunks(rng, tokens.shape[1]):
        if cache.ring is None and rng.integers(4) == 0:  # drafts that don't hold
            wrong = int(rng.integers(1, 6))
            model(mx.array(rng.integers(0, model.config.vocab_size, (len(tokens), wrong))), cache)
            cache.trim(wrong)
        step = mx.array(tokens[:, start:end])
        if rng.integers(4) == 0:
            last = model(step, cache, last_only=True)
            parts.append(np.full((len(tokens), end - start, last.shape[-1]), np.nan))
            parts[-1][:, -1:] = np.array(last)
        else:
            parts.append(np.array(model(step, cache)))
    return np.concatenate(parts, axis=1)


def check(found: np.ndarray, wanted: np.ndarray, bound: float = BOUND) -> None:
    """Wherever there are logits (`last_only` gives one position), they are the reference's."""
    there = ~np.isnan(found).all(-1)
    assert there[..., -1].all()
    assert np.isfinite(found[there]).all()
    assert np.abs(found - wanted)[there].max() < bound * max(1, np.abs(wanted).max())


def one_text(rng: np.random.Generator, net: Network, model: OpenELM) -> None:
    tokens = text(rng, net, int(rng.integers(1, 4)), int(rng.integers(1, 100)))
    found = run(rng, model, tokens, model.make_cache())
    check(found, reference.logits(net.config, net.weights, tokens))


def ragged_batch(rng: np.random.Generator, net: Network, model: OpenELM) -> None:
    """Texts of different lengths, padded in front; some leave the batch on the way."""
    lengths = [int(n) for n in rng.integers(1, 60, int(rng.integers(2, 5)))]
    more = int(rng.integers(2, 12))
    longest, cache = max(lengths), model.make_cache(lengths=lengths)
    tokens = text(rng, net, len(lengths), longest + more)
    first = run(rng, model, tokens[:, :longest], cache)
    kept = sorted(rng.choice(len(lengths), int(rng.integers(1, len(lengths) + 1)), replace=False))
    cache.select([int(row) for row in kept])
    second = run(rng, model, tokens[kept, longest:], cache)
    for row, length in enumerate(lengths):
        sequence = tokens[row : row + 1, longest - length :]
        wanted = reference.logits(net.config, net.weights, sequence)
        check(first[row : row + 1, longest - length :], wanted[:, :length])
        if row in kept:
            check(second[kept.index(row)][None], wanted[:, length:])


def sliding_context(rng: np.random.Generator, net: Network, model: OpenELM) -> None:
    size, length = int(rng.integers(KEPT_TOKENS + 1, 80)), int(rng.integers(2, 200))
    tokens, cache = text(rng, net, 1, length), model.make_cache(size)
    parts, start = [], 0
    while start < length:
        end = start + cache.longest_step(min(length - start, int(rng.integers(1, 50))))
        parts.append(np.array(model(mx.array(tokens[:, start:end]), cache)))
        start = end
    query, key = np.arange(length)[:, None], np.arange(length)
    visible = (key <= query) & ((key < KEPT_TOKENS) | (key > query - (size - KEPT_TOKENS)))
    wanted = reference.logits(net.config, net.weights, tokens, visible)
    check(np.concatenate(parts, axis=1), wanted)


def quantized_cache(rng: np.random.Generator, net: Network, model: OpenELM) -> None:
    if net.config.head_dim % 32:  # has no quantized cache
        return one_text(rng, net, model)
    bits = int(rng.choice([4, 8]))
    tokens = text(rng, net, int(rng.integers(1, 3)), int(rng.integers(1, 100)))
    cache, exact = model.make_cache(kv_bits=bits), model.make_cache()
    found = run(rng, model, tokens, cache)
    check(found, reference.logits(net.config, net.weights, tokens), KV_BOUNDS[bits])
    # The first layer's keys and values come from exact input: off by half a step at most.
    model(mx.array(tokens), exact)
    for got, wanted in zip(
        read(cache.buffers[0], cache.scheme, mx.float32),
        read(exact.buffers[0], None, mx.float32),
        strict=True,
    ):
        got, wanted = (a[:, :, : cache.offset] for a in (got, wanted))
        spread = mx.max(wanted) - mx.min(wanted)
        assert mx.max(mx.abs(got - wanted)).item() <= (spread / (2**bits - 1)).item()


WAYS = (one_text, ragged_batch, sliding_context, quantized_cache)


@pytest.mark.parametrize("policy", POLICIES)
def test_random_networks_are_the_references(policy: str) -> None:
    start, done = time.perf_counter(), 0
    for seed in range(SEED, SEED + CASES):
        rng = np.random.default_rng(seed)
        net: Any = network(rng, seed)
        way = WAYS[int(rng.integers(len(WAYS)))]
        print(f"OPENELM_SEED={seed} OPENELM_CASES=1: {way.__name__}, {net.scheme}, {net.config}")
        way(rng, net, net.model(POLICIES[policy]))
        done += 1
        if time.perf_counter() - start > SECONDS:
            break
    print(f"{done} cases")
    assert done >= min(CASES, len(WAYS))
