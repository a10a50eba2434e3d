"""Tables, figures and progress for people: rich tables on a terminal where rich is installed, else plain
text, so that a pipe gets neither colours nor boxes."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class UsageError(ValueError):
    """A command that cannot be carried out as it was given; the message says what was expected."""


@dataclass
class Table:
    """Rows of text under a title. ``left`` columns from the left are words, the others figures."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1


def size(count: int) -> str:
    """Bytes for people, in powers of 1000: "1.04 GB"."""
    value, unit = float(count), 0
    while value >= 999.95 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.{2 if value < 99.95 else 1}f} {UNITS[unit]}"


def count(value: float) -> str:
    """Numbers of parameters for people: "7.00 B"."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


def show(parts: Iterable[Table | str]) -> None:
    """Print paragraphs and tables to stdout."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _show_rich(parts)
        return
    for number, part in enumerate(parts):
        text = part if isinstance(part, str) else "\n".join(_plain(part))
        print(("\n" if number else "") + text)


def _plain(table: Table) -> Iterator[str]:
    rows = [list(table.columns), *(list(row) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if table.title:
        yield table.title
    for row in rows:
        cells = [
            cell.ljust(width) if i < table.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _show_rich(parts: Iterable[Table | str]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.print(Text(part))
            continue
        table = RichTable(title=part.title or None, title_justify="left")
        for i, name in enumerate(part.columns):
            table.add_column(Text(name), justify="left" if i < part.left else "right", overflow="fold")
        for row in part.rows:
            table.add_row(*map(Text, row))
        console.print(table)


class Bar:
    """A progress bar on stderr, where that is a terminal. A context; ``to(done, total)`` moves it."""

    def __init__(self, label: str) -> None:
        self.label, self.shown, self.live = label, -1, sys.stderr.isatty()

    def to(self, done: int, total: int) -> None:
        percent = 100 * min(done, total) // max(total, 1)
        if self.live and percent != self.shown:
            width = max(10, min(40, shutil.get_terminal_size().columns - len(self.label) - 10))
            print(
                f"\r{self.label} [{'#' * (width * percent // 100):<{width}}] {percent:3}%",
                end="",
                file=sys.stderr,
                flush=True,
            )
            self.shown = percent

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown >= 0:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """``items``, with a bar."""
    with Bar(label) as bar:
        for done, item in enumerate(items):
            bar.to(done, len(items))
            yield item
