"""A runtime in a process of its own, which stays up: a workload a line in, a measurement out.

python -m mlx_openelm.benchmarks.worker PEER DIRECTORY
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from .peers import PEERS, Workload


def main(peer: str, directory: Path) -> None:
    """Load, say so, and answer until standard input ends."""
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = import_module(f".peers.{PEERS[peer][0]}", __package__)
    start = time.perf_counter()
    run = module.load(directory)
    ready = {"version": module.version(), "load_seconds": time.perf_counter() - start}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        measured = asdict(run(Workload(**json.loads(line))))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        measured["peak_bytes"] = peak if sys.platform == "darwin" else peak * 1024
        answers.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
