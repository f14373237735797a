"""The CPU kernel family: work items of one head and one group of query rows, run by threads that release the GIL.

A row's arithmetic depends on the key blocks alone and work items depend on shapes alone, so the result is the same for
any number of threads. Each ``CpuKernel`` owns its threads and scratch: concurrent use of several is safe.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba.core import event

from ...block_statistics import BlockStatistics
from ...buffers import allocate
from ...ranges import Range
from ...workers import Workers
from ..base import KeyBlock
from .attend import attend_group, signature
from .intrinsics import host_tile
from .tiles import group_panels

logger = logging.getLogger("cqsa_arrays")
# A kernel loads from the cache on disk well within this; only a compilation takes longer.
_PATIENCE_S = 0.7
# What LLVM takes to load a kernel and to compile one, and the stack for it: where it is refused memory it ends the
# process, so it is not begun without.
LOADING_BYTES, COMPILING_BYTES = 36 << 20, 68 << 20
COMPILER_STACK_BYTES = 8 << 20


def load(dtype: str) -> Callable[..., None]:
    """``attend_group`` for "float32" or "float64", compiled or loaded from Numba's cache on disk.

    The compiled function itself, past Numba's dispatcher: that would compile anew for every combination of strides.
    Another thread loads it: llvmlite calls back through ctypes meanwhile, where the exception of a signal, which comes
    to the main thread, would be lost and the job go on. Raises MemoryError where the system refuses what that takes.
    """
    wanted = signature(dtype)
    if wanted.args not in attend_group.overloads:
        allocate(LOADING_BYTES, np.uint8)
    text = "compiling the %s kernel for this processor (once; later runs load it from disk)"
    note = threading.Timer(_PATIENCE_S, logger.info, [text, dtype])
    note.daemon = True
    note.start()
    try:
        if wanted.args not in attend_group.overloads:
            with _deep_stacks(), ThreadPoolExecutor(1, thread_name_prefix="cqsa-load") as pool:
                pool.submit(_compile, wanted).result()
    finally:
        note.cancel()
    compiled: Callable[..., None] = attend_group.overloads[wanted.args].entry_point
    return compiled


def _compile(wanted: Any) -> None:
    with event.install_listener("numba:compile", _RoomToCompile()):
        attend_group.compile(wanted)


class _RoomToCompile(event.Listener):
    """Numba says that its cache on disk has no such kernel: the system is asked for room, which goes back at once."""

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"] is attend_group:
            allocate(COMPILING_BYTES, np.uint8)

    def on_end(self, event: Any) -> None:
        """Nothing to do."""


@contextmanager
def _deep_stacks() -> Iterator[None]:
    """New threads have stacks that a compiler can do with, where the process has asked for smaller ones."""
    before = threading.stack_size()  # 0: the default
    threading.stack_size(before and max(before, COMPILER_STACK_BYTES))
    try:
        yield
    finally:
        threading.stack_size(before)


class CpuKernel:
    """``Kernel`` on NumPy arrays with ``threads`` threads; queries come in blocks of at most ``rows`` rows."""

    def __init__(self, dtype: str, *, rows: int, head_dim: int, value_dim: int, threads: int) -> None:
        self._attend_group = load(dtype)
        self._tile = host_tile(dtype)
        self._shape = (head_dim, value_dim)
        self._most_rows = rows
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
        step = self._tile.rows * group_panels(self._tile, rows, *self._shape)
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
