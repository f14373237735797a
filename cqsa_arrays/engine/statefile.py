"""Partial states in a file: two slots for each query chunk, so that what was committed is never written over."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..errors import START_OVER, StorageError
from ..ranges import Range
from ..storage import RawFile


@dataclass(frozen=True, slots=True)
class Version:
    """Where a state is: its slot, its bytes and their CRC-32, and how many of the chunk's rows hold something."""

    slot: int
    size_bytes: int
    rows: int
    checksum: int = 0


COPY_BYTES = 1 << 20

# A state is of one group of heads (its number) and one query chunk (its first row).
Versions = Mapping[tuple[int, int], Version]


# Gives the first row that the state of a group and a query chunk has in a slot.
Places = Callable[[int, int], int]


def by_rows(group: int, start: int) -> int:
    """Every query chunk of one group has a place of its own, which the next group takes over."""
    return start


class StateFile:
    """States of query chunks in two slots of ``rows`` rows: of one group of heads after the other, or of all groups.

    ``place`` says where in a slot. A state that was committed stays until the next commit: newer ones go to the other
    slot. ``seal`` takes what was written since and ``committed`` makes it current; in between, by another thread,
    ``checked`` reads it back.
    """

    def __init__(
        self, file: RawFile, rows: int, row_bytes: int, place: Places = by_rows, *, all_groups: bool = False
    ) -> None:
        self._file, self._rows, self._row_bytes = file, rows, row_bytes
        self._place, self._all_groups = place, all_groups
        self._group = 0
        self._committed: dict[tuple[int, int], Version] = {}
        self._written: dict[tuple[int, int], Version] = {}
        self._sealed: dict[tuple[int, int], Version] = {}
        self._slots: dict[int, int] = {}  # by place in the file: which slot is committed
        self._restored: set[tuple[int, int]] = set()  # not read yet
        self._lock, self._settled = threading.Lock(), threading.Event()
        self._settled.set()
        self._failure: BaseException | None = None
        self.moved_bytes = 0

    @property
    def size_bytes(self) -> int:
        """What the file takes of the disk."""
        return 2 * self._rows * self._row_bytes

    def restore(self, versions: Versions) -> None:
        """What a checkpoint says was committed."""
        self._committed = dict(versions)
        self._restored = set(versions)
        self._slots = {self._place(*key): version.slot for key, version in versions.items()}

    def where(self, versions: Versions) -> dict[tuple[int, int], int]:
        """The byte of the file at which each of them begins."""
        return {(group, start): self._position(group, start, v.slot) for (group, start), v in versions.items()}

    def copy_from(self, other: StateFile, versions: Versions) -> None:
        """Take over what another file of the same places holds; StorageError where that is not what was committed."""
        for (group, start), version in versions.items():
            position, checksum = self._position(group, start, version.slot), 0
            for offset in range(0, version.size_bytes, COPY_BYTES):
                piece = np.empty(min(COPY_BYTES, version.size_bytes - offset), np.uint8)
                other._file.read_into(piece, position + offset)
                self._file.write_from(piece, position + offset)
                checksum = zlib.crc32(piece.data, checksum)
            if checksum != version.checksum:
                raise _damaged(other._file.label, start)

    def begin(self, group: int) -> None:
        """Serve the group of that number; states of others are forgotten unless each has its own place."""
        with self._lock:
            self._group = group
            if not self._all_groups:
                self._committed = {key: version for key, version in self._committed.items() if key[0] == group}
                self._written = {key: version for key, version in self._written.items() if key[0] == group}

    def rows_of(self, chunk: Range) -> int:
        """How many rows of the chunk's state hold something; 0 where there is none."""
        version = self._current(chunk)
        return version.rows if version is not None else 0

    def read(self, chunk: Range, flat: np.ndarray) -> None:
        """Fill ``flat`` with the chunk's state. Raises StorageError where it is not what was committed."""
        bytes_of = flat.view(np.uint8)

        def take(offset: int, part: np.ndarray) -> None:
            """It lies where it was read."""

        self.read_through(chunk, flat.nbytes, lambda offset, size: bytes_of[offset : offset + size], take)

    def read_through(
        self,
        chunk: Range,
        size_bytes: int,
        room: Callable[[int, int], np.ndarray],
        take: Callable[[int, np.ndarray], None],
    ) -> None:
        """As ``read``, in pieces: each into ``room(offset, most)``, which may be less, and then given to ``take``."""
        self._raise_failure()
        version = self._current(chunk)
        assert version is not None, "nothing was written"
        if version.size_bytes != size_bytes:
            raise _damaged(self._file.label, chunk.start)
        done = checksum = 0
        check = (self._group, chunk.start) in self._restored
        while done < size_bytes:
            part = room(done, size_bytes - done)
            self._file.read_into(part, self._position(self._group, chunk.start, version.slot) + done)
            checksum = zlib.crc32(part.view(np.uint8).data, checksum) if check else 0
            take(done, part)
            done += part.nbytes
        self.moved_bytes += size_bytes
        if check and checksum != version.checksum:
            raise _damaged(self._file.label, chunk.start)
        self._restored.discard((self._group, chunk.start))

    def write(self, chunk: Range, pieces: Iterable[np.ndarray], rows: int | None = None) -> None:
        """Keep ``pieces``, one after the other, as the chunk's state; the first ``rows`` (None: all) hold something."""
        key = self._group, chunk.start
        if self._place(*key) in {self._place(*sealed) for sealed in self._sealed}:
            self._settled.wait()  # both slots are taken until the commit that is under way is made
        self._raise_failure()
        slot, size_bytes = self._next_slot(key), 0
        for piece in pieces:
            self._file.write_from(piece, self._position(*key, slot) + size_bytes)
            size_bytes += piece.nbytes
        self.moved_bytes += size_bytes
        with self._lock:
            self._written[key] = Version(slot, size_bytes, len(chunk) if rows is None else rows)
        self._restored.discard(key)

    def seal(self) -> tuple[dict[tuple[int, int], Version], dict[tuple[int, int], Version]]:
        """What was written since the last commit and is to be committed now, and what stays of those before.

        ``committed`` must follow. The run goes on meanwhile, and may turn to another group.
        """
        with self._lock:
            self._sealed, self._written = self._written, {}
            self._settled.clear()
            return dict(self._sealed), self._besides(self._sealed)

    def checked(self, versions: Versions) -> dict[tuple[int, int], Version]:
        """``versions`` with their checksums, of what the file gives back."""
        return {
            key: replace(v, checksum=self._file.checksum(self._position(*key, v.slot), v.size_bytes))
            for key, v in versions.items()
        }

    def failed(self, error: BaseException) -> None:
        """The commit that is under way was not made, or nobody knows: no slot is written any more."""
        self._failure = error
        self._settled.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def committed(self, versions: Versions) -> None:
        """``versions`` are committed."""
        with self._lock:
            self._committed = {**self._besides(versions), **versions}
            self._slots.update({self._place(*key): version.slot for key, version in versions.items()})
            self._sealed = {}
        self._settled.set()

    def _besides(self, versions: Versions) -> dict[tuple[int, int], Version]:
        """What is committed of chunks whose places none of ``versions`` has: query tiles have one between them."""
        taken = {self._place(*key) for key in versions}
        return {key: version for key, version in self._committed.items() if self._place(*key) not in taken}

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _current(self, chunk: Range) -> Version | None:
        key = self._group, chunk.start
        return self._written.get(key) or self._sealed.get(key) or self._committed.get(key)

    def _next_slot(self, key: tuple[int, int]) -> int:
        """Never the committed one; without that, the other one than last time."""
        committed = self._slots.get(self._place(*key))
        if committed is not None:
            return 1 - committed
        return 1 - self._written[key].slot if key in self._written else 0

    def _position(self, group: int, start: int, slot: int) -> int:
        return (slot * self._rows + self._place(group, start)) * self._row_bytes


def _damaged(label: str, start: int) -> StorageError:
    return StorageError(
        f"{label}: the state of the rows from {start} on is not what was committed: the file is damaged. ", START_OVER
    )
