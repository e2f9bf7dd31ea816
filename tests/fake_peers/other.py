"""Says something else from its third token on, quickly."""

from pathlib import Path

from mlx_openelm.benchmarks.peers import Measured, Runtime, Workload

from . import answer, version

__all__ = ["load", "version"]


def load(directory: Path) -> Runtime:
    def run(workload: Workload) -> Measured:
        measured = answer(workload)
        for tokens in measured.tokens:
            tokens[2:] = [0] * len(tokens[2:])
        return measured

    return Runtime(run)
