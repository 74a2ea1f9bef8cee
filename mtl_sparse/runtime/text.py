"""Wording that messages and logs share: near names, durations, time left."""

import difflib
import time
from collections.abc import Collection


def nearest(name: str, known: Collection[str], count: int = 3) -> list[str]:
    """Return the names of `known` that are spelled most like `name`, the closest first; [] if none is close."""
    return difflib.get_close_matches(name, known, n=count)


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it: "40 s", "12 min", "1.5 h"."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


class Eta:
    """Rate and time left of work in equal units.

    Args:
      total: units of the whole work.
      done: units that were done before this process began.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total, self._first, self._start = total, done, time.monotonic()

    def seconds_per_unit(self, done: int) -> float:
        """Return the mean seconds a unit took, NaN before the first one."""
        units = done - self._first
        return (time.monotonic() - self._start) / units if units else float("nan")

    def left(self, done: int) -> str:
        """Return the time left as text, when `done` of all units are done."""
        if done == self._first:
            return "an unknown time"
        return duration(self.seconds_per_unit(done) * (self._total - done))
