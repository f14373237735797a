"""What every cover offers: independent tasks which together hold each visible (query, key) pair exactly once.

A cover speaks of token ranges, never of arrays or devices. Everything is computed from an index: nothing is listed, so
that a cover of a million tasks costs what one task costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ..errors import ArgumentError
from ..masks import Mask
from ..ranges import Cut, Range


@dataclass(frozen=True, slots=True)
class Step:
    """One query range and the key ranges that it must be attended to in this task.

    Every key range holds at least one key that a row of ``queries`` sees. Key ranges are whole, not clipped by the
    mask, so that equal ranges mean the same resident block.
    """

    queries: Range
    keys: tuple[Range, ...]


class Task(Protocol):
    """Work that needs no other task's result."""

    @property
    def index(self) -> int:
        """Its place in the order of the cover, from 0."""

    def steps(self) -> Iterator[Step]:
        """The steps, made one at a time; a query range that sees none of its keys has no step."""

    def query_ranges(self) -> tuple[Range, ...]:
        """The distinct query ranges of the steps, in the order of the steps."""

    def key_ranges(self) -> tuple[Range, ...]:
        """The distinct key ranges of the steps."""


class Cover(Protocol):
    """A partition of the visible (query, key) pairs into tasks 0 .. task_count - 1.

    Two query ranges that a cover hands out are the same or disjoint: a range is the unit of a partial state.
    """

    @property
    def name(self) -> str:
        """What plans and reports call this kind of cover."""

    @property
    def queries(self) -> Cut:
        """How the query rows are cut."""

    @property
    def keys(self) -> Cut:
        """How the key rows are cut."""

    @property
    def mask(self) -> Mask:
        """Which keys a row sees."""

    @property
    def task_count(self) -> int:
        """How many tasks there are; some may have no step."""

    @property
    def longest_query_range(self) -> int:
        """Upper bound on the tokens of a query range."""

    @property
    def longest_key_range(self) -> int:
        """Upper bound on the tokens of a key range."""

    def task(self, index: int) -> Task:
        """Task ``index``; IndexError where there is none."""

    def tasks(self) -> Iterator[Task]:
        """All tasks in order, made one at a time."""

    def finished_by(self, index: int) -> Iterator[Range]:
        """The query ranges that are complete once tasks 0 .. ``index`` have run, and were not one task earlier.

        Over all tasks every query row comes exactly once, also a row that sees no key.
        """


def check_cut(argument: str, cut: Cut) -> None:
    """Refuse a cut without a chunk or with tiles of less than one token."""
    if cut.tokens < 0 or cut.parts < 1 or cut.tile < 1:
        raise ArgumentError(argument, cut, "tokens >= 0, parts >= 1 and tile >= 1", "Cut the tokens into whole tiles.")


def check_index(index: int, task_count: int) -> None:
    """IndexError unless ``index`` names one of ``task_count`` tasks."""
    if not 0 <= index < task_count:
        raise IndexError(f"task {index} of a cover with {task_count} tasks")
