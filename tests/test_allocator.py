"""operator new and delete: no block is given twice, whoever frees it, and MLX uses them."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mlx_openelm import allocator

pytestmark = pytest.mark.skipif(allocator.LIBRARY is None, reason="the allocator isn't built")

GENERATE = """
import json
from mlx_openelm import allocator, generate, load
model, tokenizer = load("demo")
text = generate(model, tokenizer, "Once upon a time", max_tokens=12)
print(json.dumps([allocator.in_use, text]))
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.fixture
def library(tmp_path: Path) -> ctypes.CDLL:
    """A copy of the library: MLX's own, in this process, keeps its lists."""
    assert allocator.LIBRARY is not None
    copy = ctypes.CDLL(str(shutil.copy(allocator.LIBRARY, tmp_path / "copy.so")))
    copy._Znwm.argtypes, copy._Znwm.restype = [ctypes.c_size_t], ctypes.c_void_p
    copy._ZdlPv.argtypes, copy._ZdlPv.restype = [ctypes.c_void_p], None
    copy._ZdlPvm.argtypes, copy._ZdlPvm.restype = [ctypes.c_void_p, ctypes.c_size_t], None
    return copy


Held = tuple[int, int, int]
"""Address, size, and the byte that a block is full of."""


def made(library: ctypes.CDLL, size: int, byte: int) -> Held:
    address = library._Znwm(size)
    assert address % 16 == 0
    ctypes.memset(address, byte, size)
    return address, size, byte


def unmade(library: ctypes.CDLL, held: Held, sized: bool) -> None:
    address, size, byte = held
    assert ctypes.string_at(address, size) == bytes([byte]) * size
    if sized:
        library._ZdlPvm(address, size)
    else:
        library._ZdlPv(address)


@pytest.mark.parametrize("makers", [1, 3])
@pytest.mark.parametrize("enders", [1, 3])
def test_blocks_are_apart_whoever_frees_them(
    library: ctypes.CDLL, makers: int, enders: int
) -> None:
    """Threads make blocks, keep some for themselves, and hand the others to threads that free."""
    handed: queue.Queue[Held | None] = queue.Queue(200)
    failures: list[BaseException] = []

    def make(seed: int) -> None:
        rng, own = random.Random(seed), []
        for _ in range(4000):
            size = rng.choice([1, 8, 24, 25, 40, 41, 200, 1000, 1016, 1017, 5000])
            held = made(library, size, rng.randrange(256))
            if rng.random() < 0.7:
                handed.put(held)
            else:
                own.append(held)
            if own and rng.random() < 0.3:
                unmade(library, own.pop(rng.randrange(len(own))), rng.random() < 0.5)
        for held in own:
            unmade(library, held, True)

    def end() -> None:
        rng = random.Random(0)
        while (held := handed.get()) is not None:
            unmade(library, held, rng.random() < 0.5)

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    making = [threading.Thread(target=run, args=(partial(make, i),)) for i in range(makers)]
    ending = [threading.Thread(target=run, args=(end,)) for _ in range(enders)]
    for thread in making + ending:
        thread.start()
    for thread in making:
        thread.join(60)
    for _ in ending:
        handed.put(None)
    for thread in ending:
        thread.join(60)
    assert not failures, failures[0]


def test_what_one_thread_frees_another_is_given(library: ctypes.CDLL) -> None:
    addresses = [library._Znwm(72) for _ in range(64)]
    ending = threading.Thread(target=lambda: [library._ZdlPvm(a, 72) for a in addresses])
    ending.start()
    ending.join()
    assert {library._Znwm(72) for _ in range(64)} == set(addresses)


def test_blocks_are_mallocs_own(library: ctypes.CDLL) -> None:
    """Libraries that were loaded before free them as the C++ library does, and the other way."""
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.malloc_usable_size.argtypes = [ctypes.c_void_p]
    for size in [*range(1, 1100), 5000]:
        for _ in range(2):
            block = library._Znwm(size)
            assert libc.malloc_usable_size(block) >= size
            libc.free(block)
            library._ZdlPv(libc.malloc(size))
            library._ZdlPvm(libc.malloc(size), size)
    library._ZdlPv(None)
    library._ZdlPvm(None, 8)


def test_a_thread_that_ends_leaves_nothing_behind(library: ctypes.CDLL) -> None:
    def work() -> None:
        for address in [library._Znwm(1000) for _ in range(31)]:
            library._ZdlPvm(address, 1000)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for count in (100, 1000):
        for _ in range(count):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        if count == 100:
            before = resident()
    assert resident() - before < 8e6  # 31 MB if they stayed


def test_out_of_memory_is_cpps_exception() -> None:
    code = f"import ctypes; l = ctypes.CDLL({str(allocator.LIBRARY)!r}); "
    result = python(code + "l._Znwm.argtypes = [ctypes.c_size_t]; l._Znwm(2**62)")
    assert result.returncode < 0
    assert "std::bad_alloc" in result.stderr


def test_mlx_allocates_with_it_unless_told_otherwise() -> None:
    with_it = python(GENERATE, LD_DEBUG="bindings")
    without = python(GENERATE, MLX_OPENELM_ALLOCATOR="0")
    assert json.loads(with_it.stdout)[0] is True
    assert json.loads(without.stdout)[0] is False
    assert json.loads(with_it.stdout)[1] == json.loads(without.stdout)[1]
    bindings = [line for line in with_it.stderr.splitlines() if "`_Znwm'" in line]
    assert any("libmlx.so" in line and "to " + str(allocator.LIBRARY) in line for line in bindings)


def test_buffers_that_come_again_need_no_new_pages() -> None:
    code = """
import resource, mlx_openelm, mlx.core as mx
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    mx.eval([mx.zeros(7_000_000) + i for i in range(4)])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pages = 4 * 28_000_000 // os.sysconf("SC_PAGE_SIZE")
    first, *_, last = map(int, python(code).stdout.split())
    assert first > pages * 0.9
    assert last < pages * 0.1
    for environment in ({"MLX_OPENELM_ALLOCATOR": "0"}, {"MALLOC_TRIM_THRESHOLD_": "1000000"}):
        assert int(python(code, **environment).stdout.split()[-1]) > pages * 0.2


@pytest.mark.parametrize("first", ["numpy", "torch", "mlx.core", "sentencepiece"])
def test_it_gets_on_with_what_was_loaded_before(first: str) -> None:
    pytest.importorskip(first.split(".")[0])
    code = f"import {first}\n" + GENERATE
    result = python(code, MLX_OPENELM_BLAS="0")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0] is (first != "mlx.core")


def test_it_gets_on_with_what_is_loaded_afterwards() -> None:
    """Strings, exceptions and streams of other C++ packages."""
    code = """
import importlib.util as u
if u.find_spec("torch"):
    import torch
    torch.manual_seed(0)
    torch.nn.Linear(64, 64)(torch.randn(8, 64)).sum().backward()
    try:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    except RuntimeError:
        pass
if u.find_spec("matplotlib"):
    import matplotlib
    matplotlib.use("agg")
    import io, matplotlib.pyplot as plt
    plt.plot([1, 2]), plt.title("$x^2$"), plt.savefig(io.BytesIO())
import numpy, tokenizers, sentencepiece
numpy.linalg.svd(numpy.ones((9, 9)))
"""
    result = python(GENERATE + code + GENERATE)
    assert result.returncode == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert first == second
