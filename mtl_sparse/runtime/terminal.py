"""Log lines on a terminal, and below them a live display of what runs now."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mtl_sparse.runtime import progress, text

_MOST_COLUMNS = 110
_REFRESHES = 4  # a second


class Terminal(logging.Handler):
    """Handler of log lines that also shows the phases of `progress`, one below the other."""

    def __init__(self, stream: TextIO) -> None:
        """Write to a stream that is a terminal."""
        super().__init__()
        self.console = Console(file=stream, force_terminal=True, highlight=False)
        # Not every encoding has the braille dots of the first spinner.
        self._spinner = Spinner("dots" if self.console.encoding.startswith("utf") else "line", style="cyan")
        self._phases: tuple[progress.Phase, ...] = ()
        self._live: Live | None = None
        self._is_closed = False  # the terminal: its window was closed, and this process outlives it
        self._changing = threading.RLock()

    def begin(self, shown: progress.Phase) -> None:
        """Show a phase below those that are shown."""
        with self._changing:
            self._phases = (*self._phases, shown)
            self._draw(self._refresh)

    def end(self, shown: progress.Phase) -> None:
        """Remove a phase; with the last one the display disappears, and leaves the log lines."""
        with self._changing:
            self._draw(self._refresh)  # its last state
            self._phases = tuple(phase for phase in self._phases if phase is not shown)
            if self._live and not self._phases:
                self._draw(self._live.stop)
                self._live = None

    def _refresh(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self.console,
                get_renderable=self._drawn,
                refresh_per_second=_REFRESHES,
                transient=True,
                redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # a file gets its output as it is
            )
            self._live.start()
        self._live.refresh()

    def _draw(self, draw: Callable[[], None]) -> None:
        """Call a function that writes to the terminal; a terminal that is closed gets no more and ends no run."""
        if self._is_closed:
            return
        try:
            draw()
        except OSError:
            self._is_closed = True
            if self._live:
                with contextlib.suppress(Exception):  # it has failed already, and now restores sys.stderr
                    self._live.stop()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log line above the display."""
        if record.name == progress.LOG.name:
            return
        try:
            line = _line(record, self.format(record))
            self._draw(lambda: self.console.print(line))
        except Exception:  # as the handlers of the standard library do
            self.handleError(record)

    def _drawn(self) -> RenderableType:
        return Group(*(row for phase in self._phases for row in self._rows(phase)))

    def _rows(self, phase: progress.Phase) -> Iterator[RenderableType]:
        """Yield the line of a phase, and the rows below it."""
        width = min(self.console.width, _MOST_COLUMNS)
        head = Table.grid(padding=(0, 1), expand=True)
        head.width = width
        head.add_column(width=1)
        head.add_column(no_wrap=True, overflow="ellipsis")
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, overflow="ellipsis", justify="right")
        name = Text(phase.name, "bold")
        if phase.total:
            bar = ProgressBar(phase.total, phase.done, complete_style="cyan", finished_style="green")
            head.add_row(self._spinner, name, bar, Text(phase.numbers))
        else:
            seconds = time.monotonic() - phase.start
            head.add_row(self._spinner, name, Text(text.duration(seconds) if seconds >= 1 else "", "dim"), "")
        yield head
        if any(phase.rows.values()):
            rows = Table.grid(padding=(0, 2))
            rows.width = width
            rows.add_column(style="dim", no_wrap=True)
            rows.add_column(overflow="fold")
            for label, value in phase.rows.items():
                if value:
                    rows.add_row(f"  {label}", Text(value))
            yield rows


def _line(record: logging.LogRecord, message: str) -> RenderableType:
    """Return a log line: the time, and the message beside it, in a color if it is a warning or an error."""
    level, style = "", ""
    if record.levelno > logging.INFO:
        level, style = f"{record.levelname}: ", "bold red" if record.levelno >= logging.ERROR else "bold yellow"
    line = Table.grid(padding=(0, 1))
    line.add_column(style="dim", no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(time.strftime("%H:%M:%S", time.localtime(record.created)), Text(f"{level}{message}", style))
    return line
