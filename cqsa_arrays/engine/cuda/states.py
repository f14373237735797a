"""Partial states of a run on a GPU: in slots there, and where these are few, in page-locked memory or a file too."""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from cupy.cuda import Event, Stream, runtime

from ...block_statistics import BlockStatistics
from ...planner import Group
from ...ranges import Range
from ..statefile import StateFile
from .memory import PinnedPieces, pinned


@dataclass(slots=True)
class StateSlot:
    """Device memory for the state of one query chunk; ``wait_for`` comes before anything else may be done with it.

    Its first ``rows`` rows hold something; of the others no launch has been.
    """

    memory: Any
    rows: int = 0
    wait_for: list[Event] = field(default_factory=list)

    def await_on(self, stream: Stream) -> None:
        for event in self.wait_for:
            stream.wait_event(event)

    def used_on(self, stream: Stream) -> None:
        """What is on ``stream`` now was the last to use it."""
        self.wait_for = [stream.record()]


class WaitingPlace(Protocol):
    """Where the states that have no slot wait."""

    @property
    def moved_bytes(self) -> int:
        """Bytes that were put and got."""

    def begin(self, group: Group) -> None:
        """Forget everything."""

    def put(self, rows: Range, memory: Any, stream: Stream) -> None:
        """Keep what ``memory`` holds once the work on ``stream`` has come so far."""

    def get(self, rows: Range, memory: Any, stream: Stream) -> None:
        """Bring back what was put; whoever reads it does so on ``stream``, or waits for that."""

    def save(self, rows: Range, file: StateFile) -> None:
        """Have what was put in the file of the job, too; every copy is done."""


class PinnedStates:
    """States in page-locked memory of the host, locked when a chunk first waits, copied by the device itself."""

    def __init__(self) -> None:
        self._kept: dict[Range, np.ndarray] = {}
        self._sizes: dict[Range, int] = {}
        self._brought: dict[Range, Event] = {}  # when what was kept had been read
        self.moved_bytes = 0

    def begin(self, group: Group) -> None:
        """Nothing to do: what is kept is overwritten."""

    def put(self, rows: Range, memory: Any, stream: Stream) -> None:
        if rows not in self._kept or self._kept[rows].size < memory.nbytes:
            self._kept[rows] = pinned(memory.nbytes)
        if rows in self._brought:
            stream.wait_event(self._brought.pop(rows))
        self._sizes[rows] = memory.nbytes
        self._copy(self._kept[rows].ctypes.data, memory.data.ptr, memory.nbytes, runtime.memcpyDeviceToHost, stream)

    def get(self, rows: Range, memory: Any, stream: Stream) -> None:
        self._copy(memory.data.ptr, self._kept[rows].ctypes.data, memory.nbytes, runtime.memcpyHostToDevice, stream)
        self._brought[rows] = stream.record()

    def save(self, rows: Range, file: StateFile) -> None:
        file.write(rows, (self._kept[rows][: self._sizes[rows]],))

    def _copy(self, to: int, source: int, size_bytes: int, kind: int, stream: Stream) -> None:
        runtime.memcpyAsync(to, source, size_bytes, kind, stream.ptr)
        self.moved_bytes += size_bytes


class StatesOnDisk:
    """States in a file; a put or get waits for device and disk, while launches go on beside it."""

    def __init__(self, file: StateFile, passing: np.ndarray) -> None:
        self._file, self._passing = file, passing

    @property
    def moved_bytes(self) -> int:
        return self._file.moved_bytes

    def begin(self, group: Group) -> None:
        self._file.begin(group.index)

    def put(self, rows: Range, memory: Any, stream: Stream) -> None:
        host = self._passing[: memory.nbytes]
        runtime.memcpyAsync(host.ctypes.data, memory.data.ptr, host.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
        stream.synchronize()
        self._file.write(rows, (host,))

    def get(self, rows: Range, memory: Any, stream: Stream) -> None:
        host = self._passing[: memory.nbytes]
        self._file.read(rows, host)
        runtime.memcpyAsync(memory.data.ptr, host.ctypes.data, host.nbytes, runtime.memcpyHostToDevice, stream.ptr)
        stream.synchronize()

    def save(self, rows: Range, file: StateFile) -> None:
        """Nothing to do: it is that file."""


@dataclass(frozen=True, slots=True)
class Saved:
    """The file of the states of a job, and the page-locked pieces through which they pass."""

    file: StateFile
    pieces: PinnedPieces


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The state of some rows on the device; ``fresh``: no launch has written it. None: its rows need no state."""

    statistics: BlockStatistics | None
    fresh: bool


class DeviceStates:
    """At most as many states on the device as there are ``slots``; the one used longest ago waits in ``waiting``.

    ``home`` (B, H, Nq, Dv) is a result on the device in which ``acc`` lies, or None. Finished rows give their slot back
    by ``release``, from any thread; without ``waiting`` a new chunk waits for that. ``saved``: states of a job.
    """

    def __init__(
        self,
        slots: Sequence[Any],
        value_dim: int,
        *,
        home: Any | None,
        waiting: WaitingPlace | None,
        saved: Saved | None = None,
    ) -> None:
        self._value_dim, self._home, self._waiting, self._saved = value_dim, home, waiting, saved
        self._leaving, self._coming = (Stream(non_blocking=True) for _ in range(2))  # both directions at once
        self._free: queue.SimpleQueue[StateSlot] = queue.SimpleQueue()
        self._slots = len(slots)
        for memory in slots:
            self._free.put(StateSlot(memory))
        self._resident: OrderedDict[Range, StateSlot] = OrderedDict()
        self._away: dict[Range, Event] = {}  # when each is there
        self._changed: set[Range] = set()  # since they were saved
        self._group: Group | None = None

    @property
    def moved_bytes(self) -> int:
        return 0 if self._waiting is None else self._waiting.moved_bytes

    def begin(self, group: Group) -> None:
        """Turn to ``group``, of which no row has seen a key but those whose states were saved."""
        for slot in self._resident.values():  # other lanes have to do with these rows, too: they were saved
            slot.rows = 0
            self._free.put(slot)
        self._resident.clear()
        self._away.clear()
        self._changed.clear()
        self._group = group
        if self._waiting is not None:
            self._waiting.begin(group)
        if self._saved is not None:
            self._saved.file.begin(group.index)

    def load(self, chunk: Range, part: Range, lane: Stream) -> DeviceState:
        """The state of the rows ``part`` of a chunk, for work on ``lane``."""
        slot = self._bring(chunk)
        slot.await_on(lane)
        first = part.start - chunk.start
        whole = self._view(slot, chunk)
        rows = slice(first, first + len(part))
        state = BlockStatistics(whole.acc[:, :, rows], whole.m[:, :, rows], whole.l[:, :, rows])
        return DeviceState(state, first >= slot.rows)

    def store(self, chunk: Range, part: Range, used: Event) -> None:
        """The work on the state that ``load`` gave comes before the event ``used``."""
        slot = self._resident[chunk]
        slot.wait_for = [used]
        slot.rows = max(slot.rows, part.stop - chunk.start)
        self._changed.add(chunk)

    def preload(self, chunk: Range) -> None:
        """Have a state that waits elsewhere copied to the device: it is continued next."""
        if chunk in self._away:
            self._bring(chunk)

    def finish(self, chunk: Range, lane: Stream) -> tuple[DeviceState, Callable[[Event | None], None]]:
        """As ``load``, for the last time; the function gives the slot back, to be used after an event if there is."""
        if chunk in self._away and self._free.empty() and len(self._resident) < self._slots:
            # Rather wait for rows that leave than drive out others that will be finished next.
            self._free.put(self._free.get())
        found = self.load(chunk, chunk, lane)
        slot = self._resident.pop(chunk)
        self._changed.discard(chunk)

        def release(after: Event | None) -> None:
            slot.rows, slot.wait_for = 0, [] if after is None else [after]
            self._free.put(slot)

        return found, release

    def save(self) -> None:
        """Write the states that have changed since the last time to the file of the job; the device stands still."""
        for chunk in sorted(self._changed):
            assert self._saved is not None
            if chunk in self._resident:
                slot = self._resident[chunk]
                self._clear_rest(slot, chunk)
                self._saved.file.write(chunk, self._pieces(self._flat(slot, chunk), self._saved.pieces), slot.rows)
            else:
                assert self._waiting is not None
                self._waiting.save(chunk, self._saved.file)
        self._changed.clear()

    def _clear_rest(self, slot: StateSlot, chunk: Range) -> None:
        """Rows that no launch has had hold anything; in a file they have seen no key."""
        if slot.rows < len(chunk):
            state, rest = self._view(slot, chunk), slice(slot.rows, None)
            state.acc[:, :, rest], state.m[:, :, rest], state.l[:, :, rest] = 0, -np.inf, 0

    def _pieces(self, flat: Any, pieces: PinnedPieces) -> Iterator[np.ndarray]:
        """What ``flat`` holds, piece by piece, each valid until the next."""
        piece = pieces.borrow()
        try:
            piece.wait()
            for start in range(0, flat.nbytes, piece.memory.size):
                part = piece.memory[: min(piece.memory.size, flat.nbytes - start)]
                source, kind = flat.data.ptr + start, runtime.memcpyDeviceToHost
                runtime.memcpyAsync(part.ctypes.data, source, part.nbytes, kind, self._leaving.ptr)
                self._leaving.synchronize()
                yield part
        finally:
            pieces.give_back(piece)

    def _bring(self, chunk: Range) -> StateSlot:
        slot = self._resident.pop(chunk, None)
        if slot is None:
            slot = self._free_slot()
            if chunk in self._away:
                self._fetch(slot, chunk)
            elif self._saved is not None and self._saved.file.rows_of(chunk):
                self._restore(slot, chunk, self._saved)
        self._resident[chunk] = slot
        return slot

    def _free_slot(self) -> StateSlot:
        if self._waiting is not None and self._resident and self._free.empty():
            return self._driven_out(self._waiting)
        return self._free.get()

    def _driven_out(self, waiting: WaitingPlace) -> StateSlot:
        """The slot used longest ago, once its state waits elsewhere."""
        chunk, slot = self._resident.popitem(last=False)
        slot.await_on(self._leaving)
        waiting.put(chunk, self._flat(slot, chunk), self._leaving)
        slot.used_on(self._leaving)
        self._away[chunk] = slot.wait_for[0]
        slot.rows = 0
        return slot

    def _fetch(self, slot: StateSlot, chunk: Range) -> None:
        assert self._waiting is not None
        slot.await_on(self._coming)
        self._coming.wait_event(self._away.pop(chunk))
        self._waiting.get(chunk, self._flat(slot, chunk), self._coming)
        slot.used_on(self._coming)
        slot.rows = len(chunk)

    def _restore(self, slot: StateSlot, chunk: Range, saved: Saved) -> None:
        """Bring a state as an earlier run has saved it."""
        flat, piece = self._flat(slot, chunk), saved.pieces.borrow()

        def take(offset: int, part: np.ndarray) -> None:
            to, kind = flat.data.ptr + offset, runtime.memcpyHostToDevice
            runtime.memcpyAsync(to, part.ctypes.data, part.nbytes, kind, self._coming.ptr)
            self._coming.synchronize()

        slot.await_on(self._coming)
        try:
            piece.wait()
            saved.file.read_through(chunk, flat.nbytes, lambda _, most: piece.memory[:most], take)
        finally:
            saved.pieces.give_back(piece)
        slot.used_on(self._coming)
        slot.rows = saved.file.rows_of(chunk)

    def _flat(self, slot: StateSlot, chunk: Range) -> Any:
        """All of the memory that the state of a chunk takes."""
        assert self._group is not None, "begin() comes first"
        count = len(self._group.batch) * len(self._group.heads) * len(chunk)
        return slot.memory[: count * (2 if self._home is not None else self._value_dim + 2)]

    def _view(self, slot: StateSlot, chunk: Range) -> BlockStatistics:
        """Its parts in the order in which every kernel family keeps them: a file may be read by another."""
        group = self._group
        assert group is not None, "begin() comes first"
        shape = (len(group.batch), len(group.heads), len(chunk))
        flat, count = self._flat(slot, chunk), int(np.prod(shape))
        acc, rest = flat[: flat.size - 2 * count], flat[flat.size - 2 * count :]
        acc = acc.reshape(*shape, self._value_dim) if self._home is None else self._home_of(group, chunk)
        return BlockStatistics(acc, rest[:count].reshape(shape), rest[count:].reshape(shape))

    def _home_of(self, group: Group, rows: Range) -> Any:
        assert self._home is not None
        return self._home[group.batch.slice, group.heads.slice, rows.slice]

    def close(self) -> None:
        """Forget the slots; what waits elsewhere goes with its place."""
        self._resident.clear()


class NoStates:
    """For launches that finish their rows: nothing is kept between them."""

    moved_bytes = 0

    def __init__(self) -> None:
        self._begun: set[Range] = set()

    def begin(self, group: Group) -> None:
        self._begun.clear()

    def load(self, chunk: Range, part: Range, lane: Stream) -> DeviceState:
        self._begun.add(chunk)
        return DeviceState(None, True)

    def store(self, chunk: Range, part: Range, used: Event) -> None:
        """Nothing to do."""

    def preload(self, chunk: Range) -> None:
        """Nothing to do."""

    def save(self) -> None:
        """Nothing to do: rows of a job, which go to a file, keep their states."""

    def finish(self, rows: Range, lane: Stream) -> tuple[DeviceState, Callable[[Event | None], None]]:
        """``fresh`` where no launch has had the rows, for they see no key."""
        return DeviceState(None, rows not in self._begun), lambda after: None

    def close(self) -> None:
        """Nothing to release."""
