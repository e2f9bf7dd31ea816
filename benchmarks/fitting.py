"""Lengths that fit into the time there is, and which runtime has the time for what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .peers import OURS, Workload
from .results import Work
from .runner import SETTLING
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


class Fitted(NamedTuple):
    """A plan, and the works of each runtime that there is time for."""

    plan: Plan
    works: dict[str, set[tuple[Work, ...]]]


def fit(
    plan: Plan,
    tasks: Callable[[Plan], Sequence[Task]],
    speeds: Mapping[str, Speeds],
    seconds: float,
) -> Fitted:
    """The richest plan that this project can do whole, and every other runtime at least in part.

    Where none is so, the poorest; then a runtime may have no works at all.
    """
    for size in SIZES:
        smaller = shrink(plan, *size)
        works = _share(tasks(smaller), speeds, seconds, smaller.trials)
        whole = {task.works for task in tasks(smaller) if _takes_part(task, OURS)}
        if works.get(OURS, whole) == whole and all(works.values()):
            break
    return Fitted(smaller, works)


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


def _share(
    planned: Iterable[Task], speeds: Mapping[str, Speeds], seconds: float, trials: int
) -> dict[str, set[tuple[Work, ...]]]:
    """The works that fit into each runtime's equal share, the cheapest first.

    What a fast one leaves of its share goes to the slower ones.
    """
    turns = [task for task in planned if task.workload is not None]
    left = seconds - len(turns) * trials * CALIBRATION
    works: dict[str, set[tuple[Work, ...]]] = {}
    fastest_first = sorted(speeds, key=lambda peer: speeds[peer].pilot_seconds)
    for i, peer in enumerate(fastest_first):
        share, works[peer] = left / (len(speeds) - i), set()
        costs = [(_seconds(t, speeds[peer], trials), t) for t in turns if _takes_part(t, peer)]
        for cost, task in sorted(costs, key=lambda pair: pair[0]):
            if cost > share:
                break
            works[peer].add(task.works)
            share, left = share - cost, left - cost
    return works


def _takes_part(task: Task, peer: str) -> bool:
    return task.workload is not None and task.fits(peer)


def _seconds(task: Task, speeds: Speeds, trials: int) -> float:
    assert task.workload is not None
    prompts, gen = task.workload.prompts, task.workload.gen_tokens
    once = speeds.prefill * sum(map(len, prompts)) + speeds.decode * gen
    return (trials + 1) * (once + SETTLING)
