"""The primitives for CPUs compute what NumPy does in float64, and are used only where they fit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import kernels
from mlx_openelm.quantization import Scheme

SOURCE = Path(kernels.__file__).parent
_kernels = pytest.importorskip(
    "mlx_openelm._kernels", reason="the kernels aren't built", exc_type=ImportError
)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(shape)


def float32(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def close(found: mx.array, wanted: np.ndarray, bound: float = 2e-6) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == mx.float32
    assert np.abs(np.array(found) - wanted).max() < bound * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 40])
@pytest.mark.parametrize(
    ("columns", "bits", "group"),
    [(64, 4, 32), (192, 4, 64), (1280, 4, 128), (32, 8, 32), (192, 8, 64), (1280, 8, 128)],
)
def test_quantized_products(columns: int, bits: int, group: int, rows: int) -> None:
    scheme = Scheme(group, bits).to_dict()
    x, parts = normal(rows, columns), mx.quantize(float32(normal(333, columns, seed=1)), **scheme)
    wanted = x @ np.array(mx.dequantize(*parts, **scheme), np.float64).T
    close(_kernels.quantized_matmul(float32(x), *parts, bits), wanted, 3e-6)
    y = normal(rows, 333, seed=2, scale=10)
    close(_kernels.quantized_matmul(float32(x), *parts, bits, float32(y)), wanted + y, 3e-6)


def test_large_quantized_products_are_computed_in_chunks() -> None:
    """On all threads, the last chunk being smaller."""
    parts = mx.quantize(float32(normal(3001, 512, seed=1)), 64, 4)
    matrix = np.array(mx.dequantize(*parts, 64, 4), np.float64)
    for rows in (1, 6, 30):
        x = normal(rows, 512, seed=rows)
        close(_kernels.quantized_matmul(float32(x), *parts, 4), x @ matrix.T, 3e-6)


@pytest.mark.parametrize("shape", [(1, 64), (3, 17), (2, 5, 192), (7,), (1, 1)])
def test_norms(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape, scale=3), normal(shape[-1], seed=1)
    found = _kernels.rms_norm(float32(x), float32(weight), 1e-6)
    close(found, rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("shape", [(1, 128), (3, 2 * 19), (2, 5, 64), (2,)])
def test_gates(shape: tuple[int, ...]) -> None:
    x = normal(*shape, scale=4)
    gate, up = np.split(x, 2, axis=-1)
    close(_kernels.swiglu(float32(x)), gate / (1 + np.exp(-gate)) * up)


def test_gates_far_from_zero_overflow_nowhere_and_keep_what_is_no_number() -> None:
    gate = np.array([-1e30, -500, -90, -87.5, -20, 0, 20, 500, 1e30])
    x = float32(np.concatenate([gate, np.ones(9)]))
    wanted = np.where(gate > -88, gate / (1 + np.exp(-np.maximum(gate, -88))), 0)
    assert np.allclose(np.array(_kernels.swiglu(x)), wanted, rtol=1e-6, atol=1e-35)
    for n in (1, 8):
        assert np.isnan(np.array(_kernels.swiglu(mx.full((2 * n,), float("nan"))))).all()


@pytest.mark.parametrize("dim", [2, 16, 64, 128])
def test_turns_are_exact_at_any_position(dim: int) -> None:
    positions = np.array([[0, 1, 2047, 100_000], [-3, 5, 7, 11]])
    angles = positions[..., None] * 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    found = _kernels.rope_turns(mx.array(positions, mx.int32), dim, 10_000.0)
    close(found, np.concatenate([np.cos(angles), np.sin(angles)], -1), 1e-7)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dim", [6, 16, 64])
def test_heads(dim: int, batch: int, normed: bool) -> None:
    length, query_heads, kv_heads = 5, 4, 2
    x = normal(batch, length, query_heads + 2 * kv_heads, dim)
    q_norm, k_norm = normal(dim, seed=1), normal(dim, seed=2)
    angles = normal(batch, length, dim // 2, seed=3)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, :, None] for f in (np.cos, np.sin))
    turns = float32(np.concatenate([np.cos(angles), np.sin(angles)], -1))

    def rotated(heads: np.ndarray, weight: np.ndarray) -> np.ndarray:
        y = rms_norm(heads, weight, 1e-6) if normed else heads
        a, b = np.split(y, 2, axis=-1)
        return y * cos + np.concatenate([-b, a], -1) * sin

    q, k, v = np.split(x, (query_heads, query_heads + kv_heads), axis=2)
    queries, keys_values = _kernels.heads(
        float32(x.reshape(batch * length, -1)),
        float32(q_norm) if normed else None,
        float32(k_norm) if normed else None,
        turns,
        batch,
        query_heads,
        kv_heads,
        1e-6,
    )
    close(queries, (rotated(q, q_norm) * dim**-0.5).swapaxes(1, 2))
    close(keys_values, np.concatenate([rotated(k, k_norm), v], 2).swapaxes(1, 2))


def attention(q: np.ndarray, kv: np.ndarray, mask: np.ndarray) -> np.ndarray:
    B, heads, L, _ = q.shape
    k, v = (np.repeat(x, heads // x.shape[1], 1) for x in np.split(kv, 2, axis=1))
    scores = np.where(mask[:, None], q @ k.swapaxes(-1, -2), -np.inf)
    nothing = ~mask.any(-1)[:, None, :, None]
    e = np.exp(scores - np.where(nothing, 0, scores.max(-1, keepdims=True)))
    y = e @ v / np.where(nothing, 1, e.sum(-1, keepdims=True))
    return y.swapaxes(1, 2).reshape(B * L, -1)


def masks(batch: int, length: int, slots: int) -> dict[str, np.ndarray]:
    """What steps see: earlier tokens; of padded sequences; with gaps; nothing."""
    causal = np.arange(slots) <= slots - length + np.arange(length)[:, None]
    padded = causal & (np.arange(slots) >= 3 * np.arange(batch)[:, None, None])
    gaps = np.random.default_rng(5).random((batch, length, slots)) < 0.6
    gaps[:, 0] = False  # beside tokens that see something
    return {
        "causal": causal[None],
        "padded": padded,
        "gaps": gaps,
        "nothing": np.zeros((1, length, slots), bool),
    }


@pytest.mark.parametrize("kind", ["causal", "padded", "gaps", "nothing"])
@pytest.mark.parametrize(
    ("batch", "length", "slots"), [(1, 1, 9), (2, 3, 64), (2, 8, 21), (3, 9, 40), (2, 150, 300)]
)
@pytest.mark.parametrize("dim", [6, 16, 64])
def test_attention(dim: int, batch: int, length: int, slots: int, kind: str) -> None:
    mask = masks(batch, length, slots)[kind]
    q, kv = normal(batch, 4, length, dim), normal(batch, 4, slots, dim, seed=1)
    found = _kernels.attention(float32(q), [float32(kv)], mx.array(mask))
    close(found, attention(q, kv, np.broadcast_to(mask, (batch, length, slots))), 5e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize(("dim", "group"), [(64, 64), (128, 32)])
def test_attention_to_quantized_keys_and_values(
    dim: int, group: int, length: int, bits: int
) -> None:
    q, kv = normal(2, 4, length, dim), normal(2, 2, 40, dim, seed=1)
    scheme = Scheme(group, bits).to_dict()
    buffer = mx.quantize(float32(kv), **scheme)
    mask = masks(2, length, 40)["padded"]
    wanted = attention(q, np.array(mx.dequantize(*buffer, **scheme)), mask)
    close(_kernels.attention(float32(q), buffer, mx.array(mask), bits), wanted, 5e-6)


def test_scores_that_differ_by_hundreds_are_no_trouble() -> None:
    q, kv = normal(1, 1, 1, 16, scale=30), normal(1, 2, 33, 16, seed=1, scale=10)
    mask = np.ones((1, 1, 33), bool)
    wanted = attention(q, kv, mask)
    close(_kernels.attention(float32(q), [float32(kv)], mx.array(mask)), wanted, 1e-4)


def test_unseen_slots_may_hold_anything() -> None:
    kv = np.full((1, 2, 40, 16), np.nan)
    kv[:, :, :20] = normal(1, 2, 20, 16)
    for length in (1, 20):
        q = normal(1, 1, length, 16, seed=1)
        mask = np.zeros((1, length, 40), bool)
        mask[..., :20] = True
        wanted = attention(q, kv[:, :, :20], mask[..., :20])
        close(_kernels.attention(float32(q), [float32(kv)], mx.array(mask)), wanted)


def test_what_does_not_fit_is_refused() -> None:
    x, mask = mx.zeros((1, 2, 3, 8)), mx.ones((1, 3, 5), mx.bool_)
    turns = mx.zeros((1, 3, 8))
    cached, scales = mx.zeros((1, 2, 5, 2), mx.uint32), mx.zeros((1, 2, 5, 1))
    halves = mx.zeros((1, 2, 5, 2))  # groups of 4 values

    def words(count: int) -> mx.array:
        return mx.zeros((3, count), mx.uint32)

    for call in (
        lambda: _kernels.rms_norm(mx.zeros((2, 8)), mx.zeros(7), 1e-6),
        lambda: _kernels.quantized_matmul(
            mx.zeros((1, 96)), *mx.quantize(mx.zeros((8, 96)), 32), 4
        ),
        lambda: _kernels.quantized_matmul(mx.zeros((1, 64)), *mx.quantize(mx.zeros((8, 64))), 8),
        lambda: _kernels.quantized_matmul(mx.zeros((1, 64)), *mx.quantize(mx.zeros((8, 64))), 3),
        lambda: _kernels.rms_norm(mx.zeros((2, 8), mx.float16), mx.zeros(8), 1e-6),
        # 16 values a group, and 96: the kernel has no such loop
        lambda: _kernels.quantized_matmul(mx.zeros((1, 64)), words(8), *[mx.zeros((3, 4))] * 2, 4),
        lambda: _kernels.quantized_matmul(
            mx.zeros((1, 192)), words(24), *[mx.zeros((3, 2))] * 2, 4
        ),
        lambda: _kernels.attention(x, [cached, scales, scales[:, :1]], mask, 8),
        lambda: _kernels.attention(x, [cached, scales[:, :, 1:], scales], mask, 8),
        lambda: _kernels.attention(x, [cached, halves, halves], mask, 8),
        lambda: _kernels.swiglu(mx.zeros((2, 7))),
        lambda: _kernels.rope_turns(mx.zeros((1, 3)), 8, 1e4),
        lambda: _kernels.heads(mx.zeros((3, 30)), None, None, turns, 1, 2, 1, 1e-6),
        lambda: _kernels.heads(mx.zeros((3, 32)), mx.zeros(7), mx.zeros(8), turns, 1, 2, 1, 1e-6),
        lambda: _kernels.attention(x, [mx.zeros((1, 2, 5, 16))], mask),
        lambda: _kernels.attention(x, [mx.zeros((1, 2, 6, 8))], mask),
        lambda: _kernels.attention(x, [mx.zeros((1, 2, 5, 8))], mx.ones((1, 3, 5))),
        lambda: _kernels.attention(x, [mx.zeros((1, 6, 5, 8))], mask),
    ):
        with pytest.raises(ValueError, match=": |are for"):
            call()


def test_no_compiler_runs_beside_a_text(tmp_path: Path) -> None:
    """MLX compiles C++ for what it fuses on a CPU: a first text would wait for that."""
    text = (
        "from mlx_openelm import load, generate\nm, t = load('demo')\n"
        "generate(m, t, 'Once upon a time', max_tokens=20)\n"
        "generate(m, t, 'Once upon a time', max_tokens=20, kv_bits=8)\n"
    )
    environment = {"PATH": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(SOURCE.parent)}
    subprocess.run([sys.executable, "-c", text], env=environment, check=True, timeout=100)
    assert not list(tmp_path.rglob("*.so")) + list(tmp_path.rglob("*.cpp"))


def policy_in(folder: Path, **environment: str) -> tuple[str, str]:
    command = (
        "import sys\n"  # an editable installation would find what the folder lacks
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f.__module__)]\n"
        "import mlx_openelm.device as d; print(d.policy())"
    )
    result = subprocess.run(
        [sys.executable, "-c", command],
        env={"PYTHONPATH": str(folder), "MLX_OPENELM_BLAS": "0", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout, result.stderr


def test_they_are_used_unless_they_are_switched_off() -> None:
    assert ", own kernels," in policy_in(SOURCE.parent)[0]
    text, warning = policy_in(SOURCE.parent, MLX_OPENELM_KERNELS="0")
    assert "no kernels of its own (MLX_OPENELM_KERNELS=0)" in text
    assert ", MLX's kernels," in text
    assert warning == ""


def test_an_installation_without_them_computes_with_mlxs(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("*.so", "benchmarks")
    shutil.copytree(SOURCE, tmp_path / "mlx_openelm", ignore=left_out)
    text, warning = policy_in(tmp_path)
    assert "no kernels of its own (not compiled at installation)" in text
    assert warning == ""


def test_a_library_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    """One with symbols that the MLX of today lacks, say."""
    shutil.copytree(SOURCE, tmp_path / "mlx_openelm", ignore=shutil.ignore_patterns("benchmarks"))
    [library] = (tmp_path / "mlx_openelm").glob("_kernels.*so")
    library.write_bytes(b"no library")
    text, warning = policy_in(tmp_path)
    assert ", MLX's kernels," in text
    assert warning.count("several times slower: they can't be loaded (") == 1


def test_they_are_not_used_with_another_mlx_and_that_is_told(tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "mlx_openelm", ignore=shutil.ignore_patterns("benchmarks"))
    [library] = (tmp_path / "mlx_openelm").glob("_kernels.*so")
    library.unlink()
    library.with_name("_kernels.py").write_text("MLX_VERSION = '0.1.2'\n")
    text, warning = policy_in(tmp_path)
    assert "they are for MLX 0.1.2, and " in text
    assert warning.count("several times slower: they are for MLX 0.1.2") == 1
