"""Dies in its second run, as a segmentation fault would have it."""

import os
import sys
from pathlib import Path

from mlx_openelm.benchmarks.peers import Measured, Runtime, Workload

from . import answer, version

__all__ = ["load", "version"]


def load(directory: Path) -> Runtime:
    runs = []

    def run(workload: Workload) -> Measured:
        runs.append(workload)
        if len(runs) == 2:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(9)
        return answer(workload)

    return Runtime(run)
