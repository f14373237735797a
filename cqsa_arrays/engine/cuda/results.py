"""What becomes of finished rows on a GPU: divided there, copied out in pieces and written while others are computed."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import cupy
import numpy as np
from cupy.cuda import Event, Stream

from ...block_statistics import BlockStatistics
from ...kernels.cuda.call import Finish
from ...kernels.cuda.kernel import CudaKernel
from ...planner import Group
from ...planner.memory import OUTPUT_SLOTS, OutputSlot, OutputTile
from ...ranges import Range
from .departures import Countdown, Departures, Where
from .memory import Arena
from .states import DeviceState


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

    def whole(self, group: Group, chunk: Range, part: Range) -> Finish | None:
        """Where a launch that has all keys of the rows ``part`` of a chunk may write them finished, if it may."""

    def take(self, finished: Finished) -> None:
        """Hand the rows out and release their state."""

    def drain(self) -> None:
        """Wait until everything is written; an error of the writing is raised."""

    def close(self) -> None:
        """Stop writing."""


class DeviceOutput:
    """Finishes the states of rows in pieces of ``slot.rows`` of them, several at a time, which leave for a sink."""

    home = None

    def __init__(
        self, departures: Departures, kernel: CudaKernel, arena: Arena, slot: OutputSlot, dtype: np.dtype
    ) -> None:
        self._departures, self._kernel, self._slot, self._dtype = departures, kernel, slot, dtype
        self._places = queue.SimpleQueue[Any]()  # as many as threads
        for memory in arena.take((OUTPUT_SLOTS, slot.size_bytes), np.uint8):
            self._places.put(memory)

    def whole(self, group: Group, chunk: Range, part: Range) -> Finish | None:
        return None

    def take(self, finished: Finished) -> None:
        self._departures.raise_errors()
        ready, state = finished.lane.record(), finished.state.statistics
        assert state is not None, "rows leave through a state"
        row_bytes = self._slot.size_bytes // self._slot.rows
        cut = self._departures.cut(len(finished.rows), row_bytes, self._slot.rows)
        batches = list(enumerate(finished.group.batch.split(1)))
        pieces = [(b, batch, piece) for b, batch in batches for piece in map(cut.__getitem__, range(len(cut)))]
        left = Countdown(len(pieces), lambda: finished.release(None))
        for b, batch, piece in pieces:
            part = (slice(b, b + 1), slice(None), piece.slice)
            tokens = Range(finished.rows.start + piece.start, finished.rows.start + piece.stop)
            statistics = BlockStatistics(state.acc[part], state.m[part], state.l[part])
            where = (batch, finished.group.heads, tokens)
            self._departures.submit(self._send, ready, DeviceState(statistics, finished.state.fresh), where, left)

    def _send(self, ready: Event, state: DeviceState, where: Where, left: Countdown) -> None:
        """One piece, all of its way; runs in a thread of its own, which waits for the device without holding others."""
        with ExitStack() as stack:
            with left:  # the state is not read any more then: what comes next may have its memory
                way = stack.enter_context(self._departures.way())
                place = stack.enter_context(self._place())
                with self._departures.device, way.stream:
                    way.stream.wait_event(ready)
                    out, lse = self._finish(state, place)
                    way.wait()
            self._departures.write(way, where, out, lse)

    @contextmanager
    def _place(self) -> Iterator[Any]:
        place = self._places.get_nowait()
        try:
            yield place
        finally:
            self._places.put(place)

    def _finish(self, state: DeviceState, place: Any) -> tuple[Any, Any | None]:
        """Have the rows of ``state`` finished in ``place``: output, then log-sum-exp on an 8-byte border."""
        statistics = state.statistics
        assert statistics is not None
        shape, dim = statistics.acc.shape[:3], statistics.acc.shape[3]
        count = int(np.prod(shape))
        out_bytes = count * dim * self._dtype.itemsize
        out, lse = place[:out_bytes].view(self._dtype).reshape(*shape, dim), None
        if self._slot.lse_itemsize:
            begin = -(-out_bytes // 8) * 8
            lse = place[begin : begin + count * self._slot.lse_itemsize].view(statistics.m.dtype).reshape(shape)
        self._kernel.finish(statistics, Finish(out, lse), fresh=state.fresh)
        return out, lse

    def drain(self) -> None:
        self._departures.drain()

    def close(self) -> None:
        self._departures.close()


class DeviceTiles:
    """Rows that one launch finishes, in one of the places of ``tile``, from where they leave.

    For sinks of output alone. Places lie as the result does: a piece of rows is without gaps on both sides.
    """

    home = None

    def __init__(self, departures: Departures, arena: Arena, dtype: np.dtype, tile: OutputTile) -> None:
        self._departures, self._dtype, self._tile = departures, dtype, tile
        self._free = queue.SimpleQueue[Any]()
        for memory in arena.take((tile.count, tile.size_bytes), np.uint8):
            self._free.put(memory)
        self._begun: dict[Range, tuple[Any, Any]] = {}  # of the group that is computed: the place, and its rows

    def whole(self, group: Group, chunk: Range, part: Range) -> Finish | None:
        if chunk not in self._begun:
            self._begun[chunk] = self._new(group, chunk)
        _, out = self._begun[chunk]
        return Finish(out[:, :, part.start - chunk.start : part.stop - chunk.start], None)

    def take(self, finished: Finished) -> None:
        self._departures.raise_errors()
        group, rows = finished.group, finished.rows
        if finished.state.fresh:  # no launch has written them
            self._begun[rows] = self._new(group, rows)
            with finished.lane:
                self._begun[rows][0][...] = 0  # bytes: zeros of every element type
        place, out = self._begun.pop(rows)
        ready = finished.lane.record()
        pieces = list(self._pieces(group, rows, out))
        left = Countdown(len(pieces), lambda: self._free.put(place))
        for where, piece in pieces:
            self._departures.submit(self._send, ready, where, piece, left)
        finished.release(None)

    def _new(self, group: Group, rows: Range) -> tuple[Any, Any]:
        """A place, waited for where all are taken, and the rows in it, (batch, heads, rows, Dv)."""
        place, shape = self._free.get(), (len(group.batch), len(group.heads), len(rows), self._tile.dim)
        flat = place[: int(np.prod(shape)) * self._dtype.itemsize].view(self._dtype)
        if self._tile.token_major:
            return place, flat.reshape(shape[0], shape[2], shape[1], shape[3]).swapaxes(1, 2)
        return place, flat.reshape(shape)

    def _pieces(self, group: Group, rows: Range, out: Any) -> Iterator[tuple[Where, Any]]:
        """Parts without gaps: of one head, or where heads lie inside tokens, of all."""
        together = len(group.heads) if self._tile.token_major else 1
        row_bytes = together * self._tile.dim * self._dtype.itemsize
        cut = self._departures.cut(len(rows), row_bytes, max(1, self._departures.piece_bytes // row_bytes))
        for (b, batch), heads in product(enumerate(group.batch.split(1)), group.heads.split(together)):
            first = heads.start - group.heads.start
            for piece in map(cut.__getitem__, range(len(cut))):
                where = (batch, heads, Range(rows.start + piece.start, rows.start + piece.stop))
                yield where, out[b : b + 1, first : first + len(heads), piece.slice]

    def _send(self, ready: Event, where: Where, piece: Any, left: Countdown) -> None:
        with left, self._departures.way() as way:
            self._departures.write(way, where, piece, None, ready)

    def drain(self) -> None:
        self._departures.drain()

    def close(self) -> None:
        self._departures.close()


class DeviceArrayOutput:
    """Finishes rows in a CuPy array, ``out`` (B, H, Nq, Dv); ``holds_states``: their ``acc`` lies there already."""

    def __init__(self, out: Any, kernel: CudaKernel, *, holds_states: bool) -> None:
        self._out, self._kernel = out, kernel
        self.home = out if holds_states else None

    def whole(self, group: Group, chunk: Range, part: Range) -> Finish | None:
        return Finish(self._of(group, part), None)

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

    def whole(self, group: Group, chunk: Range, part: Range) -> Finish | None:
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
