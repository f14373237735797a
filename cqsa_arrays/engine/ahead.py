"""Reading ahead: blocks of coming steps go into the page cache while this one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ..cover import Step
from ..planner import Group
from .schedule import Work

# Steps may be so short that many of them have few bytes.
MOST_STEPS = 256


class Prefetching(Protocol):
    """Where blocks are read ahead; see ``resident.Operands``."""

    def size_bytes(self, group: Group, step: Step) -> int:
        """Bytes of all blocks of ``step``."""

    def prefetch(self, group: Group, step: Step) -> None:
        """Ask for the blocks of ``step`` that are not resident."""


class ReadAhead:
    """Iterates over ``works``, each with the one that comes next, and asks for blocks of coming steps.

    A request is for the next step and as many after it as have ``distance_bytes``. It is never waited for: while one is
    under way, nothing more is asked for. An error of reading ahead is raised by the next request. Where
    ``distance_bytes`` is None there is nothing to read ahead.
    """

    def __init__(self, works: Iterator[Work], operands: Prefetching, distance_bytes: int | None) -> None:
        self._works, self._operands, self._distance_bytes = works, operands, distance_bytes
        self._coming: deque[Work] = deque()
        self._asked: deque[int] = deque()  # bytes of the first of those that come, which were asked for
        self._asked_bytes = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cqsa-ahead")
        self._pending: Future[None] | None = None

    def __iter__(self) -> Iterator[tuple[Work, Work | None]]:
        while self._is_there(0):
            work = self._coming.popleft()
            if self._asked:
                self._asked_bytes -= self._asked.popleft()
            yield work, self._coming[0] if self._is_there(0) else None

    def request(self) -> None:
        """Ask for what comes, as far as that is not asked for yet."""
        if self._distance_bytes is None:
            return
        if self._pending is not None and self._pending.done():
            self._pending.result()
            self._pending = None
        if self._pending is not None:
            return
        wanted = []
        while not self._asked or (self._asked_bytes < self._distance_bytes and len(self._asked) < MOST_STEPS):
            if not self._is_there(len(self._asked)):
                break
            work = self._coming[len(self._asked)]
            self._asked.append(0)
            if work.step is not None and work.begins_step:
                self._asked[-1] = self._operands.size_bytes(work.group, work.step)
            self._asked_bytes += self._asked[-1]
            wanted.append(work)
        if wanted:
            self._pending = self._pool.submit(self._prefetch, wanted)

    def _prefetch(self, works: list[Work]) -> None:
        for work in works:
            if work.step is not None and work.begins_step:
                self._operands.prefetch(work.group, work.step)

    def _is_there(self, index: int) -> bool:
        """Whether so many come after the current one; the schedule is made as far as that."""
        while len(self._coming) <= index:
            work = next(self._works, None)
            if work is None:
                return False
            self._coming.append(work)
        return True

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
