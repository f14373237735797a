"""What every kernel family takes and does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..block_statistics import BlockStatistics
from ..ranges import Range


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """Keys (batch, heads, tokens, D) and values (batch, heads, tokens, Dv), the first token being token ``start``."""

    start: int
    keys: Any
    values: Any


def in_token_order(blocks: Sequence[KeyBlock]) -> list[KeyBlock]:
    """``blocks`` as every kernel takes them, in the order of their tokens.

    A kernel leaves out keys that none of the rows around a row sees. Only where these are the last ones, the spans in
    which that row sums up are the same whichever rows are around it: a part of a step may begin anywhere.
    """
    return sorted(blocks, key=lambda block: block.start)


class Kernel(Protocol):
    """Block statistics of queries against key blocks, merged into a state."""

    def accumulate(
        self,
        queries: Any,
        query_start: int,
        blocks: Sequence[KeyBlock],
        state: BlockStatistics,
        *,
        diagonal: int,
        scale: float,
        done: Callable[[Range], None],
    ) -> None:
        """Update ``state`` (acc (batch, heads, rows, Dv), m and l (batch, heads, rows)) in place.

        ``queries`` (batch, heads, rows, D) start at token ``query_start``; row r sees the keys ``j <= r + diagonal`` of
        the blocks; scores are ``scale * q . k``. All arrays have the state's dtype and a contiguous last axis. What
        ``acc`` holds for a row that saw no key yet does not matter. ``done`` is told of each part of the rows that one
        head has finished, from any thread.
        """

    def close(self) -> None:
        """Release threads and scratch."""
