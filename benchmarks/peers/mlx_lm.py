"""mlx-lm, through its own `generate_step`."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path

from . import Measured, Run, Workload

INSTALL = "pip install mlx-lm"


def version() -> str:
    """Of the package."""
    return metadata.version("mlx-lm")


def load(directory: Path) -> Run:
    """One sequence at a time."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(directory)

    def run(workload: Workload) -> Measured:
        [prompt] = workload.prompts
        start = time.perf_counter()
        steps = generate_step(mx.array(prompt), model, max_tokens=workload.gen_tokens)
        tokens = [int(next(steps)[0])]
        first = time.perf_counter()
        tokens += [int(token) for token, _ in steps]
        return Measured(first - start, time.perf_counter() - first, [tokens])

    return run
