"""What a check of a cover says: a report where it is exact, else an error that names the first wrong pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ..errors import CqsaError
from ..masks import Mask
from ..ranges import Range


class CoverError(CqsaError):
    """A cover that breaks a promise; ``pair`` is the first (query row, key) that is not held exactly once, if any."""

    def __init__(self, problem: str, pair: tuple[int, int] | None = None) -> None:
        self.problem, self.pair = problem, pair
        super().__init__(problem, pair)

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True, slots=True)
class CoverReport:
    """A cover that was found exact.

    ``visible_pairs`` is what the mask shows in the checked rows; ``counted_pairs`` were met in the steps of the
    ``counted_tasks`` tasks that were run through, of ``tasks``. Counting all tasks ends with the two numbers equal;
    checking residues runs through a few tasks only.
    """

    cover: str
    tasks: int
    counted_tasks: int
    visible_pairs: int
    counted_pairs: int


def raise_pair(mask: Mask, queries: Range, keys: Range, times: int) -> NoReturn:
    """CoverError for the first visible pair of a rectangle that holds one and that was covered ``times`` times."""
    row = next(r for r in range(queries.start, queries.stop) if mask.live(Range(r, r + 1), keys))
    key = (mask.keys_of(row, keys.stop) & keys).start
    problem = f"query {row} and key {key} meet {times} times, expected once (rows {queries}, keys {keys})"
    raise CoverError(problem, (row, key))
