"""How long the parts of a step are: between two of them a run can be saved and stopped, so that each takes little time.

What the run itself has measured decides, for a machine may be slower than the plan's rates say, or busy with something
else. The cut of a step into parts changes no bit of any row, so that it need not be the same twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from ..planner import DEVICE_PART_S, HOST_PART_S, Plan
from .schedule import Work

# Until something is measured parts take this share of their time by the plan's rates. A GPU that waits for the next
# launch loses more, and slow ones are rare. A call that is no job cannot be stopped between parts (an interruption ends
# it within one), and threads wait for each other at the end of each: its first one is as long as any.
HOST_FIRST, DEVICE_FIRST = 1 / 8, 1 / 2
# Of a GPU: what is under way before the last part should be done within this time, for all of it must be waited for.
MOST_AHEAD_S = 0.1


class Pace:
    """Measures how fast visible (query, key) pairs are computed, and gives the rows of the next part.

    Only the time in which something is under way counts: not that of reading blocks or of saving. By any thread.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.perf_counter) -> None:
        self._mask, self._most_rows = plan.problem.mask, plan.part_rows
        self._unit = min(plan.chosen.part_unit, plan.part_rows)
        self._part_s, first = (HOST_PART_S, HOST_FIRST) if plan.device == "cpu" else (DEVICE_PART_S, DEVICE_FIRST)
        if plan.device == "cpu" and plan.durability is None:
            first = 1.0
        row_s = plan.chosen.part_s / plan.chosen.part_rows
        self._first_rows = int(first * self._part_s / row_s) if row_s else self._most_rows
        self._clock, self._lock = clock, threading.Lock()
        self._under_way = self._done = self._last_part = 0
        self._busy_s = self._last = 0.0
        self._rate: float | None = None

    def begun(self, pairs: int) -> None:
        """``pairs`` are under way from now on."""
        with self._lock:
            self._count_time()
            self._under_way += pairs
            self._last_part = pairs

    def done(self, pairs: int) -> None:
        """So many of them are done."""
        with self._lock:
            self._count_time()
            self._under_way -= pairs
            self._done += pairs

    def _count_time(self) -> None:
        now = self._clock()
        if self._under_way:
            self._busy_s += now - self._last
        self._last = now

    @property
    def is_ahead(self) -> bool:
        """Whether a part should be waited for before another is put under way."""
        return self._rate is not None and self._under_way - self._last_part > self._rate * MOST_AHEAD_S

    def rows(self, work: Work) -> int:
        """How many rows of ``work``, which is next, its first part has."""
        with self._lock:
            if self._done and self._busy_s > 0:
                self._rate, self._done, self._busy_s = self._done / self._busy_s, 0, 0.0
            rate = self._rate
        rows = wanted = min(len(work.rows), self._most_rows)
        if rate is None:
            wanted = self._first_rows
        elif pairs := work.pairs(self._mask, rows):
            wanted = int(rows * rate * self._part_s / pairs)
        return rows if wanted >= rows else max(self._unit, wanted // self._unit * self._unit)


def parts(
    works: Iterable[tuple[Work, Work | None]], rows_of: Callable[[Work], int]
) -> Iterator[tuple[Work, Work | None]]:
    """Every work in parts, each cut when it is asked for; with the last of them comes what follows the whole."""
    for whole, upcoming in works:
        rest: Work | None = whole
        while rest is not None:
            part, rest = rest.cut(rows_of(rest)) if rest.step is not None else (rest, None)
            yield part, upcoming if rest is None else None
