"""Tables on a terminal of any width: where one doesn't fit, its rows as wrapped lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text


def show(console: Console, table: Table, rows: Sequence[Sequence[Text]] | None = None) -> None:
    """Print a table; without the room for it, line by line, so that no figure is cut.

    Args:
        console: where to.
        table: its columns have names, except where the cells need none.
        rows: the cells to print line by line, if they aren't the table's: the first of each is
            what the row is about, and isn't repeated while it stays the same.
    """
    from rich.padding import Padding
    from rich.text import Text

    if _least_width(table) <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(Text(str(table.title)))
    names = [" ".join(str(column.header).split()) for column in table.columns]
    if rows is None:
        cells = ([_text(cell) for cell in column.cells] for column in table.columns)
        rows = list(zip(*cells, strict=True))
    about = ""
    for first, *others in rows:
        if first.plain != about:
            about = first.plain
            console.print(first)
        said = [
            Text(f"{name} " if name else "", style="dim") + cell
            for name, cell in zip(names[1:], others, strict=True)
            if cell.plain
        ]
        if said:
            console.print(Padding(Text("; ").join(said), (0, 0, 0, 2)))


def _text(cell: object) -> Text:
    from rich.text import Text

    return cell if isinstance(cell, Text) else Text(str(cell))


def _least_width(table: Table) -> int:
    """Columns of the terminal that it takes to cut no word, and nothing that mustn't be wrapped."""
    _, right, _, left = table.padding
    between = right + left + 1
    return sum(_least(column) + between for column in table.columns) + between


def _least(column: Column) -> int:
    from rich.cells import cell_len

    lines = [line for cell in (column.header, *column.cells) for line in str(cell).splitlines()]
    parts = lines if column.no_wrap else [word for line in lines for word in line.split()]
    return max([column.min_width or 1, *map(cell_len, parts)])
