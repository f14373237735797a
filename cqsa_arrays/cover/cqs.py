"""CQS Divide: task i holds the chunks {i + d mod c : d in D} of a difference set D (Bian and Akey, arXiv 2604.20819).

With q = 2, c = 7 and D = {0, 1, 3}, a row per task and * where a chunk is held:

    task 0  * * . * . . .       chunks 0 and 1 meet in task 0 only, both as (0, 1) and as (1, 0);
    task 1  . * * . * . .       chunks 0 and 2 meet in task 6 only, ...
    ...
    task 6  * . * . . . *       every two tasks share exactly one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..masks import Mask
from ..ranges import Cut, Range
from .base import Step, check_cut, check_index
from .difference import difference_set, set_size
from .lazy import lazy_attribute


def owned_pairs(marks: NDArray[np.int64], c: int) -> NDArray[np.bool_]:
    """``(l, l)``: whether a task pairs the query chunk at ``marks[x]`` with the key chunk at ``marks[y]``.

    Each residue modulo c is the difference marks[y] - marks[x] of exactly one owned pair, so that a task has c pairs
    and the c shifts of it hold all c^2. Residues r <= c/2 belong to their first pair, -r to the same pair swapped:
    both directions of two chunks meet in one task. (For even c, c/2 is its own opposite and its two directions are
    two tasks.) O(l^2) = O(c) time and memory.

    >>> owned_pairs(np.array([0, 1, 3]), 7).astype(int).tolist()    # of the diagonal only (0, 0)
    [[1, 1, 1], [1, 0, 1], [1, 1, 0]]
    """
    size = len(marks)
    differences = ((marks[None, :] - marks[:, None]) % c).ravel()
    first = np.full(c, size * size)
    np.minimum.at(first, differences, np.arange(size * size))
    x, y = np.divmod(first[: c // 2 + 1], size)
    opposite = slice(1, (c + 1) // 2)
    owned = np.zeros((size, size), dtype=bool)
    owned[x, y] = True
    owned[y[opposite], x[opposite]] = True
    return owned


@dataclass(frozen=True, slots=True, eq=False)
class QuorumTask:
    """The chunks of one quorum, each query chunk against the key chunks that it owns: c chunk pairs, less dead ones."""

    index: int
    queries: Sequence[Range]
    keys: Sequence[Range]
    owned: NDArray[np.bool_]
    mask: Mask

    def steps(self) -> Iterator[Step]:
        for queries, row in zip(self.queries, self.owned, strict=True):
            keys = tuple(key for key in compress(self.keys, row.tolist()) if self.mask.live(queries, key))
            if keys:
                yield Step(queries, keys)

    def query_ranges(self) -> tuple[Range, ...]:
        def touched(queries: Range, row: NDArray[np.bool_]) -> bool:
            return any(self.mask.live(queries, key) for key in compress(self.keys, row.tolist()))

        return tuple(queries for queries, row in zip(self.queries, self.owned, strict=True) if touched(queries, row))

    def key_ranges(self) -> tuple[Range, ...]:
        def touched(key: Range, column: NDArray[np.bool_]) -> bool:
            return any(self.mask.live(queries, key) for queries in compress(self.queries, column.tolist()))

        return tuple(key for key, column in zip(self.keys, self.owned.T, strict=True) if touched(key, column))


@dataclass(frozen=True)  # no slots: lazy attributes live in the instance's dictionary
class CqsCover:
    """c tasks over c query chunks and c key chunks, for every c >= 1; each task needs about l/c of the tokens.

    >>> from cqsa_arrays.masks import Causal
    >>> cover = CqsCover(Cut(14, 7, 1), Cut(14, 7, 1), Causal())
    >>> [(step.queries.start, [key.start for key in step.keys]) for step in cover.task(0).steps()]
    [(0, [0]), (2, [0]), (6, [0, 2])]
    """

    queries: Cut
    keys: Cut
    mask: Mask

    def __post_init__(self) -> None:
        check_cut("queries", self.queries)
        check_cut("keys", self.keys)
        if len(self.queries) != len(self.keys):
            expected = f"as many key chunks as query chunks ({len(self.queries)})"
            raise ArgumentError("keys", f"{len(self.keys)} chunks", expected, "Cut both into the same number of parts.")

    @property
    def name(self) -> str:
        return "cqs"

    @property
    def task_count(self) -> int:
        return len(self.queries)

    @property
    def quorum_size(self) -> int:
        """l: how many query chunks, and as many key chunks, a task holds."""
        return set_size(self.task_count)

    @property
    def longest_query_range(self) -> int:
        return self.queries.longest

    @property
    def longest_key_range(self) -> int:
        return self.keys.longest

    @lazy_attribute
    def marks(self) -> NDArray[np.int64]:
        """The difference set: task i holds the chunks i + marks modulo c."""
        return _frozen(difference_set(self.task_count))

    @lazy_attribute
    def owned(self) -> NDArray[np.bool_]:
        """``owned_pairs`` of the marks, the same for every task."""
        return _frozen(owned_pairs(self.marks, self.task_count))

    def task(self, index: int) -> QuorumTask:
        check_index(index, self.task_count)
        chunks = ((self.marks + index) % self.task_count).tolist()
        queries, keys = (tuple(cut[chunk] for chunk in chunks) for cut in (self.queries, self.keys))
        return QuorumTask(index, queries, keys, self.owned, self.mask)

    def tasks(self) -> Iterator[QuorumTask]:
        return map(self.task, range(self.task_count))

    def finished_by(self, index: int) -> Iterator[Range]:
        """Nothing before the last task, then every query chunk: a chunk's pairs are spread over all tasks."""
        check_index(index, self.task_count)
        if index < self.task_count - 1:
            return iter(())
        chunks = (self.queries[i] for i in range(self.task_count))
        return (chunk for chunk in chunks if len(chunk))


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array
