"""Measuring one model: runtimes in turns, and what becomes of one that fails."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm.config import OpenELMConfig, token_ids
from mlx_openelm.dtypes import dtype_name
from mlx_openelm.errors import OpenELMError
from mlx_openelm.tokenizer.tokenizer import Tokenizer, load_tokenizer

from . import calibration, roofline
from .fitting import Fitted, Speeds, fit
from .models import Target, model_directory
from .peers import OURS, Workload
from .progress import Begin
from .results import Calibration, Graph, Trial, Work
from .runner import Worker
from .session import Row, Session
from .startup import COMMANDS, seconds_to_first_token
from .workloads import Plan, Task, read_off, tasks

WARMUP_TOKENS = 16  # at most, of a run that doesn't count
SHARE_OF_PROCESSES = 0.25  # of a short run's time, for trials that start a process
PILOT = Workload([[1] * 16], 4)


def measure_model(
    session: Session,
    target: Target,
    peers: Sequence[str],
    plan: Plan,
    begin: Begin,
    budget: float | None = None,
) -> None:
    """Everything on one model, within `budget` seconds if there is one.

    Raises:
        OpenELMError: when the model can't be made or read. A peer that fails has a row that says
            so, and takes no further part.
    """
    start = time.monotonic()
    directory = model_directory(target.model.name)
    session.targets.append(target)
    tokenizer = _tokenizer(target, directory)
    name = target.model.name
    planned, notes = tasks(plan, target.config, tokenizer)
    processes = [task for task in planned if task.workload is None]
    with ExitStack() as stack:
        started: dict[str, Worker] = {}
        for peer in peers:
            try:
                limit = min(session.time_limit, max(session.left(), 1))
                started[peer] = Worker(peer, directory, time_limit=limit)
                stack.callback(started[peer].close)
            except OpenELMError as error:
                _failed(session, target, peer, planned, error)
        works = None
        if budget is not None:
            left = budget - (time.monotonic() - start)
            left *= 1 - SHARE_OF_PROCESSES if processes else 1
            plan, works = _fitted(session, target, started, plan, tokenizer, left)
            planned, notes = tasks(plan, target.config, tokenizer)
        for note in notes:
            session.note(f"{name}: {note}")
        graphs = _graphs(started)
        for task in (t for t in planned if t.workload is not None):
            contestants = {
                peer: worker
                for peer, worker in started.items()
                if task.fits(peer) and (works is None or task.works in works[peer])
            }
            if contestants:
                _take_turns(session, target, task, contestants, started, plan.trials, graphs, begin)
    end = float("inf") if budget is None else start + budget
    for task in processes:
        able = [peer for peer in peers if task.fits(peer)]
        _in_new_processes(session, target, task, able, directory, plan.trials, end, begin)


def _tokenizer(target: Target, directory: Path) -> Tokenizer | None:
    """None for random weights: a text's continuation would be none."""
    return None if target.model.random else load_tokenizer(directory)


def _failed(
    session: Session, target: Target, peer: str, planned: Sequence[Task], error: OpenELMError
) -> None:
    for task in planned:
        if task.workload is not None and task.fits(peer):
            session.rows += [Row(target, peer, work, error=str(error)) for work in task.works]
            break
    session.note(f"{target.model.name}: {peer} left out, as it failed to start ({error})")


def _graphs(started: Mapping[str, Worker]) -> dict[str, Graph]:
    found = {}
    for peer, worker in started.items():
        try:
            answer = worker.graph()
        except OpenELMError:
            continue  # that it is gone, the first workload will find out
        if answer:
            found[peer] = Graph(**answer)
    return found


def _fitted(
    session: Session,
    target: Target,
    started: dict[str, Worker],
    plan: Plan,
    tokenizer: Tokenizer | None,
    left: float,
) -> Fitted:
    """What fits into the time left, after a look at the speeds.

    A runtime that is too slow for anything is left out.
    """
    name = target.model.name
    speeds: dict[str, Speeds] = {}
    for peer, worker in list(started.items()):
        try:
            for _ in range(2):  # the first one warms up
                measured = worker.run(PILOT, max(left if peer == OURS else left / 4, 1))
            speeds[peer] = Speeds.of(PILOT, measured)
        except OpenELMError as error:
            session.note(f"{name}: {peer} left out in so short a run ({error})")
            started.pop(peer).close()

    def planned(plan: Plan) -> list[Task]:
        return tasks(plan, target.config, tokenizer)[0]

    left -= 2 * sum(s.pilot_seconds for s in speeds.values())
    fitted = fit(plan, planned, speeds, left)
    able = [task for task in planned(fitted.plan) if task.workload is not None]
    for peer, works in fitted.works.items():
        all_of_it = {task.works for task in able if task.fits(peer)}
        if peer == OURS:
            works |= all_of_it  # until the time is up
        elif works < all_of_it:
            rate = 1 / speeds[peer].decode
            part = f"{len(all_of_it - works)} of {len(all_of_it)} workloads"
            session.note(f"{name}: no time for {peer} in {part}, at {rate:.2g} tokens/s")
    return fitted


def _in_new_processes(
    session: Session,
    target: Target,
    task: Task,
    contestants: Sequence[str],
    directory: Path,
    trials: int,
    end: float,
    begin: Begin,
) -> None:
    """Trials of which each is a process: loading, and the first token.

    After `end`, by `time.monotonic()`, no more of them begin, but for the first.
    """
    [work] = task.works
    rows = {peer: Row(target, peer, work) for peer in contestants}
    session.rows += rows.values()
    advance = begin(f"{target.model.name}: {work.label}", (trials + 1) * len(rows))
    for turn in range(-1, trials):
        now = _calibrate(session, target) if turn >= 0 else None
        for peer, row in rows.items():
            early = time.monotonic() < end or (turn < 1 and session.left() > 0)
            if row.error is None and early:
                limit = min(session.time_limit, max(session.left(), 1))
                try:
                    trial = _process(peer, directory, work, turn, limit)
                    if turn >= 0:
                        row.trials.append(replace(trial, calibration=now))
                except OpenELMError as error:
                    row.error = str(error)
            advance()
    _drop_empty(session)


def _process(peer: str, directory: Path, work: Work, turn: int, limit: float) -> Trial:
    if work.kind == "cold":
        seconds = seconds_to_first_token(*COMMANDS[peer], directory, limit)
        return Trial(turn, seconds, seconds)
    worker = Worker(peer, directory, time_limit=limit)
    worker.close()
    seconds = worker.ready["load_seconds"]
    return Trial(turn, seconds, seconds, worker.ready["peak_bytes"])


def _calibrate(session: Session, target: Target) -> Calibration:
    dtype = roofline.compute_dtype(target.model.stored)
    return calibration.short([dtype_name(dtype)])


def _take_turns(
    session: Session,
    target: Target,
    task: Task,
    contestants: Mapping[str, Worker],
    started: dict[str, Worker],
    trials: int,
    graphs: Mapping[str, Graph],
    begin: Begin,
) -> None:
    """A B A B …: a round to warm up, then the trials. A worker that fails is closed."""
    assert task.workload is not None
    rows = {
        peer: [
            Row(
                target,
                peer,
                work,
                graph=graphs.get(peer) if work.kind == "decode" else None,
                note=worker.ready["note"],
            )
            for work in task.works
        ]
        for peer, worker in contestants.items()
    }
    session.rows += [row for several in rows.values() for row in several]
    label = " and ".join(work.label for work in task.works)
    advance = begin(f"{target.model.name}: {label}", (trials + 1) * len(rows))
    said: dict[str, list[list[int]]] = {}
    for turn in range(-1, trials):
        now = _calibrate(session, target) if turn >= 0 else None
        for peer, worker in contestants.items():
            if peer in started and session.left() > 0:
                workload = task.workload if turn >= 0 else _warmup(task.workload)
                limit = min(session.time_limit, max(session.left(), 1))
                try:
                    measured = worker.run(workload, limit)
                except OpenELMError as error:
                    _give_up(session, rows[peer], error)
                    started.pop(peer).close()
                    continue
                if turn >= 0:
                    _record(rows[peer], turn, measured, now)
                    said[peer] = measured["tokens"]
            advance()
    if target.model.stored == "float32":
        _compare(rows, said, target.config)
    if session.left() <= 0:
        session.note("the time was up before all was measured")
    _drop_empty(session)


def _warmup(workload: Workload) -> Workload:
    return replace(workload, gen_tokens=min(workload.gen_tokens, WARMUP_TOKENS))


def _give_up(session: Session, rows: Sequence[Row], error: OpenELMError) -> None:
    if session.left() <= 0:
        return
    for row in rows:
        row.error = str(error)
    session.note(f"{rows[0].target.model.name}: {rows[0].runtime} left out after it failed")


def _record(
    rows: Sequence[Row], turn: int, measured: Mapping[str, Any], now: Calibration | None
) -> None:
    for row in rows:
        trial, further = read_off(row.work, turn, measured)
        row.trials.append(replace(trial, calibration=now))
        for name, value in further.items():
            row.statistics.setdefault(name, []).append(value)


def _drop_empty(session: Session) -> None:
    """Without a trial and without an error there was no time: nothing to show."""
    session.rows = [row for row in session.rows if row.trials or row.error]


def _compare(
    rows: Mapping[str, Sequence[Row]], said: Mapping[str, list[list[int]]], config: OpenELMConfig
) -> None:
    """Say where greedy tokens part from this project's. (llama-bench tells none.)"""
    end = [*token_ids(config.eos_token_id), 2][0]
    for peer in said.keys() - {OURS}:
        if OURS in said and any(said[peer]):
            for row in rows[peer]:
                row.differs = parting(said[OURS], said[peer], end)


def parting(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], end: int) -> str | None:
    """Where tokens part, in words; None where they don't.

    Beyond an end-of-sequence token nothing is compared: llama.cpp can't be made to say it.
    """
    for row, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        known = a.index(end) if end in a else len(a)
        for i in range(known):
            found = b[i] if i < len(b) else "nothing"
            if found != a[i]:
                where = f"token {i + 1}" + (f" of sequence {row + 1}" if len(ours) > 1 else "")
                return f"{where} is {found}, not {a[i]}"
    return None
