"""Results -> what there is to say about them: a row a measurement, and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from ..results import UNKNOWN, Calibration, Measurement, Model, Results, Trial, Work
from ..statistics import Ratio, Summary, ratio, summarize
from .wording import (
    ENOUGH,
    KINDS,
    OURS,
    enumerated,
    factor,
    interval,
    is_tie,
    model_label,
    number,
    percent,
    prefixed,
    printable,
    scaled,
    short,
    span,
    times,
    work_label,
)


@dataclass(frozen=True)
class Row:
    """One measurement, and what follows from it.

    `ratio`: how many times as fast this project is on the same model and work, by the trials of
    the same turns, so many `turns`; None for itself, where it wasn't measured, and for one that
    generates other tokens: a fast wrong answer doesn't count. `fraction`: of the roofline.
    `remarks`: what has to be said beside the numbers.
    """

    model: Model
    work: Work
    runtime: str
    unit: str
    speed: Summary | None
    ratio: Ratio | None
    turns: int
    fraction: float | None
    remarks: tuple[str, ...]
    measurement: Measurement

    @property
    def ours(self) -> bool:
        """Whether this project was measured."""
        return self.measurement.runtime == OURS

    @property
    def wrong(self) -> bool:
        """Whether it generates other tokens than this project."""
        return self.measurement.differs is not None


def rows(results: Results) -> list[Row]:
    """By model, then by work, this project first; the rest as it was measured."""
    measurements = results.measurements
    models = {model.name: model for model in results.models}
    for m in measurements:
        models.setdefault(m.model, Model(m.model, m.model, UNKNOWN, 0, 0))
    works = {m.work: i for i, m in reversed(list(enumerate(measurements)))}
    ours = {(m.model, m.work, m.unit): m for m in measurements if m.runtime == OURS}
    order = list(models)
    found = [_row(models[m.model], m, ours.get((m.model, m.work, m.unit))) for m in measurements]
    return sorted(found, key=lambda r: (order.index(r.model.name), works[r.work], not r.ours))


def _row(model: Model, measurement: Measurement, ours: Measurement | None) -> Row:
    values = list(usable(measurement.trials).values())
    speed = summarize(values) if values else None
    limit = measurement.limit
    fraction = None
    if speed and limit and measurement.unit == "tokens/s" and limit.tokens_per_second > 0:
        fraction = speed.median / limit.tokens_per_second
    compared, turns = _ratio(ours, measurement) if ours else (None, 0)
    return Row(
        model=model,
        work=measurement.work,
        runtime=short(printable(measurement.runtime), 24),
        unit=printable(measurement.unit),
        speed=speed,
        ratio=compared,
        turns=turns,
        fraction=fraction,
        remarks=tuple(_remarks(measurement)),
        measurement=measurement,
    )


def usable(trials: Iterable[Trial]) -> dict[int, float]:
    """Turn -> value, of the trials whose value can be a time or a speed."""
    return {t.turn: t.value for t in trials if math.isfinite(t.value) and t.value > 0}


def _ratio(ours: Measurement, theirs: Measurement) -> tuple[Ratio | None, int]:
    a, b = usable(ours.trials), usable(theirs.trials)
    turns = sorted(a.keys() & b.keys())
    if theirs.runtime == OURS or theirs.differs is not None or not turns:
        return None, 0
    above, below = [a[t] for t in turns], [b[t] for t in turns]
    if ours.unit != "tokens/s":
        above, below = below, above
    found = ratio(above, below)
    if len(turns) < ENOUGH:  # the median of two turns' ratios is their mean, so that of the slower
        found = found._replace(value=median(above) / median(below))
    return found, len(turns)


def _remarks(measurement: Measurement) -> Iterator[str]:
    if measurement.error:
        yield f"failed: {printable(measurement.error)}"
    if measurement.differs:
        yield (
            f"other tokens than {OURS}, so its speed doesn't count: "
            f"{printable(measurement.differs)}"
        )
    if measurement.note:
        yield printable(measurement.note)
    if measurement.statistics:
        yield ", ".join(f"{printable(k)} {number(v)}" for k, v in measurement.statistics.items())
    if not measurement.trials and not measurement.error:
        yield "not measured"


class Cells(NamedTuple):
    """A row in words; `ratio` holds the interval as well."""

    speed: str
    middle: str
    ratio: str
    limit: str


def cells(row: Row) -> Cells:
    """What a table shows of a row, empty where there is nothing; seconds say that they are."""
    speed, middle = "failed" if row.measurement.error else "–", ""
    if row.speed:
        speed = number(row.speed.median) + ("" if row.unit == "tokens/s" else f" {row.unit}")
        middle = span(number(row.speed.q1), number(row.speed.q3))
    ratio = "other tokens" if row.wrong else ""
    if row.ratio:
        ratio = times(row.ratio, row.turns)
    limit = percent(row.fraction) if row.fraction is not None else ""
    return Cells(speed, middle, ratio, limit)


def runtimes(found: Iterable[Row]) -> list[str]:
    """By name, this project first."""
    names = dict.fromkeys(row.runtime for row in found)
    return sorted(names, key=lambda name: name != OURS)


def by_model(found: Iterable[Row]) -> dict[str, list[Row]]:
    """Model's name -> its rows."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(row.model.name, []).append(row)
    return groups


def numbered(found: Iterable[Row]) -> dict[str, int]:
    """Remark -> its number, counted from 1."""
    remarks = dict.fromkeys(remark for row in found for remark in row.remarks)
    return {remark: i for i, remark in enumerate(remarks, 1)}


# ---------------------------------------------------------------------------------------------
# Sentences


class Headline(NamedTuple):
    """What was measured, and what came of it."""

    what: str
    says: str

    def __str__(self) -> str:
        return f"{self.what}: {self.says}"


def headlines(found: Iterable[Row]) -> list[Headline]:
    """For every model, what its generation and prompt processing come to."""
    return [line for group in by_model(found).values() for line in _headlines(group)]


def _headlines(group: list[Row]) -> Iterator[Headline]:
    # Generation is told at its shortest context, prompt processing at its longest prompt.
    for kind, which in (("decode", min), ("prefill", max)):
        ours = [row for row in group if row.ours and row.work.kind == kind and row.speed]
        if not ours:
            continue
        row = which(ours, key=lambda r: r.work.prompt_tokens)
        peers = [r for r in group if r.work == row.work and r.ratio]
        said, ties, unsure = [], [], []
        for r in peers:
            assert r.ratio is not None
            if r.turns < ENOUGH or not _agrees(r.ratio, row, r):
                unsure.append(r.runtime)
            elif is_tie(r.ratio, r.turns):
                ties.append(r.runtime)
            else:
                said.append(f"{factor(r.ratio)} {r.runtime} ({interval(r.ratio, r.turns)})")
        if ties:
            said.append(f"a tie with {enumerated(ties)}")
        if unsure:
            said.append(f"too few trials, or too unsteady, to compare with {enumerated(unsure)}")
        limit = f", {percent(row.fraction)} of the roofline" if row.fraction is not None else ""
        against = f"; {enumerated(said)}" if said else ""
        assert row.speed is not None
        speed = f"{number(row.speed.median)} {row.unit}"
        yield Headline(
            f"{model_label(row.model)}, {work_label(row.work)}",
            f"{OURS} {speed}{limit}{against}.",
        )


def _agrees(found: Ratio, ours: Row, theirs: Row) -> bool:
    """Whether the medians in the table say the same as the interval of a ratio."""
    assert ours.speed is not None and theirs.speed is not None
    shown = ours.speed.median / theirs.speed.median
    return found.low <= (shown if ours.unit == "tokens/s" else 1 / shown) <= found.high


def graph_sentence(group: Iterable[Row]) -> str:
    """What a decoded token costs beside arithmetic, by runtime; empty where nobody counted."""
    costs = {r.runtime: r.measurement.graph for r in group if r.measurement.graph}
    said = [
        f"{name} {graph.primitives:,} primitives, {number(1e6 * graph.host_seconds)} µs"
        for name, graph in costs.items()
        if graph
    ]
    return f"Graph of a decoded token and time to build it: {'; '.join(said)}." if said else ""


def peak_memory(group: Iterable[Row]) -> dict[str, tuple[int | None, int | None]]:
    """Runtime -> most bytes resident, most bytes that MLX held, in any trial."""
    trials: dict[str, list[Trial]] = {}
    for row in group:
        trials.setdefault(row.runtime, []).extend(row.measurement.trials)
    return {
        name: (
            max((t.peak_bytes for t in some if t.peak_bytes), default=None),
            max((t.mlx_peak_bytes for t in some if t.mlx_peak_bytes), default=None),
        )
        for name, some in trials.items()
    }


def memory_sentence(group: Iterable[Row]) -> str:
    """Peak memory by runtime; empty where nobody looked."""
    said = []
    for name, (resident, held) in peak_memory(group).items():
        if resident:
            of_it = f" (MLX {scaled(held, 'B')})" if held else ""
            said.append(f"{name} {scaled(resident, 'B')}{of_it}")
    return f"Peak memory, resident: {', '.join(said)}." if said else ""


def calibrations(results: Results) -> list[Calibration]:
    """All that a run took, beside its trials and with them."""
    return results.calibration + [
        trial.calibration
        for measurement in results.measurements
        for trial in measurement.trials
        if trial.calibration
    ]


def measured_machine(results: Results) -> dict[str, tuple[float, float, float]]:
    """Name -> median, least and most: "bandwidth" in bytes/s, and matmul by dtype in FLOP/s."""
    values: dict[str, list[float]] = {}
    for calibration in calibrations(results):
        for name, value in {"bandwidth": calibration.bandwidth, **calibration.matmul}.items():
            if math.isfinite(value) and value > 0:
                values.setdefault(name, []).append(value)
    return {name: (median(some), min(some), max(some)) for name, some in values.items()}


def machine_sentences(results: Results) -> dict[str, str]:
    """What was measured of the machine, in words by name."""
    said = {}
    for name, (middle, least, most) in measured_machine(results).items():
        unit = "B/s" if name == "bandwidth" else "FLOP/s"
        what = "Bandwidth" if name == "bandwidth" else f"Matmul, {printable(name)}"
        by, _ = prefixed(middle)
        between = f" ({number(least / by)}–{number(most / by)})" if least < most else ""
        said[f"{what}, measured"] = f"{scaled(middle, unit)}{between}"
    return said


def kind_heading(kind: str) -> str:
    """The heading over rows of one kind."""
    return KINDS[kind][1] if kind in KINDS else printable(kind)
