"""What the machine can do: memory bandwidth, and operations a second.

Products are MLX's, or those of the C library where that computes the network: on a Linux CPU MLX's
wheel has a reference BLAS, which is far below what the machine can do.

Speeds of one machine drift by half within a run, so a short calibration is taken again before
every turn of the trials: it says whether a difference between two runs is one of the code.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from functools import cache

import mlx.core as mx

from mlx_openelm import device
from mlx_openelm.backends import cpu
from mlx_openelm.model.quantization import Matrix, Scheme, quantize

from .results import Calibration

DTYPES = ("float32", "float16", "bfloat16", "4bit")
BYTES = 256 << 20  # of the buffer whose bandwidth is taken: more than any cache holds
WIDTH = 2048  # of the matrices
MOST_ROWS = 4096
FULL_SECONDS = 0.25  # for each figure
SHORT_SECONDS = 0.05


def full() -> Calibration:
    """All figures, within some seconds."""
    return Calibration(bandwidth(FULL_SECONDS), {d: matmul(d, FULL_SECONDS) for d in DTYPES})


def short(dtypes: Iterable[str]) -> Calibration:
    """The bandwidth and a few matmul rates, in a fraction of a second."""
    return Calibration(bandwidth(SHORT_SECONDS), {d: matmul(d, SHORT_SECONDS) for d in dtypes})


def bandwidth(seconds: float) -> float:
    """Bytes a second, read and written: a large buffer is added to in place.

    In place, since on a CPU a fresh result costs more in page faults than in moving bytes. There
    it is done in as many streams as there are cores, for MLX computes a stream in one thread.
    """
    parts, streams = _parts()

    def add() -> None:
        for i, stream in enumerate(streams):
            parts[i] = mx.add(parts[i], 1.0, stream=stream)  # donated: nobody else holds it
        mx.eval(parts)

    return 2 * sum(part.nbytes for part in parts) / _least(add, seconds)


def matmul(dtype: str, seconds: float) -> float:
    """Operations a second of [rows, WIDTH] @ [WIDTH, WIDTH], counting 2 for multiply and add.

    "4bit" is affine quantized, with the activations that this device computes in. There are as many
    rows as fit into the time.
    """
    multiply, rows = _multiplication(dtype), 8
    while rows < MOST_ROWS and _least(multiply(rows), 0) < seconds / 8:
        rows *= 2
    return 2 * rows * WIDTH * WIDTH / _least(multiply(rows), seconds)


@cache
def _parts() -> tuple[list[mx.array], list[mx.Stream]]:
    if mx.default_device().type == mx.DeviceType.cpu:
        streams = [mx.new_stream(mx.cpu) for _ in range(os.cpu_count() or 1)]
    else:
        streams = [mx.default_stream(mx.default_device())]
    parts = [mx.zeros((BYTES // 4 // len(streams),)) for _ in streams]
    mx.eval(parts)
    return parts, streams


@cache
def _multiplication(dtype: str) -> Callable[[int], Callable[[], None]]:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    activations = (mx.float32 if on_cpu else mx.float16) if dtype == "4bit" else getattr(mx, dtype)
    weight = mx.random.normal((WIDTH, WIDTH), key=mx.random.key(0)).astype(activations)
    matrix = quantize(weight, Scheme(64, 4)) if dtype == "4bit" else Matrix(weight)
    mx.eval(list(matrix.arrays()))
    native = device.policy().native

    def rows(count: int) -> Callable[[], None]:
        x = mx.ones((count, WIDTH), activations)
        mx.eval(x)
        if native:
            return lambda: mx.eval(cpu.multiply(x, matrix))
        return lambda: mx.eval(matrix(x))

    return rows


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _least(work: Callable[[], None], seconds: float) -> float:
    """The least time of at least two runs: what the machine can do when it is let."""
    work()
    end = time.perf_counter() + seconds
    least = _timed(work)
    while time.perf_counter() < end:
        least = min(least, _timed(work))
    return least
