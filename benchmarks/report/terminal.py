"""Results as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING

from ..results import Results
from ..tables import show
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
from .wording import (
    OURS,
    machine_label,
    model_facts,
    model_label,
    printable,
    superscript,
    work_label,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

LABEL = 18  # characters of the first column
LEGEND = (
    f"tokens/s: the median of the trials, and the middle half of them. {OURS} is: how many times "
    "as fast as this one, with the 95 % interval by trials taken in turns; a tie when that "
    "contains 1. Of limit: of the roofline, the speed that this machine's measured bandwidth and "
    "arithmetic allow."
)


def table(results: Results, console: Console) -> None:
    """Print what was found: a table for each model, and what has to be said beside it."""
    found = rows(results)

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, emoji=False)

    say(f"\n{machine_label(results.machine)}; {printable(results.machine.os)}", "bold")
    measured = [f"{name}: {value}" for name, value in machine_sentences(results).items()]
    say("; ".join([f"MLX on {printable(results.machine.mlx_device)}", *measured]), "dim")
    if results.partial:
        say("PARTIAL: the run ended before it was done.", "bold yellow")
    if not found:
        say("Nothing was measured.")
        return
    for group in by_model(found).values():
        say(f"\n{model_label(group[0].model)}: {model_facts(group[0].model)}", "bold")
        remarks = numbered(group)
        show(console, *_table(group, remarks))
        for remark, i in remarks.items():
            say(f" {superscript(i)} {remark}", "yellow" if _alarming(group, remark) else "")
        for sentence in (graph_sentence(group), memory_sentence(group)):
            if sentence:
                say(f" {sentence}", "dim")
    say(f"\n{LEGEND}", "dim")
    for note in results.notes:
        say(f"Note: {printable(note)}", "yellow")
    for line in headlines(found):
        say(str(line))


def _table(group: Sequence[Row], remarks: dict[str, int]) -> tuple[Table, list[list[Text]]]:
    """A table of a model's rows; and the rows, each with its whole label."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    made.add_column("workload", min_width=LABEL)
    made.add_column("runtime", min_width=11)
    made.add_column("tokens/s", justify="right", no_wrap=True)
    made.add_column("middle half", no_wrap=True)
    made.add_column(f"{OURS} is", no_wrap=True)
    made.add_column("of\nlimit", justify="right")
    whole = []
    for _, same in groupby(group, key=lambda row: row.work):
        members = list(same)
        # A long label goes on beside the next rows; the last one takes what is left.
        name = work_label(members[0].work)
        lines = wrap(name, LABEL)
        labels = [*lines, *[""] * len(members)][: len(members) - 1]
        labels.append("\n".join(lines[len(members) - 1 :]))
        for label, row in zip(labels, members, strict=True):
            style = "bold" if row.ours else "red" if row.measurement.error or row.wrong else ""
            marks = " ".join(superscript(remarks[remark]) for remark in row.remarks)
            words = (f"{row.runtime} {marks}".strip(), *cells(row))
            texts = [Text(word, style=style) for word in words]
            made.add_row(Text(label), *texts)
            whole.append([Text(name), *texts])
    return made, whole


def _alarming(group: Sequence[Row], remark: str) -> bool:
    return any(remark in row.remarks and (row.measurement.error or row.wrong) for row in group)
