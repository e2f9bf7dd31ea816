"""Time what docs/performance.md says of single parts, on this machine; contestants take turns.

    python scripts/time_parts.py products [--threads N]     the C library and NumPy's BLAS, by rows
    python scripts/time_parts.py prompts [MODEL] [TOKENS]   a prompt by tokens a step
    python scripts/time_parts.py settings NAME=VALUE …      decoding with and without each of them

MODEL is as in the benchmarks: demo:float32, random:OpenELM-270M:float32, …
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlx_openelm.backends import cpu
from mlx_openelm.backends.cpu import library
from mlx_openelm.model.quantization import Matrix, Scheme, quantize

if TYPE_CHECKING:
    import numpy as np

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


def products(threads: int) -> None:
    """µs of `x @ w.T` by the C library, w 3072 x 1280, and by NumPy's BLAS in float32."""
    library.load().openelm_set_threads(threads)
    os.environ["OPENBLAS_NUM_THREADS"] = str(threads)  # read when NumPy is imported
    import numpy as np

    scheme = Scheme(64, 4)
    print(f"µs, {threads} threads: median (minimum)")
    for rows in (1, 2, 4, 8, 16, 32, 64, 512):
        x = mx.random.normal((rows, 1280))
        copies = range(BEYOND_CACHES // (3072 * 1280 * 4))
        plain = [mx.random.normal((3072, 1280)) for _ in copies]
        matrices = {
            "float32": [Matrix(w) for w in plain],
            "float16": [Matrix(w.astype(mx.float16)) for w in plain],
            "bfloat16": [Matrix(w.astype(mx.bfloat16)) for w in plain],
            "4 bits": [quantize(w, scheme) for w in plain],
        }
        runs: dict[str, Callable[[], object]] = {}
        for name, ws in matrices.items():
            mx.eval([list(w.arrays()) for w in ws])
            runs[name] = partial(_library_product, x, itertools.cycle(ws))
        arrays = itertools.cycle([np.array(w) for w in plain])
        runs["NumPy"] = partial(_numpy_product, np.array(x), arrays)
        tell(f"{rows} rows", in_turns(runs, 30), 1e6)


def _library_product(x: mx.array, matrices: Iterator[Matrix]) -> None:
    cpu.multiply(x, next(matrices))


def _numpy_product(x: np.ndarray, arrays: Iterator[np.ndarray]) -> None:
    x @ next(arrays).T


def prompts(name: str, tokens: int) -> None:
    """ms until the first token."""
    from mlx_openelm.benchmarks.models import model_directory
    from mlx_openelm.checkpoint.directory import load_model
    from mlx_openelm.generation.decoding import prefill

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
from mlx_openelm.checkpoint.directory import load_model
from mlx_openelm.generation.decoding import generate_step
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
    p = commands.add_parser("prompts")
    p.add_argument("model", nargs="?", default="demo:float32")
    p.add_argument("tokens", nargs="?", type=int, default=512)
    p = commands.add_parser("settings")
    p.add_argument("variables", nargs="+", metavar="NAME=VALUE")
    p.add_argument("--model", default="demo:float32")
    args = parser.parse_args()
    if args.command == "products":
        products(args.threads)
    elif args.command == "prompts":
        prompts(args.model, args.tokens)
    else:
        settings(args.variables, args.model)


if __name__ == "__main__":
    main()
