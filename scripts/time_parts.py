"""Time what docs/performance.md says of single parts, on this machine; contestants take turns.

    python scripts/time_parts.py products [--threads N]     sgemm.c and OpenBLAS, by rows
    python scripts/time_parts.py kernels                    the primitives and MLX's operations
    python scripts/time_parts.py prompts [MODEL] [TOKENS]   a prompt by tokens a step
    python scripts/time_parts.py settings NAME=VALUE …      decoding with and without each of them

MODEL is as in the benchmarks: demo:float32, random:OpenELM-270M:float32, …
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlx_openelm import blas  # before mlx

import mlx.core as mx  # isort: skip

BEYOND_CACHES = 128 << 20  # bytes of weights that are gone through, so that none is in a cache


def in_turns(
    contestants: Mapping[str, Callable[[], object]], turns: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, sorted; a first turn doesn't count."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if turn:
                found[name].append((time.perf_counter() - start) / calls)
    return {name: sorted(seconds) for name, seconds in found.items()}


def tell(what: str, found: dict[str, list[float]], unit: float, digits: int = 0) -> None:
    """One line: median (minimum) of each contestant, in seconds times `unit`."""
    cells = [
        f"{name} {unit * median(seconds):,.{digits}f} ({unit * seconds[0]:,.{digits}f})"
        for name, seconds in found.items()
    ]
    print(f"{what:<34} {'   '.join(cells)}", flush=True)


class Product(NamedTuple):
    """[rows, inner] times [inner, columns], held as `transposed` says."""

    name: str
    rows: int
    columns: int
    inner: int
    transposed: bool = True


PRODUCTS = [
    *(Product(f"{n} rows, 3072 x 1280", n, 3072, 1280) for n in (1, 2, 3, 4, 8, 16, 32, 64, 512)),
    *(Product(f"scores: 4 rows, {n} keys of 64", 4, n, 64) for n in (256, 2048)),
    *(Product(f"values: 4 rows, {n} values of 64", 4, 64, n, False) for n in (256, 2048)),
]


def products(threads: int) -> None:
    """µs of a product of matrices."""
    openblas = next((lib for name in blas.SONAMES if (lib := _loaded(name))), None)
    if blas.KERNEL is None or not hasattr(openblas, "openblas_set_num_threads"):
        sys.exit("needs the kernel (a compiler at installation) and an OpenBLAS")
    kernel = ctypes.CDLL(str(blas.KERNEL))
    most = 2**31 - 1
    kernel.sgemm_set(None, most, most, threads)
    openblas.openblas_set_num_threads(threads)
    print(f"µs, {threads} threads: median (minimum)")
    for product in PRODUCTS:
        runs = {"kernel": _run(product, kernel), "OpenBLAS": _run(product, openblas)}
        small = product.columns * product.inner < 1 << 20
        tell(product.name, in_turns(runs, 30, 50 if small else 1), 1e6)


def _loaded(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _run(product: Product, library: ctypes.CDLL) -> Callable[[], None]:
    """A call with the next of many matrices, unless they are small."""
    _, rows, columns, inner, transposed = product
    size = 4 * columns * inner
    rng = np.random.default_rng(0)
    a = rng.standard_normal((rows, inner), np.float32)
    c = np.empty((rows, columns), np.float32)
    matrices = itertools.cycle(
        [
            rng.standard_normal((columns, inner), np.float32)
            for _ in range(BEYOND_CACHES // size if size > 4 << 20 else 1)
        ]
    )
    one, zero, array = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_void_p

    def run() -> None:
        b = next(matrices)
        library.cblas_sgemm(101, 111, 112 if transposed else 111, rows, columns, inner, one,
                            array(a.ctypes.data), inner, array(b.ctypes.data),
                            inner if transposed else columns, zero, array(c.ctypes.data),
                            columns)  # fmt: skip

    return run


def kernels() -> None:
    """µs of a primitive and of MLX's operations for the same, a token and a prompt's step."""
    from mlx_openelm import _kernels

    normal = mx.random.normal
    weight, head = normal((1280,)), normal((64,))
    packed = {bits: mx.quantize(normal((3072, 1280)), 64, bits) for bits in (4, 8)}
    for rows in (1, 4, 256):
        x, gates = normal((rows, 1280)), normal((rows, 2 * 1280))
        heads, slots = normal((rows, 20 * 64)), max(256, rows)
        positions = mx.arange(rows)[None]
        turns = _kernels.rope_turns(positions, 64, 1e4)
        q, kv = normal((1, 12, rows, 64)), normal((1, 8, slots, 64))
        mask = mx.arange(slots) <= slots - rows + mx.arange(rows)[None, :, None]
        mx.eval(x, gates, heads, turns, q, kv, mask)
        _compare("norm", rows, _norm, partial(_kernels.rms_norm, eps=1e-6), x, weight)
        _compare("gate", rows, _gate, lambda g, _: _kernels.swiglu(g), gates, gates)
        _compare("heads", rows, _heads, partial(_our_heads, turns), heads, head)
        _compare(f"attention, {slots} slots", rows, _attention, _our_attention, q, kv, mask)
        for bits, parts in packed.items():
            theirs = partial(mx.quantized_matmul, transpose=True, group_size=64, bits=bits)
            ours = partial(_kernels.quantized_matmul, bits=bits)
            _compare(f"{bits}-bit product, 3072 × 1280", rows, theirs, ours, x, *parts)


def _norm(x: mx.array, weight: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, weight, 1e-6)


def _gate(x: mx.array, _: mx.array) -> mx.array:
    gate, up = mx.split(x, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


def _heads(x: mx.array, weight: mx.array) -> tuple[mx.array, ...]:
    heads = x.reshape(1, x.shape[0], 20, 64).swapaxes(1, 2)
    q, k, v = mx.split(heads, (12, 16), axis=1)
    rope = partial(mx.fast.rope, dims=64, traditional=False, base=1e4, scale=1.0, offset=0)
    return rope(_norm(q, weight)), mx.concatenate([rope(_norm(k, weight)), v], axis=1)


def _our_heads(turns: mx.array, x: mx.array, weight: mx.array) -> tuple[mx.array, ...]:
    from mlx_openelm import _kernels

    return _kernels.heads(x, weight, weight, turns, 1, 12, 4, 1e-6)


def _attention(q: mx.array, kv: mx.array, mask: mx.array) -> mx.array:
    k, v = mx.split(kv, 2, axis=1)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask[:, None])
    return y.swapaxes(1, 2).reshape(q.shape[2], -1)


def _our_attention(q: mx.array, kv: mx.array, mask: mx.array) -> mx.array:
    from mlx_openelm import _kernels

    return _kernels.attention(q, [kv], mask)


def _compare(what: str, rows: int, theirs: Any, ours: Any, *x: mx.array) -> None:
    def computing(function: Any) -> Callable[[], None]:
        return lambda: mx.eval(function(*x))

    computing(theirs)()
    found = in_turns({"ours": computing(ours), "MLX": computing(theirs)}, 15, max(1, 30 // rows))
    tell(f"{what}, {rows} {'row' if rows == 1 else 'rows'}", found, 1e6)


def prompts(name: str, tokens: int) -> None:
    """ms until the first token."""
    from mlx_openelm.benchmarks.models import model_directory
    from mlx_openelm.checkpoint import load_model
    from mlx_openelm.decoding import prefill

    model = load_model(model_directory(name))
    prompt = mx.random.randint(3, model.config.vocab_size, (tokens,))

    def read(step: int) -> None:
        mx.eval(prefill(model, prompt, model.make_cache(), step))

    print(f"ms, {name}, {tokens} tokens: median (minimum)")
    steps = (64, 128, 256, 512, 1024)
    for step, seconds in in_turns({str(step): partial(read, step) for step in steps}, 7).items():
        tell(f"{step} tokens a step", {"": seconds}, 1e3, 1)


DECODE = """
import sys, time, mlx_openelm
import mlx.core as mx
from mlx_openelm.benchmarks.models import model_directory
from mlx_openelm.checkpoint import load_model
from mlx_openelm.decoding import generate_step
model = load_model(model_directory(sys.argv[1]))
def run():
    steps = generate_step(mx.arange(5, 13), model, max_tokens=100)
    next(steps)
    start = time.perf_counter()
    for _ in steps: pass
    return (time.perf_counter() - start) / 99
run()
print(sorted(run() for _ in range(5))[2])
"""


def settings(variables: list[str], model: str) -> None:
    """ms a token for 100 after 8; each setting in a process of its own."""
    found: dict[str, list[float]] = {"as it is": [], **{variable: [] for variable in variables}}
    for _ in range(5):
        for variable, seconds in found.items():
            name, _, value = variable.partition("=")
            environment = os.environ | ({name: value} if value else {})
            command = [sys.executable, "-c", DECODE, model]
            folder = Path(__file__).parent.parent
            said = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True, cwd=folder
            )
            seconds.append(float(said.stdout))
    for name, seconds in found.items():
        tell(name, {model: sorted(seconds)}, 1e3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    p = commands.add_parser("products")
    p.add_argument("--threads", type=int, default=1)
    commands.add_parser("kernels")
    p = commands.add_parser("prompts")
    p.add_argument("model", nargs="?", default="demo:float32")
    p.add_argument("tokens", nargs="?", type=int, default=512)
    p = commands.add_parser("settings")
    p.add_argument("variables", nargs="+", metavar="NAME=VALUE")
    p.add_argument("--model", default="demo:float32")
    args = parser.parse_args()
    if args.command == "products":
        products(args.threads)
    elif args.command == "kernels":
        kernels()
    elif args.command == "prompts":
        prompts(args.model, args.tokens)
    else:
        settings(args.variables, args.model)


if __name__ == "__main__":
    main()
