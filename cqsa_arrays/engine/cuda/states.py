"""Partial states of a run on a GPU: in slots there, and where these are few, in page-locked memory or a file too."""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from cupy.cuda import Event, Stream, runtime

from ...block_statistics import BlockStatistics
from ...planner import Group
from ...ranges import Range
from ..states import FileStates
from .memory import pinned


@dataclass(slots=True)
class StateSlot:
    """Device memory for the state of one query chunk; ``wait_for`` comes before anything else may be done with it."""

    memory: Any
    fresh: bool = True
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


class PinnedStates:
    """States in page-locked memory of the host, locked when a chunk first waits, copied by the device itself."""

    def __init__(self) -> None:
        self._kept: dict[Range, np.ndarray] = {}
        self._brought: dict[Range, Event] = {}  # when what was kept had been read
        self.moved_bytes = 0

    def begin(self, group: Group) -> None:
        """Nothing to do: what is kept is overwritten."""

    def put(self, rows: Range, memory: Any, stream: Stream) -> None:
        if rows not in self._kept or self._kept[rows].size < memory.nbytes:
            self._kept[rows] = pinned(memory.nbytes)
        if rows in self._brought:
            stream.wait_event(self._brought.pop(rows))
        self._copy(self._kept[rows].ctypes.data, memory.data.ptr, memory.nbytes, runtime.memcpyDeviceToHost, stream)

    def get(self, rows: Range, memory: Any, stream: Stream) -> None:
        self._copy(memory.data.ptr, self._kept[rows].ctypes.data, memory.nbytes, runtime.memcpyHostToDevice, stream)
        self._brought[rows] = stream.record()

    def _copy(self, to: int, source: int, size_bytes: int, kind: int, stream: Stream) -> None:
        runtime.memcpyAsync(to, source, size_bytes, kind, stream.ptr)
        self.moved_bytes += size_bytes


class StatesOnDisk:
    """States in the scratch file; a put or get waits for device and disk, while launches go on beside it."""

    def __init__(self, file: FileStates, passing: np.ndarray) -> None:
        self._file, self._passing = file, passing

    @property
    def moved_bytes(self) -> int:
        return self._file.moved_bytes

    def begin(self, group: Group) -> None:
        self._file.begin(group)

    def put(self, rows: Range, memory: Any, stream: Stream) -> None:
        host = self._passing[: memory.nbytes]
        runtime.memcpyAsync(host.ctypes.data, memory.data.ptr, host.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
        stream.synchronize()
        self._file.write(rows, host)

    def get(self, rows: Range, memory: Any, stream: Stream) -> None:
        host = self._passing[: memory.nbytes]
        self._file.read(rows, host)
        runtime.memcpyAsync(memory.data.ptr, host.ctypes.data, host.nbytes, runtime.memcpyHostToDevice, stream.ptr)
        stream.synchronize()


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The state of some rows on the device; ``fresh``: no launch has written it. None: its rows need no state."""

    statistics: BlockStatistics | None
    fresh: bool


class DeviceStates:
    """At most as many states on the device as there are ``slots``; the one used longest ago waits in ``waiting``.

    ``home`` (B, H, Nq, Dv) is a result on the device in which ``acc`` lies, or None. Finished rows give their slot back
    by ``release``, from any thread; without ``waiting`` a new chunk waits for that.
    """

    def __init__(
        self,
        slots: Sequence[Any],
        value_dim: int,
        *,
        home: Any | None,
        waiting: WaitingPlace | None,
    ) -> None:
        self._value_dim, self._home, self._waiting = value_dim, home, waiting
        self._leaving, self._coming = (Stream(non_blocking=True) for _ in range(2))  # both directions at once
        self._free: queue.SimpleQueue[StateSlot] = queue.SimpleQueue()
        self._slots = len(slots)
        for memory in slots:
            self._free.put(StateSlot(memory))
        self._resident: OrderedDict[Range, StateSlot] = OrderedDict()
        self._away: dict[Range, Event] = {}  # when each is there
        self._group: Group | None = None

    @property
    def moved_bytes(self) -> int:
        return 0 if self._waiting is None else self._waiting.moved_bytes

    def begin(self, group: Group) -> None:
        """No row of ``group`` has seen a key. All rows of the last group were finished."""
        assert len(self._resident) + len(self._away) == 0, "a group ends when its rows are finished"
        self._group = group
        if self._waiting is not None:
            self._waiting.begin(group)

    def load(self, rows: Range, lane: Stream) -> DeviceState:
        """The state of ``rows``, for work on ``lane``."""
        slot = self._bring(rows)
        slot.await_on(lane)
        fresh, slot.fresh = slot.fresh, False
        return DeviceState(self._view(slot, rows), fresh)

    def store(self, rows: Range, lane: Stream) -> None:
        """The work on the state that ``load`` gave is on ``lane``."""
        self._resident[rows].used_on(lane)

    def preload(self, rows: Range) -> None:
        """Have a state that waits elsewhere copied to the device: it is continued next."""
        if rows in self._away:
            self._bring(rows)

    def finish(self, rows: Range, lane: Stream) -> tuple[DeviceState, Callable[[Event | None], None]]:
        """As ``load``, for the last time; the function gives the slot back, to be used after an event if there is."""
        if rows in self._away and self._free.empty() and len(self._resident) < self._slots:
            # Rather wait for rows that leave than drive out others that will be finished next.
            self._free.put(self._free.get())
        found = self.load(rows, lane)
        slot = self._resident.pop(rows)

        def release(after: Event | None) -> None:
            slot.fresh, slot.wait_for = True, [] if after is None else [after]
            self._free.put(slot)

        return found, release

    def _bring(self, rows: Range) -> StateSlot:
        slot = self._resident.pop(rows, None)
        if slot is None:
            slot = self._free_slot()
            if rows in self._away:
                self._fetch(slot, rows)
        self._resident[rows] = slot
        return slot

    def _free_slot(self) -> StateSlot:
        if self._waiting is not None and self._resident and self._free.empty():
            return self._driven_out(self._waiting)
        return self._free.get()

    def _driven_out(self, waiting: WaitingPlace) -> StateSlot:
        """The slot used longest ago, once its state waits elsewhere."""
        rows, slot = self._resident.popitem(last=False)
        slot.await_on(self._leaving)
        waiting.put(rows, self._flat(slot, rows), self._leaving)
        slot.used_on(self._leaving)
        self._away[rows] = slot.wait_for[0]
        slot.fresh = True
        return slot

    def _fetch(self, slot: StateSlot, rows: Range) -> None:
        assert self._waiting is not None
        slot.await_on(self._coming)
        self._coming.wait_event(self._away.pop(rows))
        self._waiting.get(rows, self._flat(slot, rows), self._coming)
        slot.used_on(self._coming)
        slot.fresh = False

    def _flat(self, slot: StateSlot, rows: Range) -> Any:
        """All of the memory that the state of ``rows`` takes."""
        assert self._group is not None, "begin() comes first"
        count = len(self._group.batch) * len(self._group.heads) * len(rows)
        return slot.memory[: count * (2 if self._home is not None else self._value_dim + 2)]

    def _view(self, slot: StateSlot, rows: Range) -> BlockStatistics:
        group = self._group
        assert group is not None, "begin() comes first"
        shape = (len(group.batch), len(group.heads), len(rows))
        flat, count = self._flat(slot, rows), int(np.prod(shape))
        m, normalizer, acc = flat[:count], flat[count : 2 * count], flat[2 * count :]
        acc = acc.reshape(*shape, self._value_dim) if self._home is None else self._home_of(group, rows)
        return BlockStatistics(acc, m.reshape(shape), normalizer.reshape(shape))

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

    def load(self, rows: Range, lane: Stream) -> DeviceState:
        self._begun.add(rows)
        return DeviceState(None, True)

    def store(self, rows: Range, lane: Stream) -> None:
        """Nothing to do."""

    def preload(self, rows: Range) -> None:
        """Nothing to do."""

    def finish(self, rows: Range, lane: Stream) -> tuple[DeviceState, Callable[[Event | None], None]]:
        """``fresh`` where no launch has had the rows, for they see no key."""
        return DeviceState(None, rows not in self._begun), lambda after: None

    def close(self) -> None:
        """Nothing to release."""
