"""What an attempt at a lane has written of the output: whole pages by place and checksum, the bytes around them.

Two machines must not write into one page of a file: a client of a network file system may write all of a page that it
holds, with what the neighbours were when it read them. So only whole pages are written in place, which are the same
whoever writes them. The pages on the borders are composed at the end, of the journals of all lanes; see ``pages``.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import StorageError
from ..storage import RawFile
from .records import create_own, damaged

PAGE = 4096
# Place, bytes, distance from one to the next, how many of them follow (0: they are in the output), and a CRC-32.
_ENTRY = struct.Struct("<QQQII")
_BUFFER_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Extent:
    """The first ``size_bytes`` of the journal of ``attempt``, and their CRC-32: as much of it as was committed."""

    attempt: str
    size_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Entry:
    """``count`` times ``size_bytes`` bytes for the output at ``position``, then every ``stride``; from ``offset`` on.

    With a ``count`` of 0 they are whole pages that were written there, and ``checksum`` is theirs.
    """

    position: int
    size_bytes: int
    stride: int
    count: int
    checksum: int
    offset: int


class Journal:
    """The journal of an attempt, which is only appended to. By any thread."""

    def __init__(self, path: str, attempt: str) -> None:
        self.attempt, self._path = attempt, path
        self._file: RawFile | None = None  # made when there is something in it
        self._lock, self._buffer = threading.Lock(), bytearray()
        self._size = self._checksum = 0

    def wrote(self, position: int, pages: memoryview) -> None:
        """``pages`` are in the output at ``position``."""
        self._append(_ENTRY.pack(position, len(pages), 0, 0, zlib.crc32(pages)))

    def keep(self, position: int, parts: np.ndarray, stride: int = 0) -> None:
        """Each row of ``parts``, (count, bytes), belongs at ``position``, and from one to the next ``stride`` after."""
        count, size_bytes = parts.shape
        if parts.size:
            self._append(_ENTRY.pack(position, size_bytes, stride, count, 0), parts.data)

    def _append(self, *pieces: bytes | memoryview) -> None:
        with self._lock:
            for piece in pieces:
                self._buffer += memoryview(piece).cast("B")
            if len(self._buffer) >= _BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        if self._file is None:
            self._file = _make(self._path)
        self._file.write_from(np.frombuffer(self._buffer, np.uint8), self._size)
        self._checksum = zlib.crc32(self._buffer, self._checksum)
        self._size += len(self._buffer)
        self._buffer = bytearray()

    def seal(self) -> Extent:
        """All that was appended until now."""
        with self._lock:
            self._flush()
            return Extent(self.attempt, self._size, self._checksum)

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _make(path: str) -> RawFile:
    try:
        descriptor = create_own(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}. A job keeps its record there.") from error
    return RawFile.of_descriptor(descriptor, path)


class PagedFile:
    """Writes to ``file`` by whole pages, and what lies before and after them to ``journal``."""

    def __init__(self, file: RawFile, journal: Journal) -> None:
        self._file, self._journal = file, journal

    def write_from(self, array: np.ndarray, position: int) -> None:
        """As RawFile does."""
        source = array.reshape(-1).view(np.uint8)
        first, last = -(-position // PAGE) * PAGE, (position + len(source)) // PAGE * PAGE
        if first >= last:
            self._journal.keep(position, source[None])
            return
        pages = source[first - position : last - position]
        self._file.write_from(pages, first)
        self._journal.wrote(first, pages.data)
        self._journal.keep(position, source[None, : first - position])
        self._journal.keep(last, source[None, last - position :])

    def write_apart(self, vectors: np.ndarray, position: int, stride: int) -> None:
        """As RawFile does. No page of these is whole: the bytes between belong to others."""
        self._journal.keep(position, vectors.reshape(len(vectors), -1).view(np.uint8), stride)


def entries(path: str, extent: Extent) -> Iterator[Entry]:
    """What the committed part of a journal says. Raises StorageError where that is not what was committed."""
    checksum = offset = 0
    try:
        with open(path, "rb", buffering=_BUFFER_BYTES) as file:
            while offset < extent.size_bytes:
                header = file.read(_ENTRY.size)
                if len(header) < _ENTRY.size:
                    raise damaged(path, f"it ends at byte {offset}")
                checksum, offset = zlib.crc32(header, checksum), offset + _ENTRY.size
                position, size_bytes, stride, count, of_pages = _ENTRY.unpack(header)
                entry = Entry(position, size_bytes, stride, count, of_pages, offset)
                left = size_bytes * count
                if left > extent.size_bytes - offset:
                    raise damaged(path, f"the entry before byte {offset} is longer than what was committed")
                while left:
                    piece = file.read(min(left, _BUFFER_BYTES))
                    if not piece:
                        raise damaged(path, f"it ends in the entry before byte {offset}")
                    checksum, offset, left = zlib.crc32(piece, checksum), offset + len(piece), left - len(piece)
                yield entry
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: {error.strerror}.") from error
    if checksum != extent.checksum:
        raise damaged(path, "it is not what was committed")
