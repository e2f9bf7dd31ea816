"""A fast BLAS and the kernel for few rows are used where they are, and compute the same."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm import allocator, blas

needs_kernel = pytest.mark.skipif(blas.KERNEL is None, reason="the kernel isn't built")
PACKAGE = Path(blas.__file__).parent
SOURCES = [PACKAGE / "cpu" / name for name in ("sgemm.c", "pool.c")]
ROW_MAJOR, COLUMN_MAJOR, NO_TRANS, TRANS = 101, 102, 111, 112

LOGITS = """
import json
from mlx_openelm import blas, load
import mlx.core as mx
model, _ = load("demo")
logits = [model(mx.array([list(range(3, 3 + length))]))[0, -1] for length in (40, 5)]
print(json.dumps([blas.in_use, mx.concatenate(logits).tolist()]))
"""


def python(
    code: str, *options: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs it in `folder`, whose packages come first."""
    command = [sys.executable, *options, "-c", code]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, cwd=folder
    )


@pytest.fixture(scope="module")
def openblas() -> str:
    """The name of the system's OpenBLAS."""
    for name in blas.SONAMES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    pytest.skip("no OpenBLAS on this system")


def in_words(name: str) -> str:
    return f"{name}, few rows: own kernel" if blas.KERNEL else name


def test_it_is_found_and_agrees_with_mlxs_own(openblas: str) -> None:
    found, fast = json.loads(python(LOGITS, "-W", "error", MLX_OPENELM_BLAS="").stdout)
    none, slow = json.loads(python(LOGITS, "-W", "error", MLX_OPENELM_BLAS="0").stdout)
    assert (found, none) == (in_words(openblas), None)
    difference = np.abs(np.array(fast) - np.array(slow)).max()
    assert 0 < difference < 1e-4  # another order of additions, no other mathematics


@needs_kernel
def test_the_kernel_serves_alone_where_no_blas_is() -> None:
    found, fast = json.loads(python(LOGITS, "-W", "error", MLX_OPENELM_BLAS="own").stdout)
    _, slow = json.loads(python(LOGITS, "-W", "error", MLX_OPENELM_BLAS="0").stdout)
    assert found == "own kernel"
    assert 0 < np.abs(np.array(fast) - np.array(slow)).max() < 1e-4


def test_without_the_kernel_all_is_as_it_was(openblas: str, tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("*.so", "benchmarks")
    shutil.copytree(PACKAGE, tmp_path / "mlx_openelm", ignore=left_out)
    result = python(LOGITS, "-W", "error", folder=tmp_path, PYTHONPATH=str(tmp_path))
    found, _ = json.loads(result.stdout)
    assert found == openblas


def test_too_late_is_told_and_nothing_fails(openblas: str) -> None:
    result = python("import mlx.core, mlx_openelm\n" + LOGITS)
    assert result.returncode == 0
    assert json.loads(result.stdout)[0] is None
    assert result.stderr.count("RuntimeWarning: mlx was imported before mlx_openelm") == 1
    quiet = python("import mlx.core, mlx_openelm", MLX_OPENELM_BLAS="0")
    assert quiet.stderr == ""


def test_a_library_can_be_named(openblas: str) -> None:
    result = python("import mlx_openelm.blas as b; print(b.in_use)", MLX_OPENELM_BLAS=openblas)
    assert result.stdout.strip() == in_words(openblas)
    wrong = python("import mlx_openelm.blas as b; print(b.in_use)", MLX_OPENELM_BLAS="./none.so")
    assert wrong.returncode == 0
    assert wrong.stdout.strip() == "None"
    assert "MLX_OPENELM_BLAS=./none.so" in wrong.stderr
    other = python("import mlx_openelm.blas as b; print(b.in_use)", MLX_OPENELM_BLAS="libm.so.6")
    assert other.stdout.strip() == "None"


@pytest.mark.skipif(sys.platform != "linux", reason="MLX needs no help there")
def test_a_checkout_with_a_compiler_has_the_kernel() -> None:
    if not shutil.which("cc") or not (PACKAGE.parent / "setup.py").exists():
        pytest.skip("no compiler, or not a checkout")
    assert blas.KERNEL is not None, "pip install -e . (or python setup.py build_ext --inplace)"
    assert allocator.LIBRARY is not None or not shutil.which("c++"), "the same"


# ---- The kernel itself


class Kernel:
    """A copy of the kernel: MLX's own, in this process, keeps its settings."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        number, array = ctypes.c_int, ctypes.c_void_p
        signature = [*[number] * 6, ctypes.c_float, array, number, array, number]
        signature += [ctypes.c_float, array, number]
        self._sgemm = self.library.cblas_sgemm
        self._sgemm.argtypes, self._sgemm.restype = signature, None
        self._following = ctypes.CFUNCTYPE(None, *signature)

    set_threads: Any = None

    def set(self, rows: int = 16, columns: int = 128, threads: int = 1) -> None:
        self.library.sgemm_set(None, rows, columns, threads)

    def pass_on_to(self, function: Callable[..., None]) -> None:
        self._next = self._following(function)  # kept alive
        self.library.sgemm_set(self._next, 0, 0, 0)

    def __call__(self, *arguments: Any) -> None:
        """As `cblas_sgemm`, with arrays for the pointers."""
        self._sgemm(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))


def fresh(path: Path, folder: Path) -> Kernel:
    return Kernel(Path(shutil.copy(path, folder / "kernel.so")))


@pytest.fixture(scope="module", params=["as installed", "portable"])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The kernel as it is installed, and as it is where the processor has no AVX2."""
    folder = tmp_path_factory.mktemp("kernel")
    if request.param == "as installed":
        if blas.KERNEL is None:
            pytest.skip("the kernel isn't built")
        return fresh(blas.KERNEL, folder)
    if sys.platform != "linux" or not shutil.which("cc") or not SOURCES[0].exists():
        pytest.skip("no compiler, or no source")
    options = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
    files = [*map(str, SOURCES), "-o", str(folder / "portable.so")]
    subprocess.run(["cc", "-DPORTABLE", *options, *files], check=True)
    return fresh(folder / "portable.so", folder)


sizes = st.integers(0, 70) | st.sampled_from([127, 128, 129, 256, 300, 1000])
scalars = st.sampled_from([0.0, 1.0, -1.0, 0.125, 2.5])


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(0, 20),
    columns=sizes,
    inner=sizes,
    padding=st.tuples(*[st.integers(0, 9)] * 3),
    alpha=scalars,
    beta=scalars,
    transposed=st.booleans(),
    by_columns=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_it_computes_what_float64_does(
    kernel: Kernel,
    rows: int,
    columns: int,
    inner: int,
    padding: tuple[int, int, int],
    alpha: float,
    beta: float,
    transposed: bool,
    by_columns: bool,
    threads: int,
    seed: int,
) -> None:
    kernel.set(threads=threads, rows=20, columns=2**31 - 1)
    rng = np.random.default_rng(seed)
    b_shape = (columns, inner) if transposed else (inner, columns)
    shapes = [(rows, inner), b_shape, (rows, columns)]
    # Rows are longer than they need be, and what is beyond them must neither be used nor written
    memory = [
        np.full((height, width + extra), np.nan, np.float32)
        for (height, width), extra in zip(shapes, padding, strict=True)
    ]
    for array, (_, width) in zip(memory, shapes, strict=True):
        array[:, :width] = rng.standard_normal((len(array), width))
    a, b, c = memory
    before = c[:, :columns].astype(np.float64)
    if beta == 0:
        c[:] = np.nan  # is not read
    matrix = b[:, : b_shape[1]].astype(np.float64)
    product = a[:, :inner].astype(np.float64) @ (matrix.T if transposed else matrix)
    flag = TRANS if transposed else NO_TRANS
    lengths = [max(1, array.shape[1]) for array in memory]
    if by_columns:  # the same memory, as Fortran would say it
        kernel(COLUMN_MAJOR, flag, NO_TRANS, columns, rows, inner, alpha, b, lengths[1], a,
               lengths[0], beta, c, lengths[2])  # fmt: skip
    else:
        kernel(ROW_MAJOR, NO_TRANS, flag, rows, columns, inner, alpha, a, lengths[0], b,
               lengths[1], beta, c, lengths[2])  # fmt: skip
    expected = alpha * product + (beta * before if beta else 0)
    np.testing.assert_allclose(c[:, :columns], expected, rtol=1e-5, atol=2e-5 * (1 + inner**0.5))
    assert np.isnan(c[:, columns:]).all()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 16])
def test_long_sums_are_as_exact_as_openblas(
    kernel: Kernel, openblas: str, rows: int, transposed: bool
) -> None:
    rng = np.random.default_rng(rows)
    columns, inner = 64, 8192
    kernel.set(threads=2)
    a = rng.random((rows, inner), np.float32)
    b = rng.random((columns, inner) if transposed else (inner, columns), np.float32)
    exact = a.astype(np.float64) @ (b.T if transposed else b).astype(np.float64)
    errors = []
    theirs = Kernel(Path(openblas))
    for function in (kernel, theirs):
        c = np.empty((rows, columns), np.float32)
        function(ROW_MAJOR, NO_TRANS, TRANS if transposed else NO_TRANS, rows, columns, inner,
                 1.0, a, inner, b, b.shape[1], 0.0, c, columns)  # fmt: skip
        errors.append(float(np.sqrt(np.mean((c - exact) ** 2))))
    assert errors[0] <= 1.5 * errors[1]


def test_large_products_are_shared_among_threads(kernel: Kernel) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((2, 512), (3001, 512)))
    results = []
    for threads in (1, 2, 5, 100):
        kernel.set(threads=threads)
        for _ in range(20):
            c = np.empty((2, 3001), np.float32)
            kernel(ROW_MAJOR, NO_TRANS, TRANS, 2, 3001, 512, 1.0, a, 512, b, 512, 0.0, c, 3001)
            results.append(c)
    assert all(np.array_equal(results[0], c) for c in results)  # a chunk is the same whose it is
    np.testing.assert_allclose(results[0], a @ b.T, atol=1e-3)


def test_callers_may_be_several(kernel: Kernel) -> None:
    """Threads of the callers, and a child process forked while workers exist."""
    rng = np.random.default_rng(0)
    kernel.set(threads=3)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((1, 512), (2000, 512)))
    expected = a @ b.T

    def product() -> bool:
        c = np.empty((1, 2000), np.float32)
        kernel(ROW_MAJOR, NO_TRANS, TRANS, 1, 2000, 512, 1.0, a, 512, b, 512, 0.0, c, 2000)
        return np.allclose(c, expected, atol=1e-3)

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(lambda _: product(), range(200)))
    child = os.fork()
    if child == 0:
        os._exit(0 if all(product() for _ in range(20)) else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0
    assert product()


def test_not_a_number_stays_where_it_is(kernel: Kernel) -> None:
    kernel.set()
    a = np.ones((2, 33), np.float32)
    b = np.ones((7, 33), np.float32)
    a[1, 32], b[3, 0], b[4, 5] = np.inf, np.nan, -np.inf
    c = np.zeros((2, 7), np.float32)
    kernel(ROW_MAJOR, NO_TRANS, TRANS, 2, 7, 33, 1.0, a, 33, b, 33, 0.0, c, 7)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(c, (a.astype(np.float64) @ b.T.astype(np.float64)))
    c[:] = 2
    kernel(ROW_MAJOR, NO_TRANS, TRANS, 2, 7, 33, 0.0, a, 33, b, 33, 1.0, c, 7)
    assert (c == 2).all()  # nothing is added, not even 0 × NaN


@pytest.mark.parametrize("transposed", [True, False])
def test_nothing_is_read_beyond_a_matrix(kernel: Kernel, transposed: bool) -> None:
    """Matrices that end where a page ends, and after it one that can't be read: else, a crash."""
    kernel.set()
    page = mmap.PAGESIZE
    protect = ctypes.CDLL(None).mprotect
    for rows, columns, inner in [(1, 5, 13), (3, 6, 9), (4, 7, 3), (5, 1, 1)]:
        ended = []
        for size in (rows * inner, columns * inner, rows * columns):
            area = np.frombuffer(mmap.mmap(-1, 2 * page), np.uint8)
            barred = ctypes.c_void_p(area.ctypes.data + page)
            assert protect(barred, ctypes.c_size_t(page), 0) == 0
            ended.append(area[page - 4 * size : page].view(np.float32))
        a, b, c = ended
        a[:], b[:] = 1, 1
        flag, length = (TRANS, inner) if transposed else (NO_TRANS, columns)
        kernel(ROW_MAJOR, NO_TRANS, flag, rows, columns, inner, 1.0, a, inner, b, length, 0.0,
               c, columns)  # fmt: skip
        assert (c == inner).all()


@pytest.mark.parametrize(
    ("trans_a", "trans_b", "rows", "columns", "passed_on"),
    [
        (NO_TRANS, TRANS, 16, 500, False),
        (NO_TRANS, TRANS, 17, 500, True),
        (NO_TRANS, NO_TRANS, 1, 500, False),
        (NO_TRANS, NO_TRANS, 4, 128, False),
        (NO_TRANS, NO_TRANS, 4, 129, True),
        (TRANS, TRANS, 4, 64, True),
    ],
)
def test_other_products_are_passed_on(
    kernel: Kernel, trans_a: int, trans_b: int, rows: int, columns: int, passed_on: bool
) -> None:
    kernel.set()
    calls: list[tuple[Any, ...]] = []
    kernel.pass_on_to(lambda *arguments: calls.append(arguments))
    a, b = np.ones(20 * 500, np.float32), np.ones(20 * 500, np.float32)
    c = np.empty((rows, columns), np.float32)
    arguments = (ROW_MAJOR, trans_a, trans_b, rows, columns, 8, 1.0, a, 20, b, 500, 0.0, c, columns)
    kernel(*arguments)
    expected = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    assert calls == ([tuple(expected)] if passed_on else [])


@pytest.fixture
def sharing(kernel: Kernel, tmp_path: Path) -> tuple[Kernel, list[int]]:
    """A kernel whose threads share what is passed on, to its own plain product; and the numbers of
    threads that this was told to use."""
    shared = fresh(Path(kernel.library._name), tmp_path)
    told: list[int] = []

    shared.set_threads = ctypes.CFUNCTYPE(None, ctypes.c_int)(told.append)  # kept alive
    shared.library.sgemm_share(shared.set_threads)
    return shared, told


@pytest.mark.parametrize("trans_a", [TRANS, NO_TRANS])
@pytest.mark.parametrize("trans_b", [TRANS, NO_TRANS])
@pytest.mark.parametrize(
    ("rows", "columns", "inner", "parts"),
    [(150, 301, 60, 5), (301, 150, 60, 5), (20, 2000, 60, 6), (70, 70, 70, 1), (129, 0, 5, 0)],
)
def test_what_is_passed_on_is_shared_by_the_longer_side(
    sharing: tuple[Kernel, list[int]],
    trans_a: int,
    trans_b: int,
    rows: int,
    columns: int,
    inner: int,
    parts: int,
) -> None:
    kernel, told = sharing
    kernel.set(threads=3)
    rng = np.random.default_rng(0)
    # Wider than they need be
    a = rng.standard_normal(
        (inner, rows + 3) if trans_a == TRANS else (rows, inner + 3), np.float32
    )
    b = rng.standard_normal(
        (columns, inner + 5) if trans_b == TRANS else (inner, columns + 5), np.float32
    )
    c = rng.standard_normal((rows, columns + 2), np.float32)
    left = a[:, :rows].T if trans_a == TRANS else a[:, :inner]
    right = b[:, :inner].T if trans_b == TRANS else b[:, :columns]
    expected = c.astype(np.float64)
    product = left.astype(np.float64) @ right.astype(np.float64)
    expected[:, :columns] = 0.5 * product + 2 * expected[:, :columns]
    kernel(ROW_MAJOR, trans_a, trans_b, rows, columns, inner, 0.5, a, a.shape[1], b, b.shape[1],
           2.0, c, columns + 2)  # fmt: skip
    np.testing.assert_allclose(c, expected, atol=1e-4)
    assert told == [1] * parts


def test_callers_at_the_same_time_get_help_in_turns(sharing: tuple[Kernel, list[int]]) -> None:
    kernel, _ = sharing
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((140, 80), (300, 80)))
    expected = a @ b.T

    def product(_: int) -> bool:
        c = np.empty((140, 300), np.float32)
        kernel(ROW_MAJOR, NO_TRANS, TRANS, 140, 300, 80, 1.0, a, 80, b, 80, 0.0, c, 300)
        return np.allclose(c, expected, atol=1e-3)

    for threads in (1, 2, 3, 9):
        kernel.set(threads=threads)
        for callers in (1, 2, 6):  # more than there are jobs
            with ThreadPoolExecutor(callers) as pool:
                assert all(pool.map(product, range(40)))


def test_before_there_is_a_next_it_computes_everything(kernel: Kernel, tmp_path: Path) -> None:
    alone = fresh(Path(kernel.library._name), tmp_path)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((5, 40), (6, 5)))
    c = np.empty((40, 6), np.float32)
    alone(ROW_MAJOR, TRANS, TRANS, 40, 6, 5, 1.0, a, 40, b, 5, 0.0, c, 6)
    np.testing.assert_allclose(c, a.T @ b.T, atol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "threads"), [("3", 3), ("4,2", 4), ("0", 1), ("many", None), ("", None)]
)
def test_threads_are_as_many_as_openmp_is_told(
    monkeypatch: pytest.MonkeyPatch, wanted: str, threads: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    if sys.platform == "linux":
        assert blas._threads() == (threads or len(os.sched_getaffinity(0)))


def test_openblas_leaves_the_threads_to_the_kernel(openblas: str) -> None:
    if blas.KERNEL is None or "openblas" not in openblas:
        pytest.skip("the kernel isn't built, or it's not OpenBLAS")
    code = f"import ctypes, mlx_openelm; b = ctypes.CDLL({openblas!r})\n"
    code += "print(b.openblas_get_num_threads())"
    assert python(code, MLX_OPENELM_BLAS="", OMP_NUM_THREADS="2").stdout.strip() == "1"


@pytest.mark.parametrize(
    ("functions", "shared"),
    [
        ("int openblas_get_parallel(void) { return 0; }", False),  # perhaps not safe to share
        ("int openblas_get_parallel(void) { return 2; } void omp_set_num_threads(int n) {}", True),
        ("int MKL_Set_Num_Threads_Local(int n) { return 4; }", True),
        ("", False),
    ],
)
def test_only_a_blas_that_leaves_the_threads_to_others_gets_parts(
    tmp_path: Path, functions: str, shared: bool
) -> None:
    if blas.KERNEL is None or not shutil.which("cc"):
        pytest.skip("the kernel isn't built, or no compiler")
    source, library = tmp_path / "some.c", tmp_path / "some.so"
    counting = "int calls; void cblas_sgemm(void) { __sync_fetch_and_add(&calls, 1); }\n"
    source.write_text(counting + functions)
    subprocess.run(["cc", "-w", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    code = "import ctypes, mlx_openelm as m, mlx.core as mx; x = mx.ones((200, 200)); "
    code += "mx.eval(x @ x); b = ctypes.CDLL(m.blas.os.environ[m.blas.VARIABLE]); "
    code += "print(m.blas.in_use, ctypes.c_int.in_dll(b, 'calls').value)"
    result = python(code, MLX_OPENELM_BLAS=str(library), OMP_NUM_THREADS="2")
    assert result.stdout.strip() == f"some.so, few rows: own kernel {4 if shared else 1}"


def test_a_blas_that_keeps_its_threads_is_called_by_one_at_a_time(kernel: Kernel) -> None:
    kernel.set()
    calling, most = 0, 0

    def slow(*_: Any) -> None:
        nonlocal calling, most
        calling += 1
        most = max(most, calling)
        time.sleep(0.005)
        calling -= 1

    kernel.pass_on_to(slow)
    x = np.ones((100, 100), np.float32)

    def product(_: int) -> None:
        c = np.empty_like(x)
        kernel(ROW_MAJOR, NO_TRANS, TRANS, 100, 100, 100, 1.0, x, 100, x, 100, 0.0, c, 100)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(product, range(12)))
    assert most == 1


def test_the_blas_stays_out_of_the_way_of_others(openblas: str) -> None:
    """PyTorch's own BLAS has symbols of these names, and would lose to global ones."""
    if blas.KERNEL is None:
        pytest.skip("the kernel isn't built")
    code = "import ctypes, mlx_openelm as m; everyones = ctypes.CDLL(None); "
    code += "print(m.blas.in_use, hasattr(everyones, 'sgemm_'))"
    result = python(code, MLX_OPENELM_BLAS="")
    assert result.stdout.strip() == f"{openblas}, few rows: own kernel False"
