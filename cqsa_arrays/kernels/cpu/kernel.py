"""The CPU kernel family: work items of one head and one group of query rows, run by threads that release the GIL.

A row's arithmetic depends on the key blocks alone and work items depend on shapes alone, so the result is the same for
any number of threads. Each ``CpuKernel`` owns its threads and scratch: concurrent use of several is safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from ...block_statistics import BlockStatistics
from ...buffers import allocate
from ...compiled import entry_point
from ...ranges import Range
from ...workers import Workers
from ..base import KeyBlock, in_token_order
from .attend import attend_group, signature
from .intrinsics import host_tile
from .tiles import SHARING_PANELS, group_panels

# Of a head, where nothing is known of the threads and the heads.
MANY_ITEMS = 1 << 20


def load(dtype: str) -> Callable[..., None]:
    """``attend_group`` for "float32" or "float64", compiled or loaded from disk; see ``compiled.entry_point``."""
    return entry_point(attend_group, signature(dtype), f"{dtype} kernel")


class CpuKernel:
    """``Kernel`` on NumPy arrays with ``threads`` threads; queries come in blocks of at most ``rows`` rows.

    ``least_items`` work items of a head are enough to keep the threads busy: few rows are cut into no more than these.
    """

    def __init__(
        self, dtype: str, *, rows: int, head_dim: int, value_dim: int, threads: int, least_items: int = MANY_ITEMS
    ) -> None:
        self._attend_group = load(dtype)
        self._tile = host_tile(dtype)
        self._shape = (head_dim, value_dim)
        self._most_rows, self._least_items = rows, least_items
        self._most_panels = group_panels(self._tile, rows, head_dim, value_dim)
        size_bytes = self._tile.scratch_bytes(rows, head_dim, value_dim)
        self._scratch = deque(allocate(size_bytes // self._tile.itemsize, dtype) for _ in range(threads))
        self._workers = Workers(threads, "kernel")

    def accumulate(
        self,
        queries: np.ndarray,
        query_start: int,
        blocks: Sequence[KeyBlock],
        state: BlockStatistics,
        *,
        diagonal: int,
        scale: float,
        done: Callable[[Range], None],
    ) -> None:
        """See ``Kernel.accumulate``."""
        batches, heads, rows, head_dim = queries.shape
        if rows > self._most_rows or (head_dim, state.acc.shape[3]) != self._shape:
            raise ValueError(f"queries {queries.shape} and acc {state.acc.shape} are not what this kernel was made for")
        blocks = in_token_order(blocks)
        sharing = min(SHARING_PANELS, self._most_panels, -(-rows // (self._tile.rows * self._least_items)))
        step = self._tile.rows * max(sharing, group_panels(self._tile, rows, *self._shape))
        # Last rows first: under a causal mask they see most keys, and long items at the end would leave threads idle.
        items = [
            (b, h, start) for start in reversed(range(0, rows, step)) for b in range(batches) for h in range(heads)
        ]

        def work(item: tuple[int, int, int]) -> None:
            b, h, start = item
            part = slice(start, start + step)
            scratch = self._scratch.popleft()
            try:
                self._attend_group(
                    queries[b, h, part], query_start + start, _pieces(blocks, b, h), diagonal, scale,
                    state.acc[b, h, part], state.m[b, h, part], state.l[b, h, part], scratch,
                )  # fmt: skip
            finally:
                self._scratch.append(scratch)
            done(Range(query_start + start, query_start + min(start + step, rows)))

        self._workers.run(items, work)

    def close(self) -> None:
        """Stop the threads and release the scratch."""
        self._workers.close()
        self._scratch.clear()


def _pieces(blocks: Sequence[KeyBlock], batch: int, head: int) -> np.ndarray:
    """The (address, stride, address, stride, tokens, first token) rows that ``attend_group`` takes."""
    rows = []
    for block in blocks:
        keys, values = block.keys[batch, head], block.values[batch, head]
        rows.append(
            (keys.ctypes.data, keys.strides[0], values.ctypes.data, values.strides[0], keys.shape[0], block.start)
        )
    return np.array(rows, np.int64).reshape(-1, 6)
