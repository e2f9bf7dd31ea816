"""How far a run is: a bar a workload on a terminal, a line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_openelm.command import tell

Advance = Callable[[], None]
Begin = Callable[[str, int], Advance]  # (what, number of steps) -> to be called after each


@contextmanager
def progress() -> Iterator[Begin]:
    """Yields `begin(what, steps)`, which starts the next workload's bar on standard error."""
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeLeft(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def begin(what: str, steps: int) -> Advance:
            task = bars.add_task(what, total=steps)
            return lambda: bars.advance(task)

        yield begin


def _line(what: str, steps: int) -> Advance:
    tell(what)
    return lambda: None
