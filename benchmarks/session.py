"""What a run has found so far, and the `Results` it makes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from . import machine, roofline
from .models import Target
from .peers import PEERS, is_installed
from .results import UNKNOWN, Calibration, Graph, Machine, Measurement, Results, Trial, Work
from .runner import TIME_LIMIT

BUSY = 0.5  # processes a core that run already
NOISY = 0.15  # interquartile range of the bandwidth over its median


@dataclass
class Row:
    """A measurement that grows."""

    target: Target
    runtime: str
    work: Work
    trials: list[Trial] = field(default_factory=list)
    graph: Graph | None = None
    statistics: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    differs: str | None = None
    error: str | None = None


@dataclass
class Session:
    """What a run has found so far.

    Attributes:
        deadline: `time.monotonic()` at which it has to end; None: when it is done.
        dtypes: whose matmul rates are taken before every turn.
    """

    command: list[str]
    machine: Machine
    deadline: float | None = None
    time_limit: float = TIME_LIMIT
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    calibration: list[Calibration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def note(self, what: str) -> None:
        """Once."""
        if what not in self.notes:
            self.notes.append(what)

    def look_again(self) -> None:
        """Whether the machine has become hot meanwhile."""
        now = machine.thermal_pressure()
        if now not in ("none", UNKNOWN):
            self.machine = replace(self.machine, thermal_pressure=now)

    def results(self, partial: bool) -> Results:
        """As they are now."""
        taken = [t.calibration for row in self.rows for t in row.trials if t.calibration]
        found = [*self.calibration, *taken]
        middle = roofline.median(found) if found else None
        return Results(
            created=self.created,
            command=self.command,
            machine=self.machine,
            models=[target.model for target in self.targets],
            measurements=[_measurement(row, middle) for row in self.rows],
            calibration=self.calibration,
            notes=[*self.notes, *conditions(self.machine, taken)],
            partial=partial,
        )


def _measurement(row: Row, middle: Calibration | None) -> Measurement:
    model = row.target.model
    return Measurement(
        model=model.name,
        runtime=row.runtime,
        work=row.work,
        unit="s" if row.work.kind in ("load", "cold") else "tokens/s",
        trials=row.trials,
        limit=roofline.limit(row.target.config, model, row.work, middle) if middle else None,
        graph=row.graph,
        statistics={name: statistics.median(v) for name, v in row.statistics.items()},
        note=row.note,
        differs=row.differs,
        error=row.error,
    )


def conditions(found: Machine, taken: Sequence[Calibration]) -> list[str]:
    """What would make a reader doubt the numbers: noise, heat, a battery."""
    notes = []
    if len(taken) >= 4:
        values = [one.bandwidth for one in taken]
        q1, middle, q3 = statistics.quantiles(values, n=4)
        if (q3 - q1) / middle > NOISY:
            notes.append(
                f"the machine was noisy: its bandwidth went from {min(values) / 1e9:.1f} to "
                f"{max(values) / 1e9:.1f} GB/s between the trials"
            )
    if found.thermal_pressure not in ("none", UNKNOWN):
        notes.append(f"the machine was throttled: thermal pressure {found.thermal_pressure}")
    if found.power_source == "battery":
        notes.append("the machine ran on battery")
    if found.low_power_mode == "on":
        notes.append("the machine was in low-power mode")
    return notes


def busy(load: float, cores: int | None) -> list[str]:
    """What to say of a load average before the run: others want the cores too."""
    if cores is None or load < BUSY * cores:
        return []
    return [
        f"the machine was busy before the run began: load average {load:.1f} on {cores} cores; "
        "runtimes whose threads wait for each other suffer most from that"
    ]


def installed(session: Session, peers: Sequence[str]) -> list[str]:
    """The peers that can run; a note for each that can't says how to add it."""
    for peer in peers:
        if not is_installed(peer):
            session.note(f"{peer} is not installed; to add it: {PEERS[peer].install}")
    return [peer for peer in peers if is_installed(peer)]
