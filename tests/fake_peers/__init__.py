"""Runtimes that aren't any, for the tests of the runner; each is named by its module."""

from __future__ import annotations

from mlx_openelm.benchmarks.peers import Measured, Workload

CHATTY, CRASHING, HANGING, OTHER, RAISING, STILLBORN = (
    f"tests.fake_peers.{name}"
    for name in ("chatty", "crashing", "hanging", "other", "raising", "stillborn")
)


def version() -> str:
    return "0"


def answer(workload: Workload, first: int = 5) -> Measured:
    """Counts up from `first`, a millisecond a token."""
    count = workload.gen_tokens
    tokens = [[first + i for i in range(count)] for _ in workload.prompts]
    times = [0.01 + 0.001 * i for i in range(count)]
    return Measured(times[0], times[-1] - times[0], tokens, times)
