"""The C library for CPUs: its products, its steps, and that it leaves the process alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_openelm import InputError, device
from mlx_openelm.backends import cpu
from mlx_openelm.backends.cpu import library
from mlx_openelm.model.quantization import Matrix, Scheme, quantize

from .models import CONFIGS, random_model

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

KINDS = {
    "float32": lambda w: Matrix(w),
    "float16": lambda w: Matrix(w.astype(mx.float16)),
    "bfloat16": lambda w: Matrix(w.astype(mx.bfloat16)),
    "4 bits in groups of 32": lambda w: quantize(w, Scheme(32, 4)),
    "4 bits in groups of 64": lambda w: quantize(w, Scheme(64, 4)),
    "8 bits in groups of 32": lambda w: quantize(w, Scheme(32, 8)),
    "8 bits in groups of 128": lambda w: quantize(w, Scheme(128, 8)),
}
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100)


def values(matrix: Matrix) -> np.ndarray:
    """What a matrix stands for, in float64."""
    plain = matrix.take(mx.arange(matrix.weight.shape[0]), mx.float32)
    return np.array(plain).astype(np.float64)


def rounding(x: np.ndarray, matrix: Matrix) -> np.ndarray:
    """The most that rounding to float32 changes x @ w.T: (n + 2) u |x| @ |w|.T for n columns
    (N. Higham, Accuracy and Stability of Numerical Algorithms, equation 3.5).

    A packed weight is scale · q + bias, and both parts are up to three times its group's largest.
    """
    w = np.abs(values(matrix))
    if matrix.scheme is not None:
        w = np.full_like(w, 3 * w.max())
    return (x.shape[1] + 2) * 2**-24 * (np.abs(x).astype(np.float64) @ w.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 128), (7, 256), (65, 384), (300, 640), (64, 1408)]
)
def test_products_of_every_kind(kind: str, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    matrix = KINDS[kind](mx.array(rng.standard_normal((rows, columns), np.float32)))
    assert cpu.can_multiply(matrix)
    for count in COUNTS:
        x = rng.standard_normal((count, columns), np.float32)
        wanted = x.astype(np.float64) @ values(matrix).T
        found = np.array(cpu.multiply(mx.array(x), matrix))
        assert np.all(np.abs(found - wanted) <= rounding(x, matrix)), count


@pytest.mark.parametrize("columns", [1, 3, 8, 12, 33, 250])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_products_of_any_width(kind: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    matrix = KINDS[kind](mx.array(rng.standard_normal((11, columns), np.float32)))
    for count in (1, 4, 8, 9, 40):
        x = rng.standard_normal((count, columns), np.float32)
        wanted = x.astype(np.float64) @ values(matrix).T
        found = np.array(cpu.multiply(mx.array(x), matrix))
        assert np.all(np.abs(found - wanted) <= rounding(x, matrix)), count


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_16_bit_value_is_read_as_what_it_is(dtype: mx.Dtype) -> None:
    """Subnormal numbers, infinities and NaN included, by both ways to multiply."""
    bits = mx.arange(65536).astype(mx.uint16)
    matrix = Matrix(mx.view(bits, dtype).reshape(-1, 1))
    wanted = np.array(mx.view(bits, dtype).astype(mx.float32))
    for count in (1, 9):
        found = np.array(cpu.multiply(mx.ones((count, 1)), matrix))
        assert all(np.array_equal(row, wanted, equal_nan=True) for row in found)


def test_what_cannot_be_multiplied_as_stored_is_known() -> None:
    w = mx.random.normal((8, 256))
    for scheme in (Scheme(32, 4, "mxfp4"), Scheme(32, 8, "mxfp8"), Scheme(64, 3), Scheme(64, 6)):
        assert not cpu.can_multiply(quantize(w, scheme))
    assert not cpu.can_multiply(quantize(w[:, :32], Scheme(32, 4)))


def test_a_token_that_is_not_one_is_refused() -> None:
    model = random_model(CONFIGS["uneven"], device.Policy("CPU", mx.float32, native=True))
    for token in (-1, model.config.vocab_size):
        with pytest.raises(InputError, match="token id"):
            model(mx.array([[1, token]]))


def test_a_step_that_has_no_room_is_refused() -> None:
    """As when another thread uses the same cache: `reserve` was for another offset then."""
    model = random_model(CONFIGS["uneven"], device.Policy("CPU", mx.float32, native=True))
    cache = model.make_cache()
    model(mx.array([[1]]), cache)
    for offset in (cache.capacity - 1, -1):
        cache.offset = offset
        with pytest.raises(InputError, match="no room"):
            model._network(mx.array([[1, 2]]), cache, False)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_weights_stay_as_they_are_stored(dtype: mx.Dtype) -> None:
    """Half of the bytes of float32, and the logits of those values in float32."""
    policy = device.Policy("CPU", mx.float32, native=True)
    plain = random_model(CONFIGS["untied"], policy)
    stored = {name: array.astype(dtype) for name, array in plain.parameters().items()}
    model = type(plain)(plain.config, stored, policy=policy)
    matrices = [a for a in model.parameters().values() if a.ndim == 2]
    assert all(array.dtype == dtype for array in matrices)
    widened = {name: array.astype(mx.float32) for name, array in stored.items()}
    reference = type(plain)(plain.config, widened, policy=device.Policy("CPU", mx.float32))
    tokens = mx.array([[5, 3, 8, 1, 9, 2, 6, 4, 7, 1, 1, 2]])
    difference = mx.abs(model(tokens) - reference(tokens)).max().item()
    assert difference < 1e-4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_what_is_dequantized_once_is_computed_in_float32(dtype: mx.Dtype) -> None:
    """Not in the dtype of scales and biases, which is what MLX does."""
    packed = quantize(mx.random.normal((8, 64)), Scheme(32, 6))
    assert packed.scales is not None and packed.biases is not None
    scales, biases = packed.scales.astype(dtype), packed.biases.astype(dtype)
    stored = Matrix(packed.weight, scales, biases, packed.scheme)
    exact = Matrix(
        packed.weight, scales.astype(mx.float32), biases.astype(mx.float32), packed.scheme
    )
    assert mx.array_equal(stored.dequantize(mx.float32).weight, exact.dequantize(mx.float32).weight)


def test_threads_share_the_workers() -> None:
    model = random_model(CONFIGS["uneven"], device.Policy("CPU", mx.float32, native=True))
    tokens = mx.array([list(range(60)), list(range(30, 90))])
    wanted = model(tokens).tolist()
    library.load().openelm_set_threads(4)
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.extend(model(tokens).tolist() for _ in range(20)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library.load().openelm_set_threads(library.threads())
    assert len(found) == 60 and all(logits == wanted for logits in found)


def test_a_forked_child_has_workers_of_its_own() -> None:
    """MLX's streams don't outlive a fork; the library does, also while others compute."""
    code = """
import ctypes, os, sys, threading
from mlx_openelm.backends.cpu import library
lib = library.load()
lib.openelm_set_threads(4)
n = 512
w, x = (ctypes.c_float * (n * n))(*[1] * (n * n)), (ctypes.c_float * n)(*[1] * n)
matrix = library.Matrix(weight=ctypes.addressof(w), kind=0, rows=n, columns=n)
def product():
    y = (ctypes.c_float * n)()
    lib.openelm_multiply(ctypes.addressof(x), 1, matrix, ctypes.addressof(y), 0)
    return list(y) == [n] * n
assert product()
stop = threading.Event()
def compute():
    while not stop.is_set(): product()
threading.Thread(target=compute).start()
statuses = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if product() and product() else 1)
    statuses.append(os.waitpid(child, 0)[1])
stop.set()
sys.exit(any(statuses))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing_in_the_process() -> None:
    """No symbol, no environment variable, no thread, also when MLX was imported first."""
    code = """
import ctypes, os, threading
def state():
    whole = ctypes.CDLL(None)
    names = ("cblas_sgemm", "openelm_compute", "openelm_pool_run", "malloc", "_Znwm")
    address = lambda name: ctypes.cast(getattr(whole, name), ctypes.c_void_p).value
    symbols = {name: hasattr(whole, name) and address(name) for name in names}
    return symbols, dict(os.environ), len(os.listdir("/proc/self/task"))
import mlx.core as mx
mx.eval(mx.zeros(3) + 1)
before = state()
import mlx_openelm
from mlx_openelm.backends.cpu import library
library.load()
assert state() == before, (before, state())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "9" * 30, "two", "", "3,2", " 2 "])
def test_any_number_of_threads_can_be_asked_for(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    given = {"3,2": 3, " 2 ": 2}
    assert library.threads() == given.get(value, len(os.sched_getaffinity(0)))


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "0")
    library.missing.cache_clear()
    try:
        assert device.policy().native is False
        assert library.VARIABLE in str(device.policy())
    finally:
        monkeypatch.undo()
        library.missing.cache_clear()


@pytest.mark.parametrize("option", ["-DPORTABLE", "-fsanitize=address,undefined"])
def test_the_library_compiles_and_computes_elsewhere(option: str, tmp_path: Path) -> None:
    """For an x86-64 without AVX, and with sanitizers that look at every access."""
    sources = Path(library.__file__).parent / "src"
    built = tmp_path / "libopenelm.so"
    command = ["g++", "-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]
    command += ["-fno-strict-aliasing", "-fno-sanitize-recover", option]
    subprocess.run([*command, *map(str, sources.glob("*.cpp")), "-o", str(built)], check=True)
    code = f"""
import os, sys
from pathlib import Path
from mlx_openelm.backends.cpu import library
library._file = lambda: Path({str(built)!r})
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {__file__!r}, "-k",
    "products or refused or 16_bit or stay"]))
"""
    preload = {}
    if "address" in option:
        found = subprocess.run(
            ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        )
        preload = {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | preload,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


OUT_OF_MEMORY = """
import resource

import mlx.core as mx
from mlx_openelm import OpenELMError
from mlx_openelm.backends import cpu
from mlx_openelm.model.quantization import Matrix

def ones(rows, columns, dtype=mx.float32):
    array = mx.ones((rows, columns), dtype)
    mx.eval(array)
    return array

wide = ones({count}, {columns}), Matrix(ones({rows}, {columns}, mx.bfloat16))
small = ones(32, 4096), Matrix(ones(512, 4096, mx.bfloat16))
cpu.multiply(*small)  # starts the threads
status = open("/proc/self/status").read().split()
size = 1024 * int(status[status.index("VmSize:") + 1])
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size + ({allowed} << 20), most))
try:
    cpu.multiply(*wide)
except OpenELMError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(mx.all(cpu.multiply(*small) == 4096).item(), cpu.multiply(*wide)[0, 0].item())
"""


@pytest.mark.parametrize(
    ("count", "rows", "columns", "allowed"),
    [
        pytest.param(200_000, 8, 128, 40, id="the caller's panels, 98 MiB"),
        pytest.param(9, 256, 1 << 18, 40, id="blocks of 48 MiB or more on each thread"),
    ],
)
def test_running_out_of_memory_is_an_error(
    count: int, rows: int, columns: int, allowed: int
) -> None:
    script = OUT_OF_MEMORY.format(count=count, rows=rows, columns=columns, allowed=allowed)
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        "out of memory: give the prompt in shorter steps (prefill_step_size) or fewer sequences",
        f"True {float(columns)}",
    ]


def test_buffers_of_a_long_prompt_are_freed_by_the_steps_after_it() -> None:
    def resident() -> int:  # MiB
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
        )

    matrix = Matrix(mx.ones((8, 128)))
    x = mx.ones((400_000, 128))  # 195 MiB, and as much again in panels
    cpu.multiply(x, matrix)
    before = resident()
    cpu.multiply(x[:9], matrix)
    assert before - resident() > 150
