"""The memory of a run on a GPU: one allocation there, cut into the terms of the plan, and page-locked pieces here."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
from cupy.cuda.runtime import CUDARuntimeError

from ...errors import DeviceMemoryError
from ...planner.memory import DEVICE_ALIGNMENT
from ...units import format_bytes

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class Arena:
    """``size_bytes`` of the current device, taken from the driver at once and cut into arrays, given back by ``close``.

    Raises DeviceMemoryError where the driver has not that much. Nothing else of a run allocates on the device.
    """

    def __init__(self, size_bytes: int) -> None:
        try:
            self._memory = cupy.cuda.Memory(max(size_bytes, DEVICE_ALIGNMENT))
        except CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            free = int(cupy.cuda.runtime.memGetInfo()[0])
            message = f"memory: {format_bytes(size_bytes)} were planned, the device has {format_bytes(free)} left."
            raise DeviceMemoryError(message, free) from error
        self._size, self._used = max(size_bytes, DEVICE_ALIGNMENT), 0

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
        del self._memory


def pinned(size_bytes: int) -> np.ndarray:
    """Page-locked bytes of their own; CuPy's pool of them only grows."""
    pointer = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(size_bytes), 0)
    return np.frombuffer(pointer, np.uint8, size_bytes)


@dataclass(slots=True)
class Piece:
    """Page-locked bytes; ``done`` is recorded after the copy that uses them."""

    memory: np.ndarray
    done: cupy.cuda.Event


class PinnedPieces:
    """A fixed number of page-locked pieces, handed out when the copy that used them last is done."""

    def __init__(self, count: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._free: queue.Queue[Piece] = queue.Queue()
        for _ in range(count):
            self._free.put(Piece(pinned(size_bytes), cupy.cuda.Event(disable_timing=True)))

    def borrow(self) -> Piece:
        """A piece that nothing uses any more; waits for one."""
        piece = self._free.get()
        piece.done.synchronize()
        return piece

    def give_back(self, piece: Piece) -> None:
        """``piece`` may be used again once its ``done`` has come."""
        self._free.put(piece)
