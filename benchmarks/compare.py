"""What got faster or slower from one run to another, and whether that is more than noise.

    python -m mlx_openelm.benchmarks compare A.json B.json [--fail-on-slower]

Trials of two runs were not taken in turns, so whatever moved the machine in between looks like a
difference of the code. The calibration beside each trial, what the machine could do just before,
is there to tell the two apart:

- A trial's speed is divided by its calibration where that explains the trials: where the speeds so
  divided scatter within the runs by a fifth less than the speeds themselves. Bandwidth and every
  matrix product are tried; all works of a kind on one model decide together, and the best is taken.
- Where none does so, the machine either held still within each run, or does not move this workload,
  or its calibration is too noisy to say, and nobody can know which. Then a difference has to show
  both as measured and after division (generation by bandwidth, prompt processing by matmul): the
  interval covers both.

Intervals are bootstrap intervals of the ratio of the medians (B. Efron, 1979), each run's trials
resampled apart, at a level that holds for all rows together (Bonferroni): in 95 of 100 comparisons
of the same code, no row shows a difference. A difference of less than `LEAST` is never called one.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from mlx_openelm.command import path

from .report.findings import Row, kind_heading, measured_machine, rows
from .report.wording import (
    OURS,
    enumerated,
    factor,
    interval,
    machine_label,
    model_label,
    number,
    percent,
    printable,
    scaled,
    work_label,
)
from .results import Calibration, Results, Trial, read
from .statistics import CONFIDENCE, RESAMPLES, Ratio
from .tables import show as print_table

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = "What got faster or slower from run A to run B, and whether that is more than noise."
LEAST = 1.03  # times; below it a difference isn't worth a word
EXPLAINS = 0.8  # of the scatter is left when a calibration explains the trials
AS_MEASURED = "as measured"
ENOUGH = 4  # trials a run: of 3 and 3, even the slowest being faster says nothing at 95 %

Logs = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Change:
    """A measurement in both runs: the ratio of its speeds, B over A, and what it is divided by."""

    before: Row
    after: Row
    ratio: Ratio
    divided_by: str

    @property
    def verdict(self) -> str:
        """Whether B is faster, slower, or as fast as anyone can tell."""
        if min(len(_trials(r.measurement.trials)) for r in (self.before, self.after)) < ENOUGH:
            return "too few"
        if self.ratio.low > 1 and self.ratio.value > LEAST:
            return "faster"
        if self.ratio.high < 1 and self.ratio.value < 1 / LEAST:
            return "slower"
        return "a tie"


def compare(a: Results, b: Results) -> list[Change]:
    """Every measurement that both runs have, in the order of A."""
    after = {_key(row): row for row in rows(b) if row.speed}
    pairs = [(row, after[_key(row)]) for row in rows(a) if row.speed and _key(row) in after]
    groups: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for pair in pairs:
        groups.setdefault((pair[0].model.name, pair[0].work.kind), []).append(pair)
    explaining = {key: _explaining(group) for key, group in groups.items()}
    ours = sum(row.ours for row, _ in pairs)
    return [
        _change(
            before,
            after,
            explaining[before.model.name, before.work.kind],
            comparisons=ours if before.ours else len(pairs) - ours,
        )
        for before, after in pairs
    ]


def _key(row: Row) -> tuple[object, ...]:
    return (row.model.name, row.model.stored, row.work, row.measurement.runtime, row.unit)


# ---------------------------------------------------------------------------------------------
# The machine's share


def _explaining(pairs: Iterable[tuple[Row, Row]]) -> str | None:
    """The calibration by which the trials within each run scatter least, if that is much less."""
    runs = [row for pair in pairs for row in pair]
    scatter = {}
    for name in [AS_MEASURED, *_calibrated(runs)]:
        deviations = [s - np.median(s) for row in runs if len(s := _speeds(row, name)) > 1]
        if deviations:
            scatter[name] = float(np.mean(np.abs(np.concatenate(deviations))))
    best = min(scatter, key=lambda name: scatter[name], default=AS_MEASURED)
    if best == AS_MEASURED or scatter[best] > EXPLAINS * scatter[AS_MEASURED]:
        return None
    return best


def _calibrated(runs: Iterable[Row]) -> list[str]:
    """What every trial was calibrated by."""
    names = [
        set(_levels(trial.calibration)) for row in runs for trial in _trials(row.measurement.trials)
    ]
    return sorted(set.intersection(*names)) if names else []


def _levels(calibration: Calibration | None) -> dict[str, float]:
    if calibration is None:
        return {}
    levels = {"bandwidth": calibration.bandwidth}
    levels |= {f"matmul {dtype}": rate for dtype, rate in calibration.matmul.items()}
    return {name: v for name, v in levels.items() if math.isfinite(v) and v > 0}


def _trials(trials: Iterable[Trial]) -> list[Trial]:
    return [t for t in trials if math.isfinite(t.value) and t.value > 0]


def _speeds(row: Row, divided_by: str) -> Logs:
    """Logarithms of the trials' speeds, divided by their calibrations."""
    sign = 1 if row.unit == "tokens/s" else -1
    logs = []
    for trial in _trials(row.measurement.trials):
        level = 1.0 if divided_by == AS_MEASURED else _levels(trial.calibration)[divided_by]
        logs.append(sign * math.log(trial.value) - math.log(level))
    return np.array(logs)


def _natural(row: Row, names: Sequence[str]) -> str | None:
    """What should bound a work, among what was calibrated."""
    wanted = ["bandwidth"]
    if row.work.kind == "prefill":
        wanted = [f"matmul {row.model.stored}", "matmul float32", *wanted]
    return next((name for name in wanted if name in names), None)


def _change(before: Row, after: Row, explaining: str | None, comparisons: int) -> Change:
    if explaining:
        return Change(before, after, _interval(before, after, explaining, comparisons), explaining)
    plain = _interval(before, after, AS_MEASURED, comparisons)
    natural = _natural(before, _calibrated([before, after]))
    if natural is None:
        return Change(before, after, plain, AS_MEASURED)
    divided = _interval(before, after, natural, comparisons)
    both = Ratio(plain.value, min(plain.low, divided.low), max(plain.high, divided.high))
    return Change(before, after, both, f"{AS_MEASURED}, and by {natural}")


def _interval(before: Row, after: Row, divided_by: str, comparisons: int) -> Ratio:
    """B over A, by medians; trials of each run are resampled by themselves."""
    a, b = _speeds(before, divided_by), _speeds(after, divided_by)
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(run, (RESAMPLES, len(run))), axis=1) for run in (a, b)]
    tail = 100 * (1 - CONFIDENCE) / 2 / comparisons
    low, high = np.exp(np.percentile(medians[1] - medians[0], [tail, 100 - tail])).tolist()
    return Ratio(float(np.exp(np.median(b) - np.median(a))), low, high)


# ---------------------------------------------------------------------------------------------
# The command


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("a", type=path, metavar="A.json", help="the run before")
    p.add_argument("b", type=path, metavar="B.json", help="the run after")
    p.add_argument(
        "--fail-on-slower",
        action="store_true",
        help=f"exit status 1 when {OURS} got slower, by more than noise",
    )


def command(args: argparse.Namespace) -> int:
    """Read both, print a table and what it comes to."""
    from rich.console import Console

    a, b = read(args.a), read(args.b)
    changes = compare(a, b)
    show(a, b, changes, Console())
    slower = any(change.before.ours and change.verdict == "slower" for change in changes)
    return 1 if slower and args.fail_on_slower else 0


def show(a: Results, b: Results, changes: Sequence[Change], console: Console) -> None:
    """Print the changes, and what makes them hard to believe."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, emoji=False)

    for name, run in (("A", a), ("B", b)):
        partial = ", partial" if run.partial else ""
        say(f"{name}: {machine_label(run.machine)}, {printable(run.created)}{partial}")
    say(_machines(a, b), "dim")
    for warning in warnings(a, b, changes):
        say(warning, "yellow")
    shown = [change for change in changes if change.before.ours] or changes
    if not shown:
        return
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("model, workload")
    table.add_column("A", justify="right", no_wrap=True, min_width=7)
    table.add_column("B", justify="right", no_wrap=True, min_width=7)
    table.add_column("B is as fast, times", no_wrap=True)
    table.add_column("", no_wrap=True)
    styles = {"faster": "bold green", "slower": "bold red"}
    for _, group in groupby(shown, key=lambda change: change.before.model):
        members = list(group)
        table.add_row(Text(model_label(members[0].before.model), style="bold"))
        for change in members:
            row = change.before
            label = f" {work_label(row.work)}" + ("" if row.ours else f", {row.runtime}")
            ratio = f"{factor(change.ratio)} ({interval(change.ratio)})"
            cells = (_speed(row), _speed(change.after), ratio, change.verdict)
            table.add_row(
                Text(label), *(Text(c, style=styles.get(change.verdict, "")) for c in cells)
            )
    print_table(console, table)
    say(
        "A and B: medians as measured, tokens/s (s: seconds). The ratio is what is left of their "
        "difference when the machine's own is divided out; its interval holds at 95 % for all rows "
        f"together. Divided by: {_divisors(shown)}.",
        "dim",
    )
    say(control(changes), "dim")
    say(conclusion(changes), "bold")


def conclusion(changes: Sequence[Change]) -> str:
    """What this project's rows come to, in a sentence."""
    ours = [change for change in changes if change.before.ours]
    said = []
    for verdict in ("slower", "faster"):
        by = sorted(abs(c.ratio.value - 1) for c in ours if c.verdict == verdict)
        if by:
            said.append(f"{len(by)} of {len(ours)} {verdict}, by {percent(by[0])}")
            said[-1] += f" to {percent(by[-1])}" if len(by) > 1 else ""
    few = sum(change.verdict == "too few" for change in ours)
    if few:
        said.append(f"{few} with too few trials to say ({ENOUGH} a run)")
    ties = [change.ratio for change in ours if change.verdict == "a tie"]
    if ties:
        least = statistics.median(max(r.value / r.low, r.high / r.value, LEAST) for r in ties) - 1
        said.append(f"{len(ties)} a tie, where about {percent(least)} would have shown")
    return f"{OURS}: {enumerated(said)}."


def control(changes: Sequence[Change]) -> str:
    """What became of the other runtimes: where their code is the same, so should their speed be."""
    others = [change for change in changes if not change.before.ours]
    if not others:
        return "No other runtime is in both runs to hold this against."
    moved = dict.fromkeys(c.before.runtime for c in others if c.verdict in ("faster", "slower"))
    names = enumerated(list(dict.fromkeys(c.before.runtime for c in others)))
    if not moved:
        return f"Held against {names}: no difference beyond noise, as it should be."
    return f"{enumerated(list(moved))} changed too: if its code is the same, doubt the rest."


def _machines(a: Results, b: Results) -> str:
    """What the machines were measured to do, then and now."""
    before, after = measured_machine(a), measured_machine(b)
    said = []
    for name in (name for name in before if name in after):
        what, unit = (name, "B/s") if name == "bandwidth" else (f"matmul {name}", "FLOP/s")
        rates = [scaled(run[name][0], unit) for run in (before, after)]
        said.append(f"{printable(what)} {rates[0]}, then {rates[1]}")
    return f"The machine: {'; '.join(said)}." if said else "The machine was not calibrated."


def warnings(a: Results, b: Results, changes: Sequence[Change]) -> list[str]:
    """What to know before believing the table."""
    said = []
    if machine_label(a.machine) != machine_label(b.machine):
        said.append("Two machines: a difference is theirs, not the code's.")
    elif a.machine.blas != b.machine.blas or a.machine.mlx_device != b.machine.mlx_device:
        said.append("MLX computed on another device, or with another BLAS.")
    mine, others = a.machine.versions, b.machine.versions
    other = [
        f"{printable(name)} {printable(mine[name])}, then {printable(others[name])}"
        for name in mine
        if name in others and mine[name] != others[name] and name != OURS
    ]
    if other:
        said.append(f"Other versions: {'; '.join(other)}.")
    if not changes:
        said.append("Nothing to compare: no model was measured at the same work in both runs.")
    missing = sum(bool(row.speed) for row in rows(a)) - len(changes)
    if changes and missing:
        said.append(f"{missing} of A's measurements are not in B and are left out.")
    if any(change.divided_by == AS_MEASURED for change in changes):
        said.append("Some trials have no calibration: the machine's drift is not divided out.")
    return said


def _divisors(changes: Sequence[Change]) -> str:
    kinds: dict[str, dict[str, None]] = {}
    for change in changes:
        kinds.setdefault(change.before.work.kind, {})[change.divided_by] = None
    return "; ".join(
        f"{kind_heading(kind).lower()} {' or '.join(by)}" for kind, by in kinds.items()
    )


def _speed(row: Row) -> str:
    assert row.speed is not None
    return number(row.speed.median) + (" s" if row.unit == "s" else "")
