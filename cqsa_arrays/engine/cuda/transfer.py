"""Copies between arrays of the host and the device, each of them one call beside which other threads of Python run.

Made of calls of NumPy and CuPy, a copy gave up Python's lock ten times, and threads waited longer to have it back than
they copied.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from cupy.cuda import Event
from cupy_backends.cuda.api.driver import CUDADriverError

from .memory import Piece

_DRIVER = "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Region:
    """A block of a host array, (rows, rows, dim) with contiguous vectors, and its packed place on the device."""

    block: np.ndarray
    device_address: int

    def numbers(self) -> list[int]:
        """What ``native`` takes for it; rows are as long as they can be."""
        outer, inner, dim = self.block.shape
        outer_stride, inner_stride = self.block.strides[:2]
        row_bytes = dim * self.block.itemsize
        if inner == 1 or inner_stride == row_bytes:
            row_bytes, inner = row_bytes * inner, 1
            if outer == 1 or outer_stride == row_bytes:
                row_bytes *= outer
        return [
            self.block.ctypes.data, inner, outer_stride, inner_stride, row_bytes, self.block.nbytes,
            self.device_address, 0,
        ]  # fmt: skip


# A semaphore and a distance to the next, in 64-bit integers: twice what it takes.
SEMAPHORE_NUMBERS = 8
# Places in the bill of a shipment; see ``native``.
_BEGUN, _DONE, _FAILED, _PASSED = 7, 8, 9, 10


class Shipment:
    """Regions that several threads send together, a share of a page-locked piece at a time."""

    def __init__(self, regions: list[Region], after: list[Event], arrived: list[Event], share_bytes: int) -> None:
        """After the events ``after``; the events ``arrived`` are recorded behind the last copy."""
        self._events = (after, arrived)  # alive
        self._regions = np.array([region.numbers() for region in regions], np.int64)
        shares = -(-self._regions[:, 5] // share_bytes)
        self._regions[:, 7] = np.cumsum(shares) - shares
        self._after, self._arrived = (np.array([event.ptr for event in some], np.int64) for some in self._events)
        self._share_bytes, self._share_count = share_bytes, int(shares.sum())
        vectors = [n for v in (self._regions, self._after, self._arrived) for n in (v.ctypes.data, len(v))]
        self._bill = np.array([*vectors, self._share_count, 0, 0, 0, 0], np.int64)

    @property
    def bill(self) -> int:
        """The address of what ``native`` takes for it."""
        return self._bill.ctypes.data

    @property
    def sent(self) -> bool:
        """Whether every copy and the events are on the stream."""
        return bool(self._bill[_DONE] > self._share_count)

    @property
    def passed(self) -> int:
        """How many threads of a crew are through with it."""
        return int(self._bill[_PASSED])

    def stop(self) -> None:
        """No further share is begun."""
        self._bill[_BEGUN] = 1 << 62

    def check(self) -> None:
        """Raise what the driver reported, as CUDADriverError."""
        _check(int(self._bill[_FAILED]))

    def send(self, transfers: Transfers, piece: Piece, stream: int, patience: int = 0) -> None:
        """A thread's share: put shares on ``stream`` until none is left. Raises CUDADriverError.

        Then it looks ``patience`` times, some nanoseconds each, whether the others are done.
        """
        assert piece.halves[1] == self._share_bytes
        _check(transfers.send(transfers.functions, piece.halves, self.bill, stream, patience))


@dataclass(frozen=True, slots=True)
class Transfers:
    """The compiled loops of ``native``, and the functions that they call; used by any thread."""

    functions: np.ndarray
    send: Any
    serve: Any
    post: Any
    receive_region: Any

    def receive(self, region: Region, piece: Piece, stream: int, ready: Event | None, asleep: Event) -> None:
        """Copy from the device what ``region`` is to hold, behind ``ready`` and what is on ``stream``.

        ``ready`` is waited for by means of ``asleep``, an event of the kind by which threads sleep. Raises
        CUDADriverError.
        """
        numbers = np.array(region.numbers(), np.int64)
        after = 0 if ready is None else ready.ptr
        _check(self.receive_region(self.functions, piece.shares, numbers, stream, after, asleep.ptr))


def open_transfers() -> Transfers:
    """Those of the current device."""
    # Imported here: it imports Numba, which runs that copy no array of the host do without.
    from . import native

    functions = [*_driver(native.DRIVER_FUNCTIONS), *_addresses(None, native.SYSTEM_FUNCTIONS)]
    return Transfers(np.array(functions, np.int64), *_loops())


@lru_cache
def _loops() -> tuple[Any, ...]:
    """The loops of ``native``, compiled once, and loaded once by a process."""
    from ...compiled import entry_point
    from . import native

    loops = (
        (native.send, native.SEND), (native.serve, native.SERVE), (native.post, native.POST),
        (native.receive, native.RECEIVE),
    )  # fmt: skip
    return tuple(entry_point(loop, signature, "copies between host and GPU") for loop, signature in loops)


def _driver(names: tuple[str, ...]) -> list[int]:
    """The current context and the addresses of the driver's functions ``names``."""
    context = ctypes.c_void_p()
    _check(_library(_DRIVER).cuCtxGetCurrent(ctypes.byref(context)))
    assert context.value is not None, "the device is in use"
    return [context.value, *_addresses(_DRIVER, names)]


@lru_cache
def _library(name: str | None) -> ctypes.CDLL:
    """A shared library; None: whatever this process has loaded, the C library among it."""
    return ctypes.CDLL(name)


@lru_cache
def _addresses(library: str | None, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(ctypes.cast(getattr(_library(library), name), ctypes.c_void_p).value or 0 for name in names)


def semaphores(memory: np.ndarray) -> np.ndarray:
    """The addresses of as many semaphores of the C library as ``memory`` has room for, each of them 0."""
    size_bytes = 8 * SEMAPHORE_NUMBERS
    addresses = memory.ctypes.data + size_bytes * np.arange(memory.nbytes // size_bytes)
    for address in addresses:
        _library(None).sem_init(ctypes.c_void_p(int(address)), 0, 0)
    return addresses


def _check(status: int) -> None:
    if status:
        raise CUDADriverError(status)
