"""How far it is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_openelm.command import tell

_LINES = 10  # where there is no terminal
_SILENT = 64 << 20  # bytes; what is smaller is done before a line could be read


@contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Shows on standard error how many of `total` bytes are done.

    Yields:
        `report(what, done)`, to be called as often as one likes.
    """
    if sys.stderr.isatty():
        with _bar(total) as report:
            yield report
    else:
        yield _lines(total)


def _lines(total: int) -> Callable[[str, int], None]:
    told = 0

    def report(what: str, done: int) -> None:
        nonlocal told
        if total > _SILENT and done * _LINES // total > told:
            told = done * _LINES // total
            tell(f"{told * 100 // _LINES:3d} % of {total / 1e6:,.0f} MB ({_short(what)})")

    return report


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        BarColumn(bar_width=16),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, done: bar.update(task, completed=done, description=_short(what))


def _short(tensor: str) -> str:
    return tensor.removeprefix("transformer.").removesuffix(".weight")
