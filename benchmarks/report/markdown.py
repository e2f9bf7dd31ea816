"""Results as Markdown, for a README or an issue."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from ..results import Results
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
    machine_facts,
    machine_label,
    model_facts,
    model_label,
    printable,
    superscript,
    work_label,
)


def write_markdown(results: Sequence[Results], file: Path) -> None:
    """Write a table for each model of each run, with what has to be said beside it."""
    text = "\n".join(line for run in results for line in _run(run))
    file.write_text(text.strip() + "\n", encoding="utf-8")


def escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is, in a cell of a table or outside."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&@$])", r"\\\1", printable(text))


def _run(results: Results) -> Iterator[str]:
    found = rows(results)
    yield f"### {escaped(machine_label(results.machine))}\n"
    machine = machine_facts(results.machine) | machine_sentences(results)
    known = [f"{name}: {value}" for name, value in machine.items() if value != "unknown"]
    yield f"Measured {escaped(results.created)}. {escaped('; '.join(known))}.\n"
    if results.partial:
        yield "**Partial: the run ended before it was done.**\n"
    for note in results.notes:
        yield f"- Note: {escaped(note)}"
    for line in headlines(found):
        yield f"- **{escaped(line.what)}**: {escaped(line.says)}"
    if not found:
        yield "Nothing was measured."
    for group in by_model(found).values():
        model = group[0].model
        yield f"\n**{escaped(model_label(model))}**: {escaped(model_facts(model))}\n"
        yield from _table(group)
    yield (
        f"\nTokens/s: median of the trials, and the middle half of them. {OURS} is: how many times "
        "as fast as that row, with the 95 % bootstrap interval by trials taken in turns; a tie "
        "when it contains 1. Of limit: of the roofline by this machine's measured bandwidth and "
        "arithmetic.\n"
    )


def _table(group: Sequence[Row]) -> Iterator[str]:
    remarks = numbered(group)
    yield f"| workload | runtime | tokens/s | middle half | {OURS} is | of limit |"
    yield "| --- | --- | ---: | --- | --- | ---: |"
    for work, same in groupby(group, key=lambda row: row.work):
        label = work_label(work)
        for row in same:
            words = [escaped(word) for word in (label, row.runtime, *cells(row))]
            words[1] += " ".join(superscript(remarks[remark]) for remark in row.remarks)
            if row.ours:
                words[1:3] = [f"**{word}**" for word in words[1:3]]
            yield f"| {' | '.join(words)} |"
            label = ""
    sentences = [f"{superscript(i)} {remark}" for remark, i in remarks.items()]
    sentences += [graph_sentence(group), memory_sentence(group)]
    for sentence in filter(None, sentences):
        yield f"\n{escaped(sentence)}"
