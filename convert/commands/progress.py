"""How far it is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx

from mlx_openelm.command import tell
from mlx_openelm.streams import printable

from ..sources import LazyTensor

_LINES = 10  # where there is no terminal
_WIDE = 60  # columns of a terminal that has room for a tensor's name
_SILENT = 64 << 20  # bytes; what is smaller is done before a line could be read


@contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Shows on standard error how many of `total` bytes are done.

    Yields:
        `report(what, nbytes)`, to be called with every bit that is done.
    """
    if sys.stderr.isatty():
        with _bar(total) as report:
            yield report
    else:
        yield _lines(total)


def size(tensors: Mapping[str, LazyTensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.nbytes for tensor in tensors.values())


def watched(
    tensors: Mapping[str, LazyTensor], report: Callable[[str, int], None]
) -> dict[str, LazyTensor]:
    """The same tensors; whenever rows of one are read, that is reported."""

    def rows(name: str, tensor: LazyTensor, start: int, stop: int) -> mx.array:
        found = tensor.rows(start, stop)
        report(name, found.nbytes)
        return found

    return {
        name: replace(tensor, rows=partial(rows, name, tensor)) for name, tensor in tensors.items()
    }


def _lines(total: int) -> Callable[[str, int], None]:
    done = told = 0

    def report(what: str, nbytes: int) -> None:
        nonlocal done, told
        done += nbytes
        if total > _SILENT and done * _LINES // total > told:
            told = done * _LINES // total
            tell(f"{told * 100 // _LINES:3d} % of {total / 1e6:,.0f} MB ({_short(what)})")

    return report


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    console = Console(stderr=True)
    wide = console.width >= _WIDE
    columns: list[ProgressColumn] = [
        BarColumn(bar_width=16 if wide else 4),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    ]
    if wide:
        name = Column(no_wrap=True, overflow="ellipsis")
        columns.append(TextColumn("{task.description}", markup=False, table_column=name))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, nbytes: bar.update(task, advance=nbytes, description=_short(what))


def _short(tensor: str) -> str:
    return printable(tensor.removeprefix("transformer.").removesuffix(".weight"))
