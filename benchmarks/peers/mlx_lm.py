"""mlx-lm, through its own `generate_step` and `batch_generate`."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from . import Measured, Runtime, Workload

# `batch_generate` wants a tokenizer to stop at its end-of-sequence tokens and to make text of ids
_NO_TOKENIZER = SimpleNamespace(eos_token_ids=(), decode=lambda ids: "")


def version() -> str:
    """Of the package."""
    return metadata.version("mlx-lm")


def load(directory: Path) -> Runtime:
    """One sequence or several."""
    model, _ = load_model(directory)

    def run(workload: Workload) -> Measured:
        if len(workload.prompts) > 1:
            return _batch(model, workload)
        [prompt] = workload.prompts
        start = time.perf_counter()
        steps = generate_step(mx.array(prompt), model, max_tokens=workload.gen_tokens)
        tokens, times = [], []
        for token, _ in steps:
            times.append(time.perf_counter() - start)
            tokens.append(int(token))
        return Measured(times[0], times[-1] - times[0], [tokens], times)

    cache: Any = make_prompt_cache(model)

    def step() -> list[mx.array]:
        logits = model(mx.array([[1]]), cache=cache)
        held = (part for layer in cache for part in layer.state)
        return [logits, *(part for part in held if isinstance(part, mx.array))]

    return Runtime(run, step)


def _batch(model: Any, workload: Workload) -> Measured:
    start = time.perf_counter()
    response = batch_generate(
        model,
        _NO_TOKENIZER,
        workload.prompts,
        max_tokens=workload.gen_tokens,
        return_token_ids=True,
    )
    seconds = time.perf_counter() - start
    return Measured(0.0, seconds, response.token_ids or [])
