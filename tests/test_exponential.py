"""e^x in arithmetic is exact, where it is used and where it isn't, compiled and not."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm.exponential import MANY, exp, silu, softmax_product

compiled = pytest.mark.parametrize("wrap", [lambda f: f, mx.compile], ids=["plain", "compiled"])
Wrap = Callable[[Callable[..., mx.array]], Callable[..., mx.array]]


def values(low: float, high: float, count: int) -> np.ndarray:
    return np.linspace(low, high, count, dtype=np.float32)


@compiled
def test_exp_is_exact_to_float32(wrap: Wrap) -> None:
    x = values(-87, 0, 1_000_001)
    wanted = np.exp(x.astype(np.float64))
    assert np.abs(np.array(wrap(exp)(mx.array(x))) / wanted - 1).max() < 3e-7


@compiled
def test_exp_below_is_zero_and_of_zero_is_one(wrap: Wrap) -> None:
    x = np.concatenate([values(-1e9, -100, 1001), values(-100, -87.4, 1001)])
    found = np.array(wrap(exp)(mx.array(x)))
    assert ((found >= 0) & (found < 1.2e-38)).all()  # no number of the wrong sign, no NaN
    assert wrap(exp)(mx.array([0.0, -0.0])).tolist() == [1.0, 1.0]


@compiled
@pytest.mark.parametrize("count", [MANY - 1, MANY, 100_000])
def test_silu(wrap: Wrap, count: int) -> None:
    for limit in (1e-3, 5, 90, 1e4):
        x = values(-limit, limit, count)
        with np.errstate(over="ignore"):
            wanted = x / (1 + np.exp(-x.astype(np.float64)))
        difference = np.abs(np.array(wrap(silu)(mx.array(x))) - wanted)
        assert (difference <= 5e-7 * np.maximum(np.abs(x), 1e-3)).all()


@compiled
@pytest.mark.parametrize("shape", [(1, 2, 5, 40), (1, 2, 30, 64), (2, 3, 64, 128)])
def test_softmax_product(wrap: Wrap, shape: tuple[int, ...]) -> None:
    """Also where most is masked, and where scores are far apart, or high."""
    rng = np.random.default_rng(0)
    v = rng.standard_normal((*shape[:-2], shape[-1], 16)).astype(np.float32)
    for scale, shift in ((1, 0), (40, 0), (3, 1000)):
        scores = (rng.standard_normal(shape) * scale + shift).astype(np.float32)
        scores[..., rng.random(shape[-1]) < 0.7] += np.float32(-1e9)
        e = np.exp((scores - scores.max(-1, keepdims=True)).astype(np.float64))
        wanted = e / e.sum(-1, keepdims=True) @ v
        found = np.array(wrap(softmax_product)(mx.array(scores), mx.array(v)))
        assert np.abs(found - wanted).max() < 2e-6
