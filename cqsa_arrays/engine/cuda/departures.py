"""How finished rows leave the device: threads that copy pieces of them to the host and on to where they belong."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import cupy
import numpy as np
from cupy.cuda import Event, Stream, runtime

from ...planner.memory import OUTPUT_SLOTS
from ...ranges import Cut, Range
from ...storage import ArraySink, Sink
from ...workers import Workers
from .memory import Piece, pinned_piece, spare
from .transfer import Region, Transfers

# Smaller pieces take a thread longer to begin than to write.
LEAST_BYTES = 1 << 20

Where = tuple[Range, Range, Range]  # batch, heads, tokens


@dataclass(frozen=True, slots=True)
class Way:
    """One way out: page-locked memory for a piece, and the stream on which it is finished and copied."""

    piece: Piece
    stream: Stream
    finished: Event  # asked for asleep: whoever waits for a kernel should leave its processor to those that copy

    def wait(self, ready: Event | None = None) -> None:
        """Return when ``ready`` has come and what is on the stream is done."""
        if ready is not None:
            self.stream.wait_event(ready)
        self.finished.record(self.stream)
        self.finished.synchronize()


@dataclass(slots=True)
class Departures:
    """Takes pieces of at most ``piece_bytes`` to ``sink``, several at a time.

    ``transfers``: those of a sink whose array takes rows as they are, without log-sum-exp.
    """

    sink: Sink
    transfers: Transfers | None
    workers: Workers
    device: cupy.cuda.Device
    piece_bytes: int
    _ways: queue.SimpleQueue[Way] = field(default_factory=queue.SimpleQueue)
    _under_way: list[Future[None]] = field(default_factory=list)

    def cut(self, rows: int, row_bytes: int, most_rows: int) -> Cut:
        """Rows in pieces of at most ``most_rows``: as few as fit, then as many for each thread, if not small."""
        fewest = -(-rows // most_rows)
        even = min(-(-fewest // OUTPUT_SLOTS) * OUTPUT_SLOTS, rows * row_bytes // LEAST_BYTES)
        return Cut(rows, min(rows, max(fewest, even)), 1)

    def submit(self, send: Callable[..., None], *arguments: Any) -> None:
        """Have a piece sent by one of the threads."""
        self._under_way.append(self.workers.submit(send, *arguments))

    @contextmanager
    def way(self) -> Iterator[Way]:
        """One that is free. Each thread makes one at first, beside the launches: to lock memory takes a millisecond."""
        try:
            way = self._ways.get_nowait()
        except queue.Empty:
            way = self._new_way()
        try:
            yield way
        finally:
            self._ways.put(way)

    def _new_way(self) -> Way:
        with self.device:
            # Before other launches: rows that wait for those keep a state's memory from what comes next.
            stream = Stream(non_blocking=True, priority=-1)
            return Way(pinned_piece(self.piece_bytes), stream, Event(block=True, disable_timing=True))

    def write(self, way: Way, where: Where, out: Any, lse: Any | None, ready: Event | None = None) -> None:
        """Copy finished rows, (1, heads, rows, Dv) without gaps in some order of axes, to where they belong.

        They are finished when the event ``ready`` comes; without one they are.
        """
        batch, heads, tokens = where
        tokens_outside = out.strides[1] < out.strides[2]
        if self.transfers is not None:
            assert isinstance(self.sink, ArraySink)
            to = self.sink.out[batch.start, heads.slice, tokens.slice]
            region = Region(to.swapaxes(0, 1) if tokens_outside else to, out.data.ptr)
            self.transfers.receive(region, way.piece, way.stream.ptr, ready, way.finished)
            return
        with self.device:
            if ready is not None:
                way.wait(ready)
            rows = self._copied(way, 0, out.swapaxes(1, 2) if tokens_outside else out)
            sums = None if lse is None else self._copied(way, -(-out.nbytes // 8) * 8, lse)
            way.stream.synchronize()
        self.sink.write_out(*where, rows.swapaxes(1, 2) if tokens_outside else rows)
        if sums is not None:
            self.sink.write_lse(*where, sums)

    def _copied(self, way: Way, offset: int, array: Any) -> np.ndarray:
        """Where ``array``, C-contiguous, will be in the piece of ``way``."""
        host = way.piece.memory[offset : offset + array.nbytes]
        kind = runtime.memcpyDeviceToHost
        runtime.memcpyAsync(host.ctypes.data, array.data.ptr, array.nbytes, kind, way.stream.ptr)
        return host.view(array.dtype).reshape(array.shape)

    def raise_errors(self) -> None:
        """Drop what is written; an error of the writing is raised."""
        done = [future for future in self._under_way if future.done()]  # asked once: others end meanwhile
        self._under_way = [future for future in self._under_way if future not in done]
        for future in done:
            future.result()

    def drain(self) -> None:
        """Wait until everything is written; an error of the writing is raised."""
        wait(self._under_way, return_when=FIRST_EXCEPTION)
        self.raise_errors()

    def close(self) -> None:
        """Stop writing; what is under way is finished, for it reads memory that is given back next."""
        for future in self._under_way:
            future.cancel()
        wait(self._under_way)
        with suppress(queue.Empty):
            while True:
                spare(self._ways.get_nowait().piece)


class Countdown:
    """Calls ``then`` when it was left, as a context manager, ``count`` times."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left, self._then, self._lock = count, then, threading.Lock()

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()
