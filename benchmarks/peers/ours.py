"""This project, through its public API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm import __version__, jit
from mlx_openelm.batching import batch_generate_step
from mlx_openelm.checkpoint import load_model
from mlx_openelm.decoding import generate_step
from mlx_openelm.hub import resolve
from mlx_openelm.speculative import Speculation, speculative_generate_step

from . import Measured, Runtime, Workload


def version() -> str:
    """Of the package."""
    return __version__


def load(directory: Path) -> Runtime:
    """Any workload."""
    jit.build()  # what a first run on a machine makes in the background
    model = load_model(directory)

    def run(workload: Workload) -> Measured:
        if len(workload.prompts) > 1:
            return _batch(model, workload)
        [prompt] = workload.prompts
        options = _options(workload)
        speculation = Speculation()
        start = time.perf_counter()
        steps: Iterator[tuple[Any, ...]]
        if options:
            steps = speculative_generate_step(
                mx.array(prompt),
                model,
                max_tokens=workload.gen_tokens,
                statistics=speculation,
                **options,
            )
        else:
            steps = generate_step(mx.array(prompt), model, max_tokens=workload.gen_tokens)
        tokens, times = [], []
        for token, *_ in steps:
            times.append(time.perf_counter() - start)
            tokens.append(token)
        statistics = {
            "acceptance": speculation.acceptance,
            "tokens per step": speculation.tokens_per_step,
        }
        return Measured(
            times[0], times[-1] - times[0], [tokens], times, statistics if options else {}
        )

    cache = model.make_cache()

    def step() -> list[mx.array]:
        logits = model(mx.array([[1]]), cache, last_only=True)
        return [logits, *(array for buffer in cache.buffers for array in buffer)]

    return Runtime(run, step)


def _options(workload: Workload) -> dict[str, Any]:
    options = dict(workload.options)
    if "draft_model" in options:
        options["draft_model"] = _draft(str(options["draft_model"]))
    return options


@cache
def _draft(directory: str) -> Any:
    return load_model(resolve(directory))


def _batch(model: Any, workload: Workload) -> Measured:
    start = time.perf_counter()
    steps = batch_generate_step(
        [mx.array(prompt) for prompt in workload.prompts],
        model,
        [workload.gen_tokens] * len(workload.prompts),
    )
    tokens: list[list[int]] = [[] for _ in workload.prompts]
    times = []
    for step in steps:
        times.append(time.perf_counter() - start)
        for i, token in step:
            tokens[i].append(token)
    return Measured(times[0], times[-1] - times[0], tokens)
