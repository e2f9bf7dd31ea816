"""Lengths that fit into the time there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .peers import Workload
from .workloads import Plan, Task

# From rich to poor: (longest prompt, tokens to make, tokens of a long generation, trials)
SIZES = (
    (2048, 128, 1024, 5),
    (512, 128, 512, 5),
    (512, 64, 256, 5),
    (128, 64, 128, 5),
    (128, 32, 64, 5),
    (128, 32, 64, 3),
    (32, 16, 32, 3),
    (32, 8, 16, 3),
)
CALIBRATION = 0.2  # seconds before every turn


@dataclass(frozen=True)
class Speeds:
    """Seconds a token of a runtime, from a pilot run, and the seconds of that."""

    prefill: float
    decode: float
    pilot_seconds: float

    @classmethod
    def of(cls, pilot: Workload, measured: Mapping[str, Any]) -> Speeds:
        """What the pilot took."""
        prefill, decode = measured["prefill_seconds"], measured["decode_seconds"]
        return cls(
            prefill / len(pilot.prompts[0]), decode / (pilot.gen_tokens - 1), prefill + decode
        )


def fit(
    plan: Plan,
    tasks: Callable[[Plan], Iterable[Task]],
    speeds: Mapping[str, Speeds],
    seconds: float,
) -> tuple[Plan, float]:
    """The richest plan that is expected to take no more than `seconds`, or the poorest; and
    what it is expected to take."""
    for size in SIZES:
        smaller = shrink(plan, *size)
        expected = sum(_seconds(task, speeds, smaller.trials) for task in tasks(smaller))
        if expected <= seconds:
            break
    return smaller, expected


def shrink(plan: Plan, longest: int, gen: int, long: int, trials: int) -> Plan:
    """A plan that asks for no more than this."""
    lengths = tuple(n for n in plan.prompt_tokens if n <= longest) or (min(plan.prompt_tokens),)
    return replace(
        plan,
        prompt_tokens=lengths,
        gen_tokens=min(plan.gen_tokens, gen),
        long_tokens=min(plan.long_tokens, long),
        trials=min(plan.trials, trials),
    )


def _seconds(task: Task, speeds: Mapping[str, Speeds], trials: int) -> float:
    if task.workload is None:
        return 0.0
    prompts, gen = task.workload.prompts, task.workload.gen_tokens
    once = sum(
        s.prefill * sum(map(len, prompts)) + s.decode * gen
        for peer, s in speeds.items()
        if task.fits(peer)
    )
    return (trials + 1) * once + trials * CALIBRATION
