"""Proof that a cover holds every visible (query, key) pair exactly once, counted through its public interface.

The test is signed, so that a pair held twice can never hide one that is missing. Give every key border t a fixed
64-bit number h(t), and let a query range add h(stop) - h(start) for each key range that it meets. If those ranges
touch end to end, all inner borders cancel and h(last) - h(first) remains; a gap or an overlap leaves other terms,
which sum to the same number with probability about 2^-64. The visible pairs are counted besides. Whatever does not
add up is swept exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ..ranges import Range
from .base import Cover, Step, Task
from .cqs import CqsCover
from .report import CoverError, CoverReport, raise_pair
from .residues import check_residues

# More CQS chunks than this and their c^2 pairs (1 to 2 microseconds each) are no longer counted one by one.
COUNTED_CHUNKS = 5000


def check_cover(cover: Cover, rows: Range | None = None) -> CoverReport:
    """Prove that ``cover`` is exact, or raise CoverError at the first promise that it breaks.

    Checked: each visible pair is in exactly one step; ``finished_by`` hands out every query row once and no later
    step uses it; a task's ``query_ranges`` and ``key_ranges`` are those of its steps; no step lists a key range of
    which it sees nothing.

    ``rows`` limits the counting to the query ranges that overlap it; the steps of all tasks are still run through. Time
    O(all chunk pairs), memory O(chunks). A ``CqsCover`` of more than ``COUNTED_CHUNKS`` chunks (and no ``rows``) is
    checked by residues instead, in O(chunks) time.

    >>> from cqsa_arrays.masks import Causal
    >>> from cqsa_arrays.ranges import Cut
    >>> check_cover(CqsCover(Cut(100, 7, 4), Cut(100, 7, 4), Causal()))
    CoverReport(cover='cqs', tasks=7, counted_tasks=7, visible_pairs=5050, counted_pairs=5050)
    """
    finished = _finishing_tasks(cover)
    if rows is None and isinstance(cover, CqsCover) and cover.task_count > COUNTED_CHUNKS:
        return check_residues(cover)
    rows = Range(0, cover.queries.tokens) if rows is None else rows
    tallies = {queries: _Tally() for queries in sorted(finished) if len(queries & rows)}
    noise = _Noise()
    for task in _tasks(cover):
        for step in _promised_steps(task):
            if finished.get(step.queries, -1) < task.index:
                raise CoverError(f"task {task.index} uses rows {step.queries} that are finished before or never")
            if step.queries in tallies:
                tallies[step.queries].add(step, cover, noise)
    return _report(cover, tallies, noise)


@dataclass(slots=True)
class _Tally:
    """What one query range has met so far."""

    pairs: int = 0
    balance: int = 0
    first: int = 1 << 63
    last: int = 0

    def add(self, step: Step, cover: Cover, noise: _Noise) -> None:
        for keys in step.keys:
            pairs = cover.mask.pairs(step.queries, keys)
            if pairs == 0:
                raise CoverError(f"rows {step.queries} see none of the keys {keys} that a step lists")
            self.pairs += pairs
            self.balance += noise[keys.stop] - noise[keys.start]
            self.first, self.last = min(self.first, keys.start), max(self.last, keys.stop)


class _Noise(dict[int, int]):
    """A fixed number of 64 well mixed bits for each border (the finaliser of splitmix64)."""

    def __missing__(self, border: int) -> int:
        bits = (border + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % (1 << 64)
        self[border] = bits ^ bits >> 31
        return self[border]


def _finishing_tasks(cover: Cover) -> dict[Range, int]:
    """The task after which each query range is complete; the ranges must share out the rows exactly."""
    finished = sorted((queries, index) for index in range(cover.task_count) for queries in cover.finished_by(index))
    end = Range(cover.queries.tokens, cover.queries.tokens)
    for before, after in pairwise([Range(0, 0), *(queries for queries, _ in finished), end]):
        if before.stop != after.start:
            raise CoverError(f"finished_by: the rows from {before} to {after} do not come exactly once")
    return dict(finished)


def _tasks(cover: Cover) -> Iterator[Task]:
    for index in range(cover.task_count):
        task = cover.task(index)
        if task.index != index:
            raise CoverError(f"task {index} calls itself {task.index}")
        yield task


def _promised_steps(task: Task) -> Iterator[Step]:
    """The steps of a task, which must use exactly the ranges that the task says it touches."""
    queries: set[Range] = set()
    keys: set[Range] = set()
    for step in task.steps():
        queries.add(step.queries)
        keys.update(step.keys)
        yield step
    for promised, used in ((task.query_ranges(), queries), (task.key_ranges(), keys)):
        if sorted(promised) != sorted(used):
            raise CoverError(f"task {task.index} names {len(promised)} ranges, its steps use {len(used)} or others")


def _report(cover: Cover, tallies: dict[Range, _Tally], noise: _Noise) -> CoverReport:
    visible = 0
    for queries, tally in tallies.items():
        pairs = cover.mask.pairs(queries, Range(0, cover.keys.tokens))
        seamless = tally.pairs == 0 or tally.balance == noise[tally.last] - noise[tally.first]
        if tally.pairs != pairs or not seamless:
            _sweep(cover, queries)
        visible += pairs
    counted = sum(tally.pairs for tally in tallies.values())
    if counted != visible:
        raise CoverError(f"the mask contradicts itself: {visible} pairs over all keys, {counted} over their parts")
    return CoverReport(cover.name, cover.task_count, cover.task_count, visible, counted)


def _sweep(cover: Cover, queries: Range) -> None:
    """Count exactly how often each key meets ``queries``: CoverError at the first visible one that does not once.

    Passes where the key ranges leave gaps or overlap only where no row sees a key.
    """
    change = Counter({0: 0, cover.keys.tokens: 0})
    for task in _tasks(cover):
        for step in task.steps():
            for keys in step.keys if step.queries == queries else ():
                change[keys.start] += 1
                change[keys.stop] -= 1
    times = 0
    for start, stop in pairwise(sorted(change)):
        times += change[start]
        if times != 1 and cover.mask.live(queries, Range(start, stop)):
            raise_pair(cover.mask, queries, Range(start, stop), times)
