"""Streams on which launches run side by side, so that the first blocks of one run beside the last blocks of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle

import cupy

from ...planner import Group
from ...ranges import Range


@dataclass(slots=True)
class Lanes:
    """Streams that take the query ranges in turn; a range stays on its lane until it is finished.

    So all work on one row's state is on one stream, in the order of the plan, and nothing else needs to order it.
    """

    streams: tuple[cupy.cuda.Stream, ...]
    _turn: Iterator[cupy.cuda.Stream] = field(init=False)
    _lane: dict[tuple[Group, Range], cupy.cuda.Stream] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._turn = cycle(self.streams)

    def of(self, group: Group, rows: Range) -> cupy.cuda.Stream:
        """The stream of ``rows``."""
        if (group, rows) not in self._lane:
            self._lane[group, rows] = next(self._turn)
        return self._lane[group, rows]

    def leave(self, group: Group, rows: Range) -> cupy.cuda.Stream:
        """The stream of ``rows``, which are finished."""
        lane = self.of(group, rows)
        del self._lane[group, rows]
        return lane

    def synchronize(self) -> None:
        """Wait for everything on them."""
        for stream in self.streams:
            stream.synchronize()
