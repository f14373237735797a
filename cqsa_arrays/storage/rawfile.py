"""Positioned reads and writes on one open file, completed where the system does less than it was asked."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Self

import numpy as np

from ..buffers import allocate
from ..errors import StorageError
from .dtypes import PIECE_BYTES

AHEAD_BYTES, SCRAP_BYTES = 4 << 20, 64 << 10
"""What is read ahead by one call, and the memory for it: over and over the same, small enough for a core's cache."""

WRITE_BACK_BYTES = 256 << 10
CHECK_BYTES = 64 << 10
"""What a checksum reads at a time: no more than a thread's own memory, which plans count."""


class RawFile:
    """An open file without any HDF5 in the way: thread safe, no shared file position where the system allows.

    ``label`` names the file and data set in errors.
    """

    def __init__(self, path: str, label: str, *, write: bool = False) -> None:
        flags = (os.O_RDWR if write else os.O_RDONLY) | getattr(os, "O_BINARY", 0)
        try:
            self._own(os.open(path, flags), label)
        except OSError as error:
            raise StorageError(f"{label}: cannot open {path}: {error.strerror}") from error

    @classmethod
    def of_descriptor(cls, descriptor: int, label: str) -> Self:
        """A file that is open already, and is closed by ``close``."""
        made = cls.__new__(cls)
        made._own(descriptor, label)
        return made

    def _own(self, descriptor: int, label: str) -> None:
        self._fd, self._closed, self.label = descriptor, False, label
        self._lock = threading.Lock()  # of the file position, for systems that cannot do without
        # Each thread counts for itself: a lock that another thread holds stays locked in the child of a fork.
        self._read_by: dict[int, int] = {}

    @property
    def bytes_read(self) -> int:
        """What all threads have read."""
        return sum(list(self._read_by.values()))

    @property
    def descriptor(self) -> int:
        """For what this class does not do."""
        return self._fd

    def read_into(self, array: np.ndarray, position: int) -> None:
        """Fill C-contiguous ``array`` with the bytes from ``position`` on.

        Raises StorageError where the file ends before, or the disk fails.
        """
        target = _bytes_of(array)
        done = 0
        while done < len(target):
            try:
                count = self._read_some(target[done:], position + done)
            except OSError as error:
                raise StorageError(f"{self.label}: reading at byte {position + done}: {error.strerror}") from error
            if count == 0:
                size = os.fstat(self._fd).st_size
                raise StorageError(
                    f"{self.label}: the file ends at byte {size}, but {len(target)} bytes were expected at byte"
                    f" {position}. It is truncated: copy or write it again."
                )
            done += count
        thread = threading.get_ident()
        self._read_by[thread] = self._read_by.get(thread, 0) + done

    def checksum(self, position: int, size_bytes: int, start: int = 0) -> int:
        """CRC-32 of what the file holds there, continuing ``start``; by any thread."""
        piece = allocate(CHECK_BYTES, "u1")
        for offset in range(0, size_bytes, CHECK_BYTES):
            part = piece[: min(CHECK_BYTES, size_bytes - offset)]
            self.read_into(part, position + offset)
            start = zlib.crc32(part.data, start)
        return start

    def write_from(self, array: np.ndarray, position: int) -> None:
        """Write C-contiguous ``array`` at ``position``. Raises StorageError where the disk is full or fails."""
        source = _bytes_of(array)
        done = 0
        while done < len(source):
            try:
                done += self._write_some(source[done:], position + done)
            except OSError as error:
                raise StorageError(f"{self.label}: writing at byte {position + done}: {error.strerror}") from error
        self._begin_writing_back(position, done)

    def write_apart(self, vectors: np.ndarray, position: int, stride: int) -> None:
        """Write each of ``vectors`` at ``position``, and from one to the next ``stride`` bytes on; raises as above."""
        for number, vector in enumerate(vectors):
            self.write_from(vector, position + number * stride)

    def read_ahead(self, spans: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Have the bytes ``start <= p < stop`` of each span in the page cache, some at each turn; maps nothing.

        They are read and dropped. Advice (POSIX_FADV_WILLNEED) returns at once, and hundreds of megabytes of it then
        stand before whatever others read and write next, in an order of the disk's own.
        """
        if not hasattr(os, "preadv"):
            return
        scrap = memoryview(bytearray(SCRAP_BYTES))
        with suppress(OSError):  # the read itself will say what is wrong
            for start, stop in spans:
                for position in range(start, stop, AHEAD_BYTES):
                    pieces, rest = divmod(min(AHEAD_BYTES, stop - position), SCRAP_BYTES)
                    os.preadv(self._fd, [scrap] * pieces + [scrap[:rest]], position)
                    yield

    def _begin_writing_back(self, position: int, size_bytes: int) -> None:
        """Have large writes put on the disk from now on: else all of a result waits in memory until ``sync``.

        Linux does so when it is told that the pages are not needed; those that are still dirty stay.
        """
        if size_bytes >= WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice that a file system may refuse
                os.posix_fadvise(self._fd, position, size_bytes, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise StorageError(f"{self.label}: writing to disk: {error.strerror}") from error

    def is_at(self, path: str) -> bool:
        """Whether ``path`` still names this very file."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    @property
    def has_a_name(self) -> bool:
        """Whether the file has any name, as far as the system says."""
        try:
            return os.fstat(self._fd).st_nlink > 0
        except OSError:  # it is gone, says the server of a network file system
            return False

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def _read_some(self, target: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [target], position)
        with self._lock:
            os.lseek(self._fd, position, os.SEEK_SET)
            data = os.read(self._fd, min(len(target), PIECE_BYTES))
        target[: len(data)] = data
        return len(data)

    def _write_some(self, source: memoryview, position: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, source, position)
        with self._lock:
            os.lseek(self._fd, position, os.SEEK_SET)
            return os.write(self._fd, source)


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of C-contiguous ``array`` of any element type."""
    return array.reshape(-1).view(np.uint8).data


def coalesce(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order of position, with adjacent and overlapping ones joined.

    >>> coalesce([(8, 12), (0, 4), (4, 8), (20, 24)])
    [(0, 12), (20, 24)]
    """
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined
