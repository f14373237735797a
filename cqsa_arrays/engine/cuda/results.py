"""What becomes of finished rows on a GPU: divided there, copied out in pieces and written while others are computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import cupy
import numpy as np
from cupy.cuda import Event, Stream, runtime

from ...block_statistics import BlockStatistics
from ...kernels.cuda.call import Finish
from ...kernels.cuda.kernel import CudaKernel
from ...planner import Group
from ...planner.memory import OUTPUT_SLOTS, OutputSlot
from ...ranges import Cut, Range
from ...storage import ArraySink, Sink
from ...workers import Workers
from .memory import Arena, Piece, pinned_piece, spare
from .states import DeviceState
from .transfer import Region, Transfers

# Smaller pieces take a thread longer to begin than to write.
LEAST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Finished:
    """Rows whose last launch is on ``lane``; ``release`` gives their state's memory back, after an event if any."""

    group: Group
    rows: Range
    state: DeviceState
    lane: Stream
    release: Callable[[Event | None], None]


class DeviceResults(Protocol):
    """Takes every row of every head once, when its last launch is on a stream."""

    home: Any | None

    def whole(self, group: Group, rows: Range) -> Finish | None:
        """Where the launch that computes all of ``rows`` may write them finished, if it may."""

    def take(self, finished: Finished) -> None:
        """Hand the rows out and release their state."""

    def drain(self) -> None:
        """Wait until everything is written; an error of the writing is raised."""

    def close(self) -> None:
        """Stop writing."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way out: memory on the device, as much that is page-locked, the stream that finishes and copies."""

    device: Any
    piece: Piece
    stream: Stream
    finished: Event  # asked for asleep: whoever waits for a kernel should leave its processor to those that copy


class DeviceOutput:
    """Writes output and log-sum-exp to a sink on the host, in pieces of ``slot.rows`` rows, several at a time.

    ``transfers``: those of a sink whose array takes the rows as they are, without log-sum-exp.
    """

    home = None

    def __init__(
        self,
        sink: Sink,
        kernel: CudaKernel,
        arena: Arena,
        slot: OutputSlot,
        dtype: np.dtype,
        transfers: Transfers | None,
        writers: Workers,
    ) -> None:
        self._sink, self._kernel, self._slot, self._dtype = sink, kernel, slot, dtype
        self._transfers, self._writers = transfers, writers
        self._device = cupy.cuda.Device()
        self._places = queue.SimpleQueue[Any]()
        for memory in arena.take((OUTPUT_SLOTS, slot.size_bytes), np.uint8):
            self._places.put(memory)
        self._ways: queue.SimpleQueue[Way] = queue.SimpleQueue()
        self._under_way: list[Future[None]] = []

    def whole(self, group: Group, rows: Range) -> Finish | None:
        return None

    def take(self, finished: Finished) -> None:
        self._raise_errors()
        ready, state = finished.lane.record(), finished.state.statistics
        assert state is not None, "rows leave through a state"
        cut = Cut(len(finished.rows), self._pieces(len(finished.rows)), 1)
        batches = list(enumerate(finished.group.batch.split(1)))
        pieces = [(b, batch, piece) for b, batch in batches for piece in map(cut.__getitem__, range(len(cut)))]
        left = _Countdown(len(pieces), lambda: finished.release(None))
        for b, batch, piece in pieces:
            part = (slice(b, b + 1), slice(None), piece.slice)
            tokens = Range(finished.rows.start + piece.start, finished.rows.start + piece.stop)
            statistics = BlockStatistics(state.acc[part], state.m[part], state.l[part])
            where = (batch, finished.group.heads, tokens)
            piece_state = DeviceState(statistics, finished.state.fresh)
            self._under_way.append(self._writers.submit(self._send, ready, piece_state, where, left))

    def _pieces(self, rows: int) -> int:
        """Into how many pieces rows are cut: as few as fit, then as many for each thread, if those are not small."""
        fewest, smaller = -(-rows // self._slot.rows), rows * self._slot.size_bytes // self._slot.rows // LEAST_BYTES
        return max(fewest, min(-(-fewest // OUTPUT_SLOTS) * OUTPUT_SLOTS, smaller))

    def _send(self, ready: Event, state: DeviceState, where: tuple[Range, Range, Range], left: _Countdown) -> None:
        """One piece, all of its way; runs in a thread of its own, which waits for the device without holding others."""
        way = None
        try:
            try:
                way = self._way()
                size_bytes = self._finish(way, ready, state)
            finally:  # the state is not read any more: what comes next may have its memory while this is written
                left.one_done()
            self._write(way, state, where, size_bytes)
        finally:
            if way is not None:
                self._ways.put(way)

    def _finish(self, way: Way, ready: Event, state: DeviceState) -> int:
        """Have finished rows in the memory of ``way``; returns their bytes once they are there."""
        assert state.statistics is not None
        with self._device, way.stream:
            way.stream.wait_event(ready)
            out, lse, size_bytes = self._cut(way.device, state.statistics)
            self._kernel.finish(state.statistics, Finish(out, lse), fresh=state.fresh)
            way.finished.record(way.stream)
            way.finished.synchronize()
        return size_bytes

    def _write(self, way: Way, state: DeviceState, where: tuple[Range, Range, Range], size_bytes: int) -> None:
        """Copy what is finished in the memory of ``way`` to the host and on to its place."""
        assert state.statistics is not None
        if self._transfers is not None:
            assert isinstance(self._sink, ArraySink)
            batch, heads, tokens = where
            to = self._sink.out[batch.start, heads.slice, tokens.slice]
            self._transfers.receive(Region(to, way.device.data.ptr), way.piece, way.stream.ptr)
            return
        host, kind = way.piece.memory, runtime.memcpyDeviceToHost
        with self._device:
            runtime.memcpyAsync(host.ctypes.data, way.device.data.ptr, size_bytes, kind, way.stream.ptr)
            way.stream.synchronize()
        out, lse, _ = self._cut(host, state.statistics)
        self._sink.write_out(*where, out)
        if lse is not None:
            self._sink.write_lse(*where, lse)

    def _way(self) -> Way:
        """One that is free. Each thread makes one at first, beside the launches: a stream takes a millisecond."""
        with suppress(queue.Empty):
            return self._ways.get_nowait()
        with self._device:
            # Before other launches: rows that wait for those keep a state's memory from what comes next.
            stream = Stream(non_blocking=True, priority=-1)
            piece = Piece(pinned_piece(self._slot.size_bytes))
            finished = Event(block=True, disable_timing=True)
            return Way(self._places.get_nowait(), piece, stream, finished)  # there are as many places as threads

    def _cut(self, memory: Any, state: BlockStatistics) -> tuple[Any, Any | None, int]:
        """Output, then log-sum-exp on an 8-byte border, of the rows of ``state`` in ``memory``; the bytes of both."""
        shape, dim = state.acc.shape[:3], state.acc.shape[3]
        count = int(np.prod(shape))
        out_bytes = count * dim * self._dtype.itemsize
        out = memory[:out_bytes].view(self._dtype).reshape(*shape, dim)
        if not self._slot.lse_itemsize:
            return out, None, out_bytes
        begin = -(-out_bytes // 8) * 8
        end = begin + count * self._slot.lse_itemsize
        return out, memory[begin:end].view(state.m.dtype).reshape(shape), end

    def _raise_errors(self) -> None:
        """Drop what is written; an error of the writing is raised."""
        done = [future for future in self._under_way if future.done()]  # asked once: others end meanwhile
        self._under_way = [future for future in self._under_way if future not in done]
        for future in done:
            future.result()

    def drain(self) -> None:
        wait(self._under_way, return_when=FIRST_EXCEPTION)
        self._raise_errors()

    def close(self) -> None:
        """Stop writing; what is under way is finished, for it reads memory that is given back next."""
        for future in self._under_way:
            future.cancel()
        wait(self._under_way)
        while not self._ways.empty():
            spare(self._ways.get().piece.memory)


class _Countdown:
    """Calls ``then`` when ``one_done`` was called ``count`` times."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left, self._then, self._lock = count, then, threading.Lock()

    def one_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()


class DeviceArrayOutput:
    """Finishes rows in a CuPy array, ``out`` (B, H, Nq, Dv); ``holds_states``: their ``acc`` lies there already."""

    def __init__(self, out: Any, kernel: CudaKernel, *, holds_states: bool) -> None:
        self._out, self._kernel = out, kernel
        self.home = out if holds_states else None

    def whole(self, group: Group, rows: Range) -> Finish | None:
        return Finish(self._of(group, rows), None)

    def take(self, finished: Finished) -> None:
        state, out = finished.state, self._of(finished.group, finished.rows)
        with finished.lane:
            if state.statistics is not None:
                self._kernel.finish(state.statistics, Finish(out, None), fresh=state.fresh)
            elif state.fresh:  # no launch has written them
                out[...] = 0
        finished.release(finished.lane.record())

    def _of(self, group: Group, rows: Range) -> Any:
        return self._out[group.batch.slice, group.heads.slice, rows.slice]

    def drain(self) -> None:
        """Nothing to do: the kernels are on their streams."""

    def close(self) -> None:
        """Nothing to release."""


class DeviceStatistics:
    """Copies states to ``kept``, on the host or the device; ``holds_states``: their ``acc`` lies there already."""

    def __init__(self, kept: BlockStatistics, *, holds_states: bool) -> None:
        self._kept = kept
        self.home = kept.acc if holds_states else None

    def whole(self, group: Group, rows: Range) -> Finish | None:
        return None

    def take(self, finished: Finished) -> None:
        part = (finished.group.batch.slice, finished.group.heads.slice, finished.rows.slice)
        kept, state = self._kept, finished.state.statistics
        assert state is not None, "statistics are what is asked for"
        with finished.lane:
            if finished.state.fresh:
                kept.acc[part], kept.m[part], kept.l[part] = 0, -np.inf, 0
            else:
                _copy(state.m, kept.m[part])
                _copy(state.l, kept.l[part])
                if self.home is None:
                    _copy(state.acc, kept.acc[part])
        finished.release(finished.lane.record())

    def drain(self) -> None:
        """Nothing to do: the copies are on their streams, or made."""

    def close(self) -> None:
        """Nothing to release."""


def _copy(source: Any, to: Any) -> None:
    """Copy ``source`` (batch, heads, ...), on the device, to an array there or on the host, head by head."""
    if isinstance(to, cupy.ndarray):
        to[...] = source
        return
    for b, h in np.ndindex(source.shape[:2]):
        source[b, h].get(out=to[b, h])
