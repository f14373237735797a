"""What becomes of finished rows on a GPU: divided there, copied out in pieces and written while others are computed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from ...block_statistics import BlockStatistics
from ...kernels.cuda.kernel import CudaKernel
from ...planner import Group
from ...planner.memory import OUTPUT_SLOTS, OutputSlot
from ...ranges import Range
from ...storage import Sink
from ..results import StatisticsResults
from .memory import pinned
from .pages import Link


@dataclass(slots=True)
class Way:
    """One way out: memory on the device, page-locked memory of the same size, the event of the copy between them."""

    device: Any
    host: np.ndarray
    copied: cupy.cuda.Event


class DeviceOutput:
    """Writes output and log-sum-exp to a sink on the host, in pieces of ``slot.rows`` rows; several are under way."""

    def __init__(
        self, sink: Sink, kernel: CudaKernel, link: Link, slot: OutputSlot, *, value_dim: int, dtype: np.dtype
    ) -> None:
        self._sink, self._kernel, self._link, self._piece_rows = sink, kernel, link, slot.rows
        self._dim, self._dtype = value_dim, dtype
        self._out = cupy.cuda.Stream(non_blocking=True)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cqsa-output")
        memory = link.arena.take((OUTPUT_SLOTS, slot.size_bytes), np.uint8)
        self._free = [Way(part, pinned(slot.size_bytes), cupy.cuda.Event(disable_timing=True)) for part in memory]
        self._under_way: deque[tuple[Way, Future[None]]] = deque()
        self.home: np.ndarray | None = None

    def take(self, group: Group, rows: Range, state: BlockStatistics, *, in_place: bool) -> None:
        for b, batch in enumerate(group.batch.split(1)):
            for piece in Range(0, len(rows)).split(self._piece_rows):
                part = (slice(b, b + 1), slice(None), piece.slice)
                tokens = Range(rows.start + piece.start, rows.start + piece.stop)
                self._send(batch, group.heads, tokens, BlockStatistics(state.acc[part], state.m[part], state.l[part]))

    def drain(self) -> None:
        """Wait until everything is written; an error of the writing is raised."""
        while self._under_way:
            self._oldest_back()

    def close(self) -> None:
        """Stop writing; what is under way is finished, for it reads memory that is given back next."""
        self._writer.shutdown()

    @property
    def _state_itemsize(self) -> int:
        return 8 if self._kernel.variant.element == "float64" else 4

    def _send(self, batch: Range, heads: Range, tokens: Range, state: BlockStatistics) -> None:
        if not self._free:
            self._oldest_back()
        way = self._free.pop()
        shape = (1, len(heads), len(tokens))
        out, lse, size_bytes = self._cut(way.device, shape)
        self._kernel.finish(state, out, lse)
        self._out.wait_event(self._link.compute.record())
        to_host = runtime.memcpyDeviceToHost
        runtime.memcpyAsync(way.host.ctypes.data, way.device.data.ptr, size_bytes, to_host, self._out.ptr)
        way.copied.record(self._out)
        host_out, host_lse, _ = self._cut(way.host, shape)

        def write() -> None:
            with self._link.device:
                way.copied.synchronize()
            self._sink.write_out(batch, heads, tokens, host_out)
            self._sink.write_lse(batch, heads, tokens, host_lse)

        self._under_way.append((way, self._writer.submit(write)))

    def _cut(self, memory: Any, shape: tuple[int, int, int]) -> tuple[Any, Any, int]:
        """Output, then log-sum-exp on an 8-byte border, of rows of ``shape`` in ``memory``; the bytes of both."""
        count = int(np.prod(shape))
        out_bytes = count * self._dim * self._dtype.itemsize
        begin = -(-out_bytes // 8) * 8
        end = begin + count * self._state_itemsize
        lse = memory[begin:end].view(f"f{self._state_itemsize}").reshape(shape)
        return memory[:out_bytes].view(self._dtype).reshape(*shape, self._dim), lse, end

    def _oldest_back(self) -> None:
        way, written = self._under_way.popleft()
        try:
            written.result()
        finally:
            self._free.append(way)


class DeviceArrayOutput:
    """Divides into a CuPy array of the caller's, ``out`` (B, H, Nq, Dv)."""

    home: np.ndarray | None = None

    def __init__(self, out: Any, kernel: CudaKernel) -> None:
        self._out, self._kernel = out, kernel

    def take(self, group: Group, rows: Range, state: BlockStatistics, *, in_place: bool) -> None:
        self._kernel.finish(state, self._out[group.batch.slice, group.heads.slice, rows.slice], None)

    def drain(self) -> None:
        """Nothing to do: the kernels are on the stream."""

    def close(self) -> None:
        """Nothing to release."""


class DeviceStatistics:
    """Copies states to ``results.statistics``, on the host or the device."""

    home: np.ndarray | None = None

    def __init__(self, results: StatisticsResults, compute: cupy.cuda.Stream) -> None:
        self._statistics, self._compute = results.statistics, compute

    def take(self, group: Group, rows: Range, state: BlockStatistics, *, in_place: bool) -> None:
        part = (group.batch.slice, group.heads.slice, rows.slice)
        kept = self._statistics
        for to, source in ((kept.acc, state.acc), (kept.m, state.m), (kept.l, state.l)):
            to[part] = source if isinstance(to, cupy.ndarray) else cupy.asnumpy(source, stream=self._compute)
        kept.acc[part][kept.saw_no_key[part]] = 0

    def drain(self) -> None:
        """Nothing to do: the copies are on the stream, or made."""

    def close(self) -> None:
        """Nothing to release."""
