"""The charts as PNGs, drawn by matplotlib, for where a page with SVG can't go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError

from ..results import Results
from .charts import Bars, Figure, Plane, figures, runs
from .palette import LOOKS, slots
from .svg import tick, ticks
from .wording import machine_label, short

INK, SOFT, GRID = "#1c1d1f", "#5d6066", "#e6e6e0"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "savefig.dpi": 160,
}


def write_pngs(results: Sequence[Results], folder: Path) -> list[Path]:
    """Write every figure of every run; returns the files.

    Raises:
        OpenELMError: when matplotlib isn't installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise OpenELMError("PNGs need matplotlib: pip install matplotlib") from None
    written = []
    with matplotlib.rc_context(STYLE):
        for i, run in enumerate(results, 1):
            prefix = f"run-{i}-" if len(results) > 1 else ""
            for figure in figures(run):
                file = folder / f"{prefix}{_slug(figure.title)}.png"
                _write(figure, machine_label(run.machine), file)
                written.append(file)
        if len(results) > 1 and (between := runs(results)).charts:
            names = [f"run {i}: {machine_label(r.machine)}" for i, r in enumerate(results, 1)]
            _write(between, "; ".join(names), folder / f"{_slug(between.title)}.png")
            written.append(folder / f"{_slug(between.title)}.png")
    return written


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _write(figure: Figure, machine: str, file: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    places = slots(figure.series)
    columns = min(2, len(figure.charts))
    lines = -(-len(figure.charts) // columns)
    tall = max(_height(chart) for chart in figure.charts)
    canvas = Canvas(figsize=(6.4 * columns, tall * lines + 0.7), layout="constrained")
    canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    canvas.supxlabel(f"mlx-openelm benchmarks, {short(machine, 120)}", fontsize=8, color=SOFT)
    axes = canvas.subplots(lines, columns, squeeze=False).flatten().tolist()
    for chart, ax in zip(figure.charts, axes, strict=False):
        if chart.title != figure.title:
            ax.set_title(chart.title)
        if isinstance(chart, Bars):
            _bars(chart, ax, places)
        else:
            _plane(chart, ax, places)
    for ax in axes[len(figure.charts) :]:
        ax.set_visible(False)
    canvas.savefig(file)


def _height(chart: Bars | Plane) -> float:
    if isinstance(chart, Plane):
        return 4.2
    return 1.0 + 0.24 * sum(1.4 + len(marks) for _, marks in chart.groups)


def _bars(chart: Bars, ax: Any, places: Mapping[str, int]) -> None:
    y, names = 0.0, []
    for group, marks in chart.groups:
        ax.annotate(
            short(group, 70), (0, y), xycoords=("axes fraction", "data"), fontweight="bold",
            va="center", xytext=(4, 0), textcoords="offset points",
        )  # fmt: skip
        y += 1
        for mark in marks:
            look = LOOKS[places[mark.series]]
            face = "white" if mark.hollow else look.light
            error = [[max(0, mark.value - mark.low)], [max(0, mark.high - mark.value)]]
            if not chart.dots:
                ax.barh(y, mark.value, 0.62, color=face, edgecolor=look.light, alpha=0.85)
            ax.errorbar(
                mark.value, y, xerr=error, fmt=look.shape if chart.dots else "none",
                color=look.light, markerfacecolor=face, ecolor=INK, elinewidth=1, markersize=5,
            )  # fmt: skip
            ax.annotate(
                mark.label, (1, y), xycoords=("axes fraction", "data"), va="center",
                xytext=(4, 0), textcoords="offset points",
            )  # fmt: skip
            names.append((y, short(mark.series, 16)))
            y += 1
        y += 0.4
    ax.set_yticks([place for place, _ in names], [name for _, name in names])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_ylim(y - 0.4, -0.7)
    ax.set_xlabel(chart.axis)
    if chart.dots:
        ax.margins(x=0.08)
        _logarithmic(ax.xaxis, ax.set_xscale)
    if chart.one:
        ax.axvline(1, color=SOFT, linewidth=1)


def _plane(chart: Plane, ax: Any, places: Mapping[str, int]) -> None:
    for _, corners in chart.roofs:
        ax.plot(*zip(*corners, strict=True), color=SOFT, linewidth=1)
    if chart.roofs:
        names = "\n".join(["Roofs, from the top:", *(name for name, _ in chart.roofs)])
        where: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "bottom"}
        ax.annotate(names, (0.99, 0.02), fontsize=7, color=SOFT, **where)
    for name, points in chart.points:
        look = LOOKS[places[name]]
        xs, ys = [p.x for p in points], [p.y for p in points]
        error = [[max(0, p.y - p.low) for p in points], [max(0, p.high - p.y) for p in points]]
        ax.errorbar(
            xs, ys, yerr=error, fmt=look.shape + ("-" if chart.joined else ""), color=look.light,
            label=short(name, 40), linewidth=1.3, markersize=5, elinewidth=1,
        )  # fmt: skip
    if chart.linear:
        ax.set_ylim(bottom=0)
    else:
        _logarithmic(ax.xaxis, ax.set_xscale)
        _logarithmic(ax.yaxis, ax.set_yscale)
    if chart.x_ticks:
        ax.set_xticks(chart.x_ticks, [tick(x) for x in chart.x_ticks])
        ax.set_xticks([], minor=True)
    ax.set_xlabel(chart.x_axis)
    ax.set_ylabel(chart.y_axis)
    ax.legend(frameon=False, fontsize=8)


def _logarithmic(axis: Any, set_scale: Any) -> None:
    """With the same round values as in the SVG."""
    set_scale("log")
    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    found = ticks(low, high, log=True)
    axis.set_ticks(found, [tick(value) for value in found])
    axis.set_ticks([], minor=True)
