"""The table of ``top`` on a terminal: which columns fit, and how they are drawn.

Rich (the extra ``tui``) draws it where that is installed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Callable

COLUMNS = (
    *("GUEST", "VDEV", "BACKEND", "IOPS", "MB/s", "p50", "p99", "max"),
    *("DEPTH", "FLIGHT", "ERRORS", "MEMORY"),
)
TEXT = 3  # columns that are text
DEAD = "(dead)"
"""Stands in the place of the backend: the process that serves the disk has died."""
_ERRORS, _BACKEND = COLUMNS.index("ERRORS"), COLUMNS.index("BACKEND")
_SPARED = ("MEMORY", "max", "p50", "FLIGHT", "DEPTH", "MB/s", "BACKEND", "ERRORS", "p99")
_GAP = 2  # columns of the terminal between two

Cells = Sequence["tuple[str, ...]"]
Draw = Callable[[Cells, "Sequence[dict[str, Any]]", "Sequence[int]", int], "list[str]"]
"""Makes lines of the names of the columns and the cells of each disk; of the disks, as
:mod:`.rates` has them; of the columns to show; and of the one that they are sorted by."""


def fitting(cells: Cells, sort: int, width: int) -> list[int]:
    """Choose what columns to show in ``width`` columns of a terminal; the one sorted by is there.

    Args:
        cells: of all of them, the names first.
        sort: the column that disks are sorted by.
        width: of a line.
    """
    widths = [max(map(len, column)) for column in zip(*cells)]
    kept = list(range(len(COLUMNS)))
    needed = {sort, _BACKEND} if DEAD in [row[_BACKEND] for row in cells] else {sort}
    for name in _SPARED:
        if sum(widths[each] + _GAP for each in kept) - _GAP <= width:
            break
        if COLUMNS.index(name) not in needed:
            kept.remove(COLUMNS.index(name))
    return kept


def narrowed(cells: Cells, kept: Sequence[int], width: int) -> Cells:
    """Shorten the guests' names, if the columns that are shown have no room otherwise."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    excess = sum(widths[each] + _GAP for each in kept) - _GAP - width
    if excess <= 0:
        return cells
    room = max(len(COLUMNS[0]), widths[0] - excess)
    return [(shortened(row[0], room), *row[1:]) for row in cells]


def shortened(name: str, most: int) -> str:
    """Return so much of a name as fits in ``most`` columns of a terminal."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def plainly(
    cells: Cells, rows: Sequence[dict[str, Any]], kept: Sequence[int], sort: int
) -> list[str]:
    """Draw it with spaces alone."""
    table = [[row[each] for each in kept] for row in cells]
    widths = [max(map(len, column)) for column in zip(*table)]
    return [
        (" " * _GAP)
        .join(
            cell.ljust(width) if column < TEXT else cell.rjust(width)
            for column, cell, width in zip(kept, row, widths)
        )
        .rstrip()
        for row in table
    ]


def drawing() -> Draw:
    """Return what draws the table: Rich, where it is installed."""
    try:
        from rich.console import Console
        from rich.style import Style
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return plainly

    def draw(
        cells: Cells, rows: Sequence[dict[str, Any]], kept: Sequence[int], sort: int
    ) -> list[str]:
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
        for each in kept:
            table.add_column(
                Text(cells[0][each], style="bold reverse" if each == sort else "bold"),
                justify="left" if each < TEXT else "right",
                no_wrap=True,
                style="bold" if each == sort else "",
            )
        for shown, row in zip(cells[1:], rows):
            texts = [Text(cell) for cell in shown]  # no markup in what a guest is called
            if row["errors"]:
                texts[_ERRORS].stylize("bold red")
            table.add_row(
                *(texts[each] for each in kept), style=Style(dim=True) if not row["alive"] else None
            )
        width = sum(max(map(len, column)) + _GAP for column in zip(*cells))
        console = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return [line.rstrip() for line in captured.get().splitlines()]

    return draw
