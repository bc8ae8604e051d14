"""What a command prints: with rich on a terminal, as plain lines elsewhere (a log file, a device without rich)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN_SECONDS = 10.0  # between two lines about the same epoch in a log


class Progress:
    """How far a loop has come; this one prints a line now and then."""

    def __init__(self, console: Console, label: str, total: int, done: int = 0) -> None:
        self._console, self._label, self._total = console, label, total
        self._done, self._printed = done, time.monotonic()

    def advance(self, count: int, note: str) -> None:
        """``count`` more are done; ``note`` says how it goes (loss, time per step)."""
        self._done += count
        if time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._console.line(f"{self._label}  {self._done}/{self._total}  {note}")


class _Bar(Progress):
    """The same as a bar that redraws itself."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, count: int, note: str) -> None:
        self._bar.update(self._task, advance=count, note=note)


class Screen:
    """How a search stands; this one prints the title now and then."""

    def __init__(self, console: Console) -> None:
        self._console, self._printed = console, time.monotonic()

    def show(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The present state."""
        if time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._console.line(title)


class _LiveScreen(Screen):
    """The same as a table that stays in its place."""

    def __init__(self, console: Console, live: Any) -> None:
        super().__init__(console)
        self._live = live

    def show(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._live.update(rich_table(columns, rows, title))


class Console:
    """Prints for people to ``stream``: standard output, or standard error where standard output carries JSON."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stdout
        self.rich = _rich_console(self.stream) if self.stream.isatty() else None

    def line(self, text: str = "", style: str = "") -> None:
        """One line; ``style`` (rich's: "bold", "red") is seen on a terminal only."""
        if self.rich is None:
            print(text, file=self.stream, flush=True)
        else:
            self.rich.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table between empty lines. Columns whose name starts with ">" are aligned to the right."""
        if self.rich is None:
            self._plain_table(columns, rows)
        else:
            self.rich.print(rich_table(columns, rows))

    def _plain_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        names = [column.lstrip(">") for column in columns]
        widths = [max(len(line[i]) for line in (names, *rows)) for i in range(len(names))]
        self.line()
        for line in (names, *rows):
            cells = [
                cell.rjust(width) if column.startswith(">") else cell.ljust(width)
                for cell, width, column in zip(line, widths, columns, strict=True)
            ]
            self.line("  ".join(cells).rstrip())
        self.line()

    @contextmanager
    def progress(self, label: str, total: int, done: int = 0) -> Iterator[Progress]:
        """A bar over ``total`` things, of which ``done`` are done; it disappears when the loop ends."""
        if self.rich is None:
            yield Progress(self, label, total, done)
            return
        from rich import progress

        columns: tuple[Any, ...] = (
            "{task.description}",
            progress.BarColumn(30),
            progress.MofNCompleteColumn(),
            "{task.fields[note]}",
        )
        columns += (progress.TimeRemainingColumn(),)
        # Few redraws: they take time from the steps that are being measured.
        bar = progress.Progress(*columns, console=self.rich, transient=True, refresh_per_second=4)
        with bar:
            yield _Bar(bar, bar.add_task(label, total=total, completed=done, note=""))

    @contextmanager
    def screen(self) -> Iterator[Screen]:
        """A table that is drawn anew in its place; it disappears at the end. Elsewhere than on a terminal, its title now and then."""
        if self.rich is None:
            yield Screen(self)
            return
        from rich.live import Live

        with Live(console=self.rich, transient=True, refresh_per_second=4) as live:
            yield _LiveScreen(self, live)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Say what is being done, and how long it took."""
        start = time.perf_counter()
        if self.rich is None:
            self.line(f"{text} ...")
            yield
        else:
            with self.rich.status(text):
                yield
        self.line(f"{text}: {time.perf_counter() - start:.1f} s", style="dim")


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Any:
    """rich's table of these cells."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_verdict_style(cell)) for cell in row))
    return table


def _verdict_style(cell: str) -> str:
    return {"ok": "green", "yes": "green", "departs": "bold red"}.get(cell, "")


def _rich_console(stream: TextIO) -> Any:
    """rich's console, or None on a device without it."""
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return None
    return RichConsole(file=stream)


# How numbers are written.


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def shortened(text: str, width: int) -> str:
    """``text`` in ``width`` characters, without its middle where it is longer."""
    if len(text) <= width:
        return text
    end = (width - 2) // 2
    return f"{text[: width - 2 - end]}..{text[len(text) - end :]}"


def number(value: float) -> str:
    """A loss: four digits after the point, or an exponent."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.3e}"


def size(count: float) -> str:
    """Bytes with a unit: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def flops(count: float) -> str:
    return f"{count / 1e6:,.2f} MFLOP"


def shape(sizes: Sequence[int]) -> str:
    """(8, 3, 96, 96) -> "8x3x96x96"."""
    return "x".join(map(str, sizes)) or "scalar"
