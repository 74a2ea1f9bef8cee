"""The current activity and its progress, shown live in a terminal, see `logs.show`."""

import collections
import contextlib
import logging
import time
from collections.abc import Collection, Iterator
from typing import Protocol, TypeVar

from mtl_sparse.runtime import text

LOG = logging.getLogger(f"{__name__}.lines")  # lines that a terminal leaves out: it shows the phases
_Item = TypeVar("_Item")

_RATE_SECONDS, _RATE_UPDATES = 30, 10  # the rate is a mean over at least so long, or so many updates


class Phase:
    """Something that takes time.

    Attributes:
      name: what is done: "evaluating the test split".
      total: units of the whole work, 0 if unknown.
      unit: name of a unit: "step".
      done: units that are done.
      rows: texts below it, by name; empty ones are left out.
      start: time when it began, by `time.monotonic`.
    """

    def __init__(self, name: str, total: int = 0, unit: str = "") -> None:
        """Begin the phase; for the arguments, see the attributes."""
        self.name, self.total, self.unit = name, total, unit
        self.done, self.start = 0, time.monotonic()
        self.rows: dict[str, str] = {}
        self._eta: text.Eta | None = None
        self._updates: collections.deque[tuple[float, int]] = collections.deque()

    def update(self, done: int) -> None:
        """Set the units that are done. The rate counts from the first call on: the first step compiles."""
        now = time.monotonic()
        if self._eta is None:
            self._eta = text.Eta(self.total, done)
        self._updates.append((now, done))
        while len(self._updates) > _RATE_UPDATES + 1 and now - self._updates[1][0] > _RATE_SECONDS:
            self._updates.popleft()
        self.done = done

    def set_row(self, name: str, value: str) -> None:
        """Set the text of a row."""
        self.rows = {**self.rows, name: value}  # another thread may be drawing the old ones

    @property
    def rate(self) -> str:
        """Text such as "2.3 steps/s" or "4.1 s a step", "" before the second update."""
        updates = tuple(self._updates)
        if not self.unit or len(updates) < 2 or updates[-1][1] == updates[0][1]:
            return ""
        seconds = (updates[-1][0] - updates[0][0]) / (updates[-1][1] - updates[0][1])
        return f"{1 / max(seconds, 1e-9):.1f} {self.unit}s/s" if seconds < 1 else f"{seconds:.1f} s a {self.unit}"

    @property
    def numbers(self) -> str:
        """Text such as "374/550 steps, 2.3 steps/s, 1 min left"."""
        left = f"{self._eta.left(self.done)} left" if self._eta and self.rate else ""
        done = f"{self.done}/{self.total}{f' {self.unit}s' if self.unit else ''}"
        return ", ".join(filter(None, (done, self.rate, left)))

    def log(self) -> None:
        """Log the progress, for files and where there is no terminal."""
        LOG.info("%s", self.numbers)


class Display(Protocol):
    """What shows the phases: `terminal.Terminal`."""

    def begin(self, shown: Phase) -> None:
        """Show a phase below those that are shown."""

    def end(self, shown: Phase) -> None:
        """Remove a phase."""


_displays: list[Display] = []  # one, or none where the output is no terminal


def set_display(display: Display | None) -> None:
    """Set the display of the phases that begin from now on; None shows none."""
    _displays[:] = [display] if display else []


@contextlib.contextmanager
def phase(name: str, total: int = 0, unit: str = "") -> Iterator[Phase]:
    """Show in a terminal what the block does while it runs; nothing is shown elsewhere.

    Args:
      name: what the block does: "evaluating the test split".
      total: units of the whole work, if they are known; the block then calls `Phase.update`.
      unit: name of a unit, for the rate: "step".

    Yields:
      The phase.
    """
    shown, displays = Phase(name, total, unit), tuple(_displays)
    for display in displays:
        display.begin(shown)
    try:
        yield shown
    finally:
        for display in displays:
            display.end(shown)


def track(items: Collection[_Item], name: str) -> Iterator[_Item]:
    """Yield the items, and show in a terminal how many are done.

    Args:
      items: items to iterate over.
      name: what is done with them: "rendering rooms".
    """
    with phase(name, len(items)) as shown:
        for done, item in enumerate(items, 1):
            yield item
            shown.update(done)
