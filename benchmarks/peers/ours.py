"""This project, through its public API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm import OpenELM, __version__
from mlx_openelm.checkpoint.directory import load_model
from mlx_openelm.checkpoint.hub import resolve
from mlx_openelm.generation.batching import batch_generate_step
from mlx_openelm.generation.decoding import generate_step
from mlx_openelm.generation.speculative.loop import Speculation, speculative_generate_step

from . import Measured, Runtime, Workload

_DRAFTING = ("draft_model", "prompt_lookup", "num_draft_tokens")


def version() -> str:
    """Of the package."""
    return __version__


def load(directory: Path) -> Runtime:
    """Any workload."""
    model = load_model(directory)

    def run(workload: Workload) -> Measured:
        if len(workload.prompts) > 1:
            return _batch(model, workload)
        [prompt] = workload.prompts
        found = Speculation()
        start = time.perf_counter()
        times, tokens = [], []
        for response in _steps(model, mx.array(prompt), workload, found):
            times.append(time.perf_counter() - start)
            tokens.append(response[0])
        statistics = {}
        if found.steps:
            statistics = {"acceptance": found.acceptance, "tokens per step": found.tokens_per_step}
        return Measured(times[0], times[-1] - times[0], [tokens], times, statistics)

    cache = model.make_cache()

    def step() -> list[mx.array]:
        logits = model(mx.array([[1]]), cache, last_only=True)
        return [logits, *(array for buffer in cache.buffers for array in buffer)]

    return Runtime(run, step)


def _steps(
    model: OpenELM, prompt: mx.array, workload: Workload, found: Speculation
) -> Iterator[tuple[Any, ...]]:
    options: dict[str, Any] = dict(workload.options)
    if not options.keys() & set(_DRAFTING):
        return generate_step(prompt, model, max_tokens=workload.gen_tokens, **options)
    if options.get("draft_model") is not None:
        options["draft_model"] = _draft(str(options["draft_model"]))
    return speculative_generate_step(
        prompt, model, max_tokens=workload.gen_tokens, statistics=found, **options
    )


@cache
def _draft(directory: str) -> OpenELM:
    return load_model(resolve(directory))


def _batch(model: OpenELM, workload: Workload) -> Measured:
    made: list[list[int]] = [[] for _ in workload.prompts]
    prompts = [mx.array(prompt) for prompt in workload.prompts]
    start = time.perf_counter()
    first = 0.0
    for step in batch_generate_step(prompts, model, [workload.gen_tokens] * len(prompts)):
        first = first or time.perf_counter() - start
        for i, token in step:
            made[i].append(token)
    return Measured(first, time.perf_counter() - start - first, made)
