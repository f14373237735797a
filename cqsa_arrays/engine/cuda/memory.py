"""The memory of a run on a GPU: one allocation there, cut into the terms of the plan, and page-locked pieces here."""

from __future__ import annotations

import queue
from collections import defaultdict
from contextlib import suppress
from typing import Any

import cupy
import numpy as np
from cupy.cuda.runtime import CUDARuntimeError

from ...errors import DeviceMemoryError
from ...planner.memory import DEVICE_ALIGNMENT, OUTPUT_SLOTS, PINNED_PIECE_BYTES, PINNED_PIECES
from ...units import format_bytes

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class Arena:
    """Some bytes of the current device, taken from the driver at once and cut into arrays, given back by ``close``.

    Nothing else of a run allocates on the device.
    """

    def __init__(self) -> None:
        self._memory: cupy.cuda.Memory | None = None
        self._size = self._used = 0

    def allocate(self, size_bytes: int) -> None:
        """Take ``size_bytes``, once. Raises DeviceMemoryError where the driver has not that much."""
        self._size = max(size_bytes, DEVICE_ALIGNMENT)
        try:
            self._memory = cupy.cuda.Memory(self._size)
        except CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            free = int(cupy.cuda.runtime.memGetInfo()[0])
            message = f"memory: {format_bytes(size_bytes)} were planned, the device has {format_bytes(free)} left."
            raise DeviceMemoryError(message, free) from error

    def take(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """The next part, an array of any content."""
        shape = (shape,) if isinstance(shape, int) else shape
        size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self._used + size_bytes > self._size:
            raise AssertionError(f"{size_bytes} bytes more than the plan's memory table has")
        pointer = cupy.cuda.MemoryPointer(self._memory, self._used)
        self._used += -(-size_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
        return cupy.ndarray(shape, dtype, memptr=pointer)

    def close(self) -> None:
        """Give the memory back once the arrays are dropped."""
        self._memory = None


def pinned(size_bytes: int) -> np.ndarray:
    """Page-locked bytes of their own; CuPy's pool of them only grows."""
    pointer = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(size_bytes), 0)
    return np.frombuffer(pointer, np.uint8, size_bytes)


# A piece is emptied in so many turns: while some are on their way, others are emptied. It is filled in two, for each is
# three calls of the driver, which has one lock for all threads.
SHARES = 4


class Piece:
    """Page-locked bytes in ``SHARES`` shares; an event of each in ``done`` is recorded after the copy that uses it.

    ``shares`` is what ``native`` takes for it, ``halves`` where it has two. Whoever fills more than a share by one copy
    records the first event: loops begin with the first place, and wait for that.
    """

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.done = tuple(cupy.cuda.Event(disable_timing=True) for _ in range(SHARES))
        share, events = memory.size // SHARES, (event.ptr for event in self.done)
        self.shares = np.array([memory.ctypes.data, share, *events], np.int64)
        self.halves = np.array([memory.ctypes.data, memory.size // 2, *self.shares[2 :: SHARES // 2]], np.int64)

    def wait(self) -> None:
        """Return when nothing uses it any more."""
        for event in self.done:
            event.synchronize()


# Locking a piece takes a millisecond, more than filling it, and its events some of Python's time while all threads
# begin: the pieces of one run wait here for the next on the same device, by its number. They are of one size and no
# more than one run uses.
_SPARE: defaultdict[int, queue.LifoQueue[Piece]] = defaultdict(lambda: queue.LifoQueue(PINNED_PIECES + OUTPUT_SLOTS))


def pinned_piece(size_bytes: int) -> Piece:
    """A piece of ``PINNED_PIECE_BYTES`` or what one row takes if that is more; ``spare`` takes it back."""
    if size_bytes > PINNED_PIECE_BYTES:
        return Piece(pinned(size_bytes))
    try:
        return _SPARE[cupy.cuda.Device().id].get_nowait()
    except queue.Empty:
        return Piece(pinned(PINNED_PIECE_BYTES))


def spare(piece: Piece) -> None:
    """Keep a piece that nothing uses any more for a later run on the current device."""
    if piece.memory.size == PINNED_PIECE_BYTES:
        with suppress(queue.Full):
            _SPARE[cupy.cuda.Device().id].put_nowait(piece)


class PinnedPieces:
    """At most ``count`` page-locked pieces; the copies of who had one last may still use it."""

    def __init__(self, count: int) -> None:
        self.size_bytes = PINNED_PIECE_BYTES
        self._free: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._left = queue.SimpleQueue[None]()
        for _ in range(count):
            self._left.put(None)

    def borrow(self) -> Piece:
        """A piece that is free, else a new one, else the next that comes back."""
        with suppress(queue.Empty):
            return self._free.get_nowait()
        with suppress(queue.Empty):
            self._left.get_nowait()
            return self._new()
        return self._free.get()

    def _new(self) -> Piece:
        try:
            return pinned_piece(self.size_bytes)
        except BaseException:
            self._left.put(None)  # or who comes next would wait for a piece that is nowhere
            raise

    def give_back(self, piece: Piece) -> None:
        """``piece`` may be used again once its ``done`` have come."""
        self._free.put(piece)

    def close(self) -> None:
        """Every copy is done: a later run may use the pieces."""
        with suppress(queue.Empty):
            while True:
                spare(self._free.get_nowait())
