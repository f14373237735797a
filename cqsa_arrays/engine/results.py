"""What becomes of finished rows: normalised output in a sink, or the statistics themselves."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..planner import Group
from ..ranges import Range
from ..statistics import BlockStatistics
from ..storage import Sink


class Results(Protocol):
    """Takes every row of every head once, when its last key has been seen."""

    def take(self, group: Group, rows: Range, state: BlockStatistics) -> None:
        """Keep what is wanted of ``state``, (batch, heads, rows)."""


class OutputResults:
    """Writes ``acc / l`` and the log-sum-exp, divided piece by piece of at most ``piece_rows`` rows of one head."""

    def __init__(self, sink: Sink, piece_rows: int) -> None:
        self._sink, self._piece_rows = sink, piece_rows

    def take(self, group: Group, rows: Range, state: BlockStatistics) -> None:
        for b, batch in enumerate(group.batch.split(1)):
            for h, heads in enumerate(group.heads.split(1)):
                for piece in Range(0, len(rows)).split(self._piece_rows):
                    part = (slice(b, b + 1), slice(h, h + 1), piece.slice)
                    finished = BlockStatistics(state.acc[part], state.m[part], state.l[part])
                    tokens = Range(rows.start + piece.start, rows.start + piece.stop)
                    self._sink.write_out(batch, heads, tokens, finished.output())
                    self._sink.write_lse(batch, heads, tokens, finished.lse())


class StatisticsResults:
    """Keeps the states of all rows: acc (B, H, Nq, Dv), m and l (B, H, Nq)."""

    def __init__(self, shape: tuple[int, int, int], value_dim: int, dtype: str) -> None:
        self.statistics = BlockStatistics.empty(shape, value_dim, np.dtype(dtype))

    def take(self, group: Group, rows: Range, state: BlockStatistics) -> None:
        part = (group.batch.slice, group.heads.slice, rows.slice)
        self.statistics.acc[part], self.statistics.m[part], self.statistics.l[part] = state.acc, state.m, state.l
