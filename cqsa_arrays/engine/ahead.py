"""Reading ahead: blocks of coming steps go into the page cache while this one computes."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Protocol

from ..cover import Step
from ..planner import Group
from ..ranges import Range
from ..workers import Pool
from .schedule import Work

# Steps may be so short that many of them have few bytes.
MOST_STEPS = 256


class Blocks(Protocol):
    """The blocks of one input; see ``Pages`` and ``cuda.pages.DevicePages``."""

    def size_bytes(self, group: Group, tokens: Range) -> int:
        """Bytes of a block where it is read."""

    def holds(self, group: Group, tokens: Range) -> bool:
        """Whether a block is where it is needed."""

    def prefetch(self, group: Group, tokens: Range) -> Iterator[None]:
        """Have a block read into the page cache, some at each turn."""


class Prefetching(Protocol):
    """Where blocks are read ahead; see ``resident.Operands``."""

    def of(self, step: Step) -> Iterable[tuple[Blocks, Range]]:
        """Every block of ``step``, with the input whose it is."""


Block = tuple[Blocks, Group, Range]


class ReadAhead:
    """Iterates over ``works``, each with the one that comes next, and asks for blocks of coming steps.

    A request is for the next step and as many after it as have ``distance_bytes``; another thread has them read, in
    the order of the steps. What is among the last ``distance_bytes`` that were asked for is taken to be in the page
    cache. A request is never waited for: while one is under way, nothing more is asked for. An error of reading ahead
    is raised by the next request. Where ``distance_bytes`` is None there is nothing to read ahead.
    """

    def __init__(self, works: Iterator[Work], operands: Prefetching, distance_bytes: int | None) -> None:
        self._works, self._operands, self._distance_bytes = works, operands, distance_bytes
        self._coming: deque[Work] = deque()
        self._asked: deque[int] = deque()  # bytes of the first of those that come, which were asked for
        self._asked_bytes = 0
        self._lately: OrderedDict[Block, int] = OrderedDict()  # asked for: bytes
        self._lately_bytes = 0
        self._pool = Pool(1, "ahead")
        self._pending: Future[None] | None = None
        self._closed = False

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
        wanted: list[Block] = []
        while not self._asked or (self._asked_bytes < self._distance_bytes and len(self._asked) < MOST_STEPS):
            if not self._is_there(len(self._asked)):
                break
            new = self._new_blocks(self._coming[len(self._asked)])
            self._asked.append(sum(new.values()))
            self._asked_bytes += self._asked[-1]
            wanted += new
        if wanted:
            self._pending = self._pool.submit(self._prefetch, wanted)

    def _new_blocks(self, work: Work) -> dict[Block, int]:
        """The blocks that ``work`` begins with and that are not here, nor asked for lately, with their bytes."""
        if self._distance_bytes is None or work.step is None or not work.begins_step:
            return {}
        found = {}
        for blocks, tokens in self._operands.of(work.step):
            block = (blocks, work.group, tokens)
            if blocks.holds(work.group, tokens):
                continue
            if block in self._lately:
                self._lately.move_to_end(block)
            else:
                found[block] = self._lately[block] = blocks.size_bytes(work.group, tokens)
                self._lately_bytes += found[block]
        while self._lately_bytes > self._distance_bytes:
            self._lately_bytes -= self._lately.popitem(last=False)[1]
        return found

    def _prefetch(self, wanted: list[Block]) -> None:
        for blocks, group, tokens in wanted:
            for _ in blocks.prefetch(group, tokens):
                if self._closed:
                    return

    def _is_there(self, index: int) -> bool:
        """Whether so many come after the current one; the schedule is made as far as that."""
        while len(self._coming) <= index:
            work = next(self._works, None)
            if work is None:
                return False
            self._coming.append(work)
        return True

    def close(self) -> None:
        """Stop after what is being read at this turn."""
        self._closed = True
        self._pool.close(cancel=True)
