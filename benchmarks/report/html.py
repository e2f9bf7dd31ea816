"""Results as one page of HTML that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..results import Results
from .charts import Bars, Chart, Figure, figures, runs
from .findings import (
    Row,
    by_model,
    cells,
    graph_sentence,
    headlines,
    machine_sentences,
    memory_sentence,
    numbered,
    rows,
)
from .palette import LOOKS, slots
from .svg import draw, marker
from .wording import (
    OURS,
    command_line,
    machine_facts,
    machine_label,
    model_facts,
    model_label,
    printable,
    work_label,
)


def write_html(results: Sequence[Results], file: Path) -> None:
    """Write the report of one run or several."""
    file.write_text(page(results), encoding="utf-8")


def page(results: Sequence[Results]) -> str:
    """The report's text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    several = len(results) > 1
    return environment.get_template("page.html").render(
        ours=OURS,
        looks=list(enumerate(LOOKS)),
        runs=[_run(result, i if several else 0) for i, result in enumerate(results, 1)],
        between=_figure(runs(results), "between") if several and runs(results).charts else None,
    )


def _run(results: Results, i: int) -> dict[str, Any]:
    found = rows(results)
    name = f"run-{i}" if i else "run"
    return {
        "id": name,
        "name": f"Run {i}: {machine_label(results.machine)}"
        if i
        else machine_label(results.machine),
        "created": printable(results.created),
        "command": command_line(results.command),
        "partial": results.partial,
        "headlines": headlines(found),
        "notes": [printable(note) for note in results.notes],
        "figures": [_figure(figure, f"{name}-{j}") for j, figure in enumerate(figures(results), 1)],
        "models": [_model(group) for group in by_model(found).values()],
        "machine": machine_facts(results.machine) | machine_sentences(results),
    }


def _figure(figure: Figure, name: str) -> dict[str, Any]:
    from markupsafe import Markup

    places = slots(figure.series)
    planes = [chart for chart in figure.charts if not isinstance(chart, Bars)]
    return {
        "id": name,
        "title": figure.title,
        "says": figure.says,
        "legend": [(s, Markup(marker(places[s]))) for s in figure.series] if planes else [],
        "charts": [_chart(chart, figure, places) for chart in figure.charts],
    }


def _chart(chart: Chart, figure: Figure, places: dict[str, int]) -> dict[str, Any]:
    from markupsafe import Markup

    heads, data = chart.table()
    return {
        "title": chart.title if chart.title != figure.title else "",
        # Safe: ElementTree has escaped what comes from a file.
        "svg": Markup(draw(chart, places)),
        "heads": heads,
        "data": data,
    }


def _model(group: Sequence[Row]) -> dict[str, Any]:
    model, remarks = group[0].model, numbered(group)
    sentences = (graph_sentence(group), memory_sentence(group))
    return {
        "label": model_label(model),
        "facts": model_facts(model),
        "works": [
            {"label": work_label(work), "rows": [_row(row, remarks) for row in same]}
            for work, same in groupby(group, key=lambda row: row.work)
        ],
        "remarks": remarks,
        "sentences": [sentence for sentence in sentences if sentence],
    }


def _row(row: Row, remarks: dict[str, int]) -> dict[str, Any]:
    words = cells(row)
    ratio, _, interval = words.ratio.partition(" (")
    return {
        "runtime": row.runtime,
        "marks": [remarks[remark] for remark in row.remarks],
        "ours": row.ours,
        "alarming": bool(row.measurement.error) or row.wrong,
        "speed": words.speed,
        "middle": words.middle,
        "ratio": ratio,
        "interval": interval.removesuffix(")"),
        "limit": words.limit,
    }
