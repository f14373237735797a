"""What becomes of finished rows: normalised output in a sink, or the statistics themselves."""

from __future__ import annotations

from itertools import product
from typing import Any, Protocol

import numpy as np

from ..block_statistics import BlockStatistics
from ..planner import Group
from ..ranges import Range
from ..storage import Sink
from ..workers import Workers


class Results(Protocol):
    """Takes every row of every head once, when its last key has been seen.

    ``home`` is memory (B, H, Nq, Dv) of the result in which states may be accumulated until then, or None.
    """

    home: np.ndarray | None

    def take(self, group: Group, rows: Range, state: BlockStatistics, *, in_place: bool) -> None:
        """Keep what is wanted of ``state``, (batch, heads, rows); ``in_place``: its ``acc`` lies in ``home``."""

    def close(self) -> None:
        """Release threads."""


class OutputResults:
    """Writes ``acc / l`` and the log-sum-exp, in pieces of at most ``piece_rows`` rows of all heads, by ``threads``."""

    def __init__(self, sink: Sink, piece_rows: int, threads: int, home: np.ndarray | None) -> None:
        self.sink, self._piece_rows, self.home = sink, piece_rows, home
        self._workers = Workers(threads, "output")

    def take(self, group: Group, rows: Range, state: BlockStatistics, *, in_place: bool) -> None:
        batches, pieces = enumerate(group.batch.split(1)), Range(0, len(rows)).split(self._piece_rows)

        def write(item: tuple[tuple[int, Range], Range]) -> None:
            (b, batch), piece = item
            part = (slice(b, b + 1), slice(None), piece.slice)
            finished = BlockStatistics(state.acc[part], state.m[part], state.l[part])
            tokens = Range(rows.start + piece.start, rows.start + piece.stop)
            if in_place:
                finished.output(out=finished.acc)
            else:
                self.sink.write_out(batch, group.heads, tokens, finished.output())
            self.sink.write_lse(batch, group.heads, tokens, finished.lse())

        self._workers.run(product(batches, pieces), write)

    def close(self) -> None:
        self._workers.close()


class StatisticsResults:
    """Keeps the states of all rows: acc (B, H, Nq, Dv), m and l (B, H, Nq)."""

    def __init__(self, shape: tuple[int, int, int], value_dim: int, dtype: str, xp: Any = np) -> None:
        self.statistics = BlockStatistics.empty(shape, value_dim, np.dtype(dtype), xp)
        self.home: np.ndarray | None = self.statistics.acc

    def take(self, group: Group, rows: Range, state: BlockStatistics, *, in_place: bool) -> None:
        part = (group.batch.slice, group.heads.slice, rows.slice)
        self.statistics.acc[part], self.statistics.m[part], self.statistics.l[part] = state.acc, state.m, state.l
        self.statistics.acc[part][state.saw_no_key] = 0

    def close(self) -> None:
        """Nothing to do: ``statistics`` is the result."""
