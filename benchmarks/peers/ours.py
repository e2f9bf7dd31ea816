"""This project, through its public API."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx

from mlx_openelm import __version__, jit
from mlx_openelm.checkpoint import load_model
from mlx_openelm.decoding import generate_step

from . import Measured, Run, Workload

INSTALL = "pip install mlx-openelm"


def version() -> str:
    """Of the package."""
    return __version__


def load(directory: Path) -> Run:
    """One sequence at a time."""
    jit.build()  # what a first run on a machine makes in the background
    model = load_model(directory)

    def run(workload: Workload) -> Measured:
        [prompt] = workload.prompts
        start = time.perf_counter()
        steps = generate_step(mx.array(prompt), model, max_tokens=workload.gen_tokens)
        tokens = [next(steps)[0]]
        first = time.perf_counter()
        tokens += [token for token, _ in steps]
        return Measured(first - start, time.perf_counter() - first, [tokens])

    return run
