"""This project, through its public API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_openelm
from mlx_openelm import __version__, jit
from mlx_openelm.checkpoint import load_model
from mlx_openelm.decoding import generate_step
from mlx_openelm.errors import OpenELMError
from mlx_openelm.hub import resolve

from . import Measured, Runtime, Workload


def version() -> str:
    """Of the package."""
    return __version__


def can(option: str) -> bool:
    """Whether `generate_step` has this argument; or, for "batch", whether there are batches."""
    if option == "batch":
        return hasattr(mlx_openelm, "batch_generate")
    return option in signature(generate_step).parameters


def load(directory: Path) -> Runtime:
    """Any workload."""
    jit.build()  # what a first run on a machine makes in the background
    model = load_model(directory)

    def run(workload: Workload) -> Measured:
        if len(workload.prompts) > 1:
            return _batch(model, workload)
        [prompt] = workload.prompts
        options = _options(workload)
        start = time.perf_counter()
        steps: Iterator[tuple[Any, ...]] = generate_step(
            mx.array(prompt), model, max_tokens=workload.gen_tokens, **options
        )
        tokens, times, drafted = [], [], 0
        for response in steps:
            times.append(time.perf_counter() - start)
            tokens.append(response[0])
            drafted += len(response) > 2 and bool(response[2])
        statistics = {"from draft": drafted / len(tokens)} if options else {}
        return Measured(times[0], times[-1] - times[0], [tokens], times, statistics)

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
    if not can("batch"):
        raise OpenELMError("mlx-openelm: batches are not built yet")
    start = time.perf_counter()
    response = mlx_openelm.batch_generate(  # type: ignore[attr-defined]
        model,
        None,
        workload.prompts,
        max_tokens=workload.gen_tokens,
        return_token_ids=True,
    )
    seconds = time.perf_counter() - start
    return Measured(0.0, seconds, response.token_ids)
