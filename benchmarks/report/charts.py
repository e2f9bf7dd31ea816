"""What the charts show, as data: `svg` and `png` draw it, and a reader gets it as a table.

Two kinds: quantities by category (`Bars`), and quantities over a quantity (`Plane`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from ..results import Results
from .findings import Row, by_model, measured_machine, peak_memory, rows, runtimes
from .wording import (
    ENOUGH,
    OURS,
    factor,
    is_tie,
    model_label,
    number,
    printable,
    scaled,
    short,
    span,
    times,
    work_label,
)

MUCH = 30  # times the least: then a bar from zero can't show the least
Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]  # the heads of the columns, and the rows


@dataclass(frozen=True)
class Mark:
    """A quantity of a series and its interval, in a word and in full.

    `hollow`: it isn't to be counted, as a tie or the speed of a wrong answer.
    """

    series: str
    value: float
    low: float
    high: float
    label: str
    words: str
    hollow: bool = False


@dataclass(frozen=True)
class Bars:
    """Categories with a few marks each: bars from zero, or dots on a logarithmic axis.

    `one`: the quantities are ratios, and a line at 1 parts them.
    """

    title: str
    says: str
    axis: str
    groups: list[tuple[str, list[Mark]]]
    series: list[str]
    dots: bool = False
    one: bool = False

    def table(self) -> Table:
        """Its data."""
        heads = ("", "runtime", self.axis)
        return heads, [(name, m.series, m.words) for name, marks in self.groups for m in marks]


@dataclass(frozen=True)
class Point:
    """A measured point: y in the middle, low to high; and both in words."""

    x: float
    y: float
    low: float
    high: float
    x_words: str
    y_words: str
    name: str = ""


@dataclass(frozen=True)
class Plane:
    """Points by series over two axes, logarithmic both unless `linear`; roofs are drawn behind."""

    title: str
    says: str
    x_axis: str
    y_axis: str
    points: list[tuple[str, list[Point]]]
    series: list[str]
    joined: bool = True
    linear: bool = False
    x_ticks: list[float] = field(default_factory=list)  # none: the powers of ten
    roofs: list[tuple[str, list[tuple[float, float]]]] = field(default_factory=list)

    def table(self) -> Table:
        """Its data."""
        heads = ("", "runtime", self.x_axis, self.y_axis)
        measured = [(p.name, name, p.x_words, p.y_words) for name, ps in self.points for p in ps]
        roofs = [
            (name, "", number(x), number(y)) for name, corners in self.roofs for x, y in corners
        ]
        return heads, measured + roofs


Chart = Bars | Plane


@dataclass(frozen=True)
class Figure:
    """One chart, or several of a kind side by side, a model each."""

    title: str
    says: str
    charts: list[Chart]

    @property
    def series(self) -> list[str]:
        """All that its charts show, in their order."""
        return list(dict.fromkeys(name for chart in self.charts for name in chart.series))


def figures(results: Results) -> list[Figure]:
    """Every figure that this run has data for."""
    found = rows(results)
    makers: tuple[Callable[[list[Row], Results], Figure], ...] = (
        generation,
        memory,
        ratios,
        prompts,
        contexts,
        roofline,
        waiting,
        drift,
    )
    return [figure for make in makers if (figure := make(found, results)).charts]


# ---------------------------------------------------------------------------------------------
# By category


def generation(found: list[Row], _: Results) -> Figure:
    """Generation of one sequence by size and precision, each model at its shortest context."""
    groups = []
    for some in by_model(found).values():
        decode = [row for row in some if row.work.kind == "decode" and row.work.batch == 1]
        measured = [row for row in decode if row.speed]
        if measured:
            work = min((row.work for row in measured), key=lambda w: (w.prompt_tokens, w.text))
            marks = [_speed(row) for row in measured if row.work == work]
            groups.append((f"{model_label(some[0].model)}: {work_label(work)}", marks))
    says = (
        "Text is made at this speed, one sequence at a time. Further right is faster; whiskers "
        "span the middle half of the trials."
    )
    return _bars("Generation by size and precision", says, "tokens per second", groups)


def waiting(found: list[Row], _: Results) -> Figure:
    """Loading, and process start to first token."""
    groups = []
    for some in by_model(found).values():
        for work, same in groupby((r for r in some if r.unit == "s" and r.speed), lambda r: r.work):
            label = f"{model_label(some[0].model)}: {work_label(work)}"
            groups.append((label, [_speed(row) for row in same]))
    says = "What a person waits for before text begins. Less is better."
    return _bars("Waiting for the first token", says, "seconds", groups)


def memory(found: list[Row], _: Results) -> Figure:
    """Peak resident memory by model."""
    groups = []
    for some in by_model(found).values():
        model, marks = some[0].model, []
        for name, (resident, held) in peak_memory(some).items():
            if resident:
                label, size = scaled(resident, "B"), resident / 1e6
                words = f"{label}, MLX {scaled(held, 'B')}" if held else label
                marks.append(Mark(name, size, size, size, label, words))
        if marks:
            groups.append((f"{model_label(model)}: {scaled(model.bytes, 'B')} of weights", marks))
    says = (
        "The most that the whole process held in memory, weights and everything else; and of it "
        "what MLX held, where that is known. Less is better."
    )
    return _bars("Peak memory", says, "megabytes, resident", groups)


def ratios(found: list[Row], _: Results) -> Figure:
    """How many times as fast this project is as each peer, with intervals."""
    charts: list[Chart] = []
    says = (
        f"How many times as fast {OURS} is: right of 1 it is faster, left of 1 the other is. A "
        "line is the 95 % interval by trials taken in turns. Hollow: the line crosses 1, a tie, or "
        "there are too few trials for one."
    )
    for some in by_model(found).values():
        groups = []
        for work, same in groupby(some, lambda r: r.work):
            marks = [
                Mark(
                    r.runtime,
                    *r.ratio,
                    "tie" if is_tie(r.ratio, r.turns) else factor(r.ratio),
                    times(r.ratio, r.turns),
                    r.ratio.tie or r.turns < ENOUGH,
                )
                for r in same
                if r.ratio
            ]
            if marks:
                groups.append((work_label(work), marks))
        if groups:
            series = runtimes(r for r in some if r.ratio)
            label = model_label(some[0].model)
            axis = f"{OURS} is this many times as fast"
            charts.append(Bars(label, says, axis, groups, series, dots=True, one=True))
    return Figure("Against the others", says, charts)


def _bars(title: str, says: str, axis: str, groups: list[tuple[str, list[Mark]]]) -> Figure:
    series = sorted({m.series for _, marks in groups for m in marks}, key=lambda s: (s != OURS, s))
    values = [mark.value for _, marks in groups for mark in marks]
    dots = bool(values) and max(values) > MUCH * min(values)
    bars = Bars(title, says, axis, groups, series, dots)
    return Figure(title, says, [bars] if groups else [])


def _speed(row: Row) -> Mark:
    assert row.speed is not None
    speed = row.speed
    middle = span(number(speed.q1), number(speed.q3))
    label = number(speed.median)
    words = label if speed.q1 == speed.q3 else f"{label} ({middle})"
    return Mark(row.runtime, speed.median, speed.q1, speed.q3, label, words, row.wrong)


# ---------------------------------------------------------------------------------------------
# Over a quantity


def prompts(found: list[Row], _: Results) -> Figure:
    """Prompt processing over the prompt's length."""
    says = (
        "A prompt is read at this speed. Whiskers span the middle half of the trials; both axes "
        "are logarithmic."
    )
    return _lengths("Prompt processing over length", says, found, "prefill", "prompt, tokens")


def contexts(found: list[Row], _: Results) -> Figure:
    """Generation over the context that comes before it, where more than one was measured."""
    says = "What a longer context costs: generation after so many tokens. Both axes logarithmic."
    figure = _lengths("Generation over context", says, found, "decode", "context before, tokens")
    long = [c for c in figure.charts if isinstance(c, Plane) and len(c.x_ticks) > 1]
    return Figure(figure.title, says, list(long))


def _lengths(title: str, says: str, found: list[Row], kind: str, x_axis: str) -> Figure:
    charts: list[Chart] = []
    for some in by_model(found).values():
        measured = [
            row
            for row in some
            if row.work.kind == kind
            and row.work.batch == 1
            and row.speed
            and row.work.prompt_tokens
        ]
        if not measured:
            continue
        names = runtimes(measured)
        points = [(name, _over_prompt(r for r in measured if r.runtime == name)) for name in names]
        ticks = sorted({float(row.work.prompt_tokens) for row in measured})
        label = model_label(some[0].model)
        charts.append(Plane(label, says, x_axis, "tokens per second", points, names, x_ticks=ticks))
    return Figure(title, says, charts)


def _over_prompt(found: Iterable[Row]) -> list[Point]:
    points = []
    for row in found:
        mark, x = _speed(row), row.work.prompt_tokens
        points.append(
            Point(x, mark.value, mark.low, mark.high, f"{x:,}", mark.words, work_label(row.work))
        )
    return sorted(points, key=lambda p: p.x)


def drift(found: list[Row], _: Results) -> Figure:
    """The speed of a long generation as it goes on, the median of the trials."""
    says = "A long generation in ten parts: a line that falls says that it slows down as it goes."
    charts: list[Chart] = []
    for some in by_model(found).values():
        points = []
        for row in some:
            series = [t.series for t in row.measurement.trials if t.series]
            if series:
                parts = [sorted(part)[len(part) // 2] for part in zip(*series, strict=False)]
                points.append(
                    (
                        row.runtime,
                        [
                            Point(i, v, v, v, f"{i}", number(v), work_label(row.work))
                            for i, v in enumerate(parts, 1)
                        ],
                    )
                )
        if points:
            label, names = model_label(some[0].model), list(dict.fromkeys(n for n, _ in points))
            ticks = [float(i) for i in range(1, max(len(p) for _, p in points) + 1)]
            x, y = "tenth of the generation", "tokens per second"
            charts.append(Plane(label, says, x, y, points, names, linear=True, x_ticks=ticks))
    return Figure("A long generation", says, charts)


def roofline(found: list[Row], results: Results) -> Figure:
    """Operations a second over operations per byte, under what the machine was measured to do."""
    machine = measured_machine(results)
    limited = [r for r in found if r.speed and r.measurement.limit and r.unit == "tokens/s"]
    points = [(name, list(_placed(limited, name))) for name in runtimes(limited)]
    points = [(name, some) for name, some in points if some]
    if not points or "bandwidth" not in machine:
        return Figure("Roofline", "", [])
    xs = [p.x for _, some in points for p in some]
    bandwidth = machine["bandwidth"][0]
    rates = {printable(k): v[0] for k, v in machine.items() if k != "bandwidth"}
    corners = [rate / bandwidth for rate in rates.values()]
    left, right = min([*xs, *corners]) / 2, 2 * max([*xs, *corners])
    roofs = [
        (f"{short(name, 24)} matmul, {scaled(rate, 'FLOP/s')}", _roof(bandwidth, rate, left, right))
        for name, rate in sorted(rates.items(), key=lambda item: -item[1])
    ] or [("bandwidth", [(left, left * bandwidth), (right, right * bandwidth)])]
    says = (
        f"What the machine allows: {scaled(bandwidth, 'B/s')} of measured bandwidth (the slope) "
        "and the measured matrix products (flat). A point is a workload; how far it lies under "
        "the roof is what is lost. Small prompts and generation lie left, bound by memory."
    )
    chart = Plane(
        "Roofline",
        says,
        "operations per byte moved",
        "operations per second",
        points,
        [name for name, _ in points],
        joined=False,
        roofs=roofs,
    )
    return Figure("Roofline", says, [chart])


def _roof(bandwidth: float, rate: float, left: float, right: float) -> list[tuple[float, float]]:
    ridge = rate / bandwidth
    slope = [(left, left * bandwidth), (ridge, rate)] if ridge > left else [(left, rate)]
    return [*slope, (right, rate)]


def _placed(limited: Iterable[Row], runtime: str) -> Iterator[Point]:
    for row in limited:
        limit, speed = row.measurement.limit, row.speed
        assert limit and speed
        if row.runtime == runtime and limit.bytes_per_token > 0 and limit.operations_per_token > 0:
            x = limit.operations_per_token / limit.bytes_per_token
            y, low, high = (
                limit.operations_per_token * v for v in (speed.median, speed.q1, speed.q3)
            )
            name = f"{model_label(row.model)}: {work_label(row.work)}"
            yield Point(x, y, low, high, number(x), scaled(y, "FLOP/s"), name)


# ---------------------------------------------------------------------------------------------
# Several runs


def runs(results: Sequence[Results]) -> Figure:
    """What this project does in each run at the same work, a series a run."""
    says = f"{OURS} in each run, where more than one measured the same. Further right is faster."
    models: dict[str, dict[str, list[Mark]]] = {}
    for i, result in enumerate(results, 1):
        for row in rows(result):
            if row.ours and row.speed and row.unit == "tokens/s":
                works = models.setdefault(model_label(row.model), {})
                mark = replace(_speed(row), series=f"run {i}")
                works.setdefault(work_label(row.work), []).append(mark)
    charts: list[Chart] = []
    for label, works in models.items():
        shared = [(work, marks) for work, marks in works.items() if len(marks) > 1]
        charts += _bars(label, says, "tokens per second", shared).charts
    return Figure("Run by run", says, charts)
