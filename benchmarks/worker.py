"""A runtime in a process of its own, which stays up: a workload a line in, a measurement out.

python -m mlx_openelm.benchmarks.worker PEER DIRECTORY
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import mlx.core as mx

from .peers import PEERS, Runtime, Workload
from .roofline import graph


def main(peer: str, directory: Path) -> None:
    """Load, say so, and answer until standard input ends.

    A `peer` that isn't one of the `PEERS` is a module of somebody else.
    """
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = (
        import_module(f".peers.{PEERS[peer].module}", __package__)
        if peer in PEERS
        else import_module(peer)
    )
    start = time.perf_counter()
    runtime: Runtime = module.load(directory)
    ready = {
        "version": module.version(),
        "load_seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
        "note": runtime.note,
    }
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        try:
            answer = _answer(runtime, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _answer(runtime: Runtime, asked: dict[str, object]) -> dict[str, object]:
    if asked.get("graph"):
        found = graph(runtime.step) if runtime.step else None
        return asdict(found) if found and found.primitives else {}  # none: the step isn't lazy
    mx.reset_peak_memory()
    measured = asdict(runtime.run(Workload(**asked)))  # type: ignore[arg-type]
    held = mx.get_peak_memory() if runtime.step else None
    return measured | {"peak_bytes": peak_bytes(), "mlx_peak_bytes": held}


def peak_bytes() -> int:
    """The most resident memory that this process has had.

    Linux's `ru_maxrss` begins with that of the process which started this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
