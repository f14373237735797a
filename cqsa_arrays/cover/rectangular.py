"""The rectangular cover: a query tile and its state stay, the keys stream past.

        key blocks ->
tile 0  [ 0 ][ 1 ][ 2 ]     task 0
tile 1  [ 0 ][ 1 ][ 2 ]     task 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..masks import Mask
from ..ranges import Cut, Range
from .base import Step, check_cut, check_index


@dataclass(frozen=True, slots=True)
class TileTask:
    """One query tile against every key block of which it sees a key, in ascending order: one a step, or all at once."""

    index: int
    queries: Range
    keys: Cut
    mask: Mask
    at_once: bool

    def steps(self) -> Iterator[Step]:
        if not self.at_once:
            return (Step(self.queries, (block,)) for block in self._live_blocks())
        blocks = self.key_ranges()
        return iter((Step(self.queries, blocks),) if blocks else ())

    def query_ranges(self) -> tuple[Range, ...]:
        return (self.queries,) if any(True for _ in self._live_blocks()) else ()

    def key_ranges(self) -> tuple[Range, ...]:
        return tuple(self._live_blocks())

    def _live_blocks(self) -> Iterator[Range]:
        blocks = (self.keys[i] for i in range(len(self.keys)))
        return (block for block in blocks if self.mask.live(self.queries, block))


@dataclass(frozen=True, slots=True)
class RectangularCover:
    """Task i is query tile i against all key blocks; the numbers of tiles and of blocks are free.

    ``at_once``: in one step, where all of them can be resident. Each tile of a causal mask then asks for the blocks of
    the one before it and few others, so that work begins with the first tokens. ``descending``: task 0 is the last
    tile.

    >>> from cqsa_arrays.masks import Causal
    >>> cover = RectangularCover(Cut(6, 3, 1), Cut(6, 2, 1), Causal())
    >>> [step.keys for step in cover.task(1).steps()]
    [(Range(start=0, stop=3),), (Range(start=3, stop=6),)]
    """

    queries: Cut
    keys: Cut
    mask: Mask
    at_once: bool = False
    descending: bool = False

    def __post_init__(self) -> None:
        check_cut("queries", self.queries)
        check_cut("keys", self.keys)

    @property
    def name(self) -> str:
        return "rectangular"

    @property
    def task_count(self) -> int:
        return len(self.queries)

    @property
    def longest_query_range(self) -> int:
        return self.queries.longest

    @property
    def longest_key_range(self) -> int:
        return self.keys.longest

    def task(self, index: int) -> TileTask:
        check_index(index, self.task_count)
        return TileTask(index, self._tile(index), self.keys, self.mask, self.at_once)

    def tasks(self) -> Iterator[TileTask]:
        return map(self.task, range(self.task_count))

    def finished_by(self, index: int) -> Iterator[Range]:
        check_index(index, self.task_count)
        tile = self._tile(index)
        return iter((tile,) if len(tile) else ())

    def _tile(self, index: int) -> Range:
        return self.queries[self.task_count - 1 - index if self.descending else index]
