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


class Shipment:
    """Regions that several threads send together, a share of a page-locked piece at a time."""

    def __init__(self, regions: list[Region], after: list[Event], arrived: list[Event], share_bytes: int) -> None:
        """After the events ``after``; the events ``arrived`` are recorded behind the last copy."""
        self._events = (after, arrived)  # alive
        self._regions = np.array([region.numbers() for region in regions], np.int64)
        shares = -(-self._regions[:, 5] // share_bytes)
        self._regions[:, 7] = np.cumsum(shares) - shares
        self._counts = np.array([0, 0, shares.sum()], np.int64)
        self._after, self._arrived = (np.array([event.ptr for event in some], np.int64) for some in self._events)
        self._share_bytes = share_bytes

    @property
    def share_count(self) -> int:
        """How many shares there are to send."""
        return int(self._counts[2])

    @property
    def sent(self) -> bool:
        """Whether every copy and the events are on the stream."""
        return bool(self._counts[1] > self._counts[2])

    def stop(self) -> None:
        """No further share is begun."""
        self._counts[0] = 1 << 62

    def send(self, transfers: Transfers, piece: Piece, stream: int, patience: int = 0) -> None:
        """A thread's share: put shares on ``stream`` until none is left. Raises CUDADriverError.

        Then it looks ``patience`` times, some nanoseconds each, whether the others are done.
        """
        assert piece.shares[1] == self._share_bytes
        status = transfers.send_regions(
            transfers.driver, piece.shares, self._regions, self._counts, stream, self._after, self._arrived, patience
        )
        _check(status)


@dataclass(frozen=True, slots=True)
class Transfers:
    """The compiled loops, and the driver's functions that they call; used by any thread."""

    driver: np.ndarray
    send_regions: Any
    receive_region: Any

    def receive(self, region: Region, piece: Piece, stream: int) -> None:
        """Copy from the device what ``region`` is to hold, behind the work on ``stream``. Raises CUDADriverError."""
        numbers = np.array(region.numbers(), np.int64)
        _check(self.receive_region(self.driver, piece.shares, numbers, stream))


def open_transfers() -> Transfers:
    """Those of the current device; the loops are compiled once, and loaded once by a process."""
    # Imported here: they import Numba, which runs that copy no array of the host do without.
    from ...compiled import entry_point
    from . import native

    what = "copies between host and GPU"
    send, receive = entry_point(native.send, native.SEND, what), entry_point(native.receive, native.RECEIVE, what)
    return Transfers(_driver(native.DRIVER_FUNCTIONS), send, receive)


def _driver(names: tuple[str, ...]) -> np.ndarray:
    """The current context and the addresses of the driver's functions ``names``."""
    context = ctypes.c_void_p()
    _check(_library().cuCtxGetCurrent(ctypes.byref(context)))
    return np.array([context.value, *_addresses(names)], np.int64)


@lru_cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@lru_cache
def _addresses(names: tuple[str, ...]) -> tuple[int | None, ...]:
    return tuple(ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value for name in names)


def _check(status: int) -> None:
    if status:
        raise CUDADriverError(status)
