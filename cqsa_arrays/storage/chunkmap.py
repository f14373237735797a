"""Where the stored chunks of a data set lie in its file, for reading ahead: a table of bounded size, made by one pass.

HDF5 answers the question for one chunk by going through all of them (30 ms of 100,000, and h5py's lock is held
meanwhile), so that it is asked once for all. Imported only when an HDF5 file is at hand: this module imports h5py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import h5py
import numpy as np

MOST_CHUNKS = 1 << 18
"""More are not read ahead: to ask for their places holds h5py's lock for a second."""

LEAST_CHUNK_BYTES = 1024
"""Smaller ones are not, either: HDF5 takes longer to find one than to read it, and the system reads ahead by itself."""

MOST_EXTENTS = 4096
"""Where there are more chunks, neighbours in the array share an extent of the file."""

SPARSE = 4
"""An extent is left out where it is more than this many times as long as its chunks together. Where tokens of three
data sets were appended in turn, it is three times as long."""


class ChunkMap:
    """The extents of the file that hold the chunks of ``dataset``, each of so many consecutive ones."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._chunks = dataset.chunks
        self._grid = tuple(-(-n // size) for n, size in zip(dataset.shape, self._chunks, strict=True))
        self._together = -(-math.prod(self._grid) // MOST_EXTENTS)
        count = -(-math.prod(self._grid) // self._together)
        start, stop, held = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64), np.zeros(count, np.int64)

        def note(chunk: h5py.h5d.StoreInfo) -> None:
            extent = self._extent([n // size for n, size in zip(chunk.chunk_offset, self._chunks, strict=True)])
            if extent >= count:  # of a damaged file: the read will say so
                return
            start[extent] = min(start[extent], chunk.byte_offset)
            stop[extent] = max(stop[extent], chunk.byte_offset + chunk.size)
            held[extent] += chunk.size

        dataset.id.chunk_iter(note)
        self._start, self._stop = start, np.where(stop - start <= SPARSE * held, stop, start)

    def extents(self, cells: Iterable[Iterable[int]]) -> set[int]:
        """The extents of the chunks at ``cells``, by their places on every axis; not of chunks never written."""
        return {extent for extent in map(self._extent, cells) if self._start[extent] < self._stop[extent]}

    def span(self, extent: int) -> tuple[int, int]:
        """First and past-the-last byte of an extent."""
        return int(self._start[extent]), int(self._stop[extent])

    def _extent(self, cell: Iterable[int]) -> int:
        number = 0
        for place, length in zip(cell, self._grid, strict=True):
            number = number * length + place
        return number // self._together


def chunk_count(dataset: h5py.Dataset) -> int:
    """How many chunks the shape of ``dataset`` has, written or not."""
    return math.prod(-(-n // size) for n, size in zip(dataset.shape, dataset.chunks, strict=True))


def chunk_map(dataset: h5py.Dataset) -> ChunkMap | None:
    """The map of ``dataset``; None where reading ahead is of no use or would take too long to prepare."""
    if not dataset.chunks or not hasattr(dataset.id, "chunk_iter"):  # which older HDF5 do not have
        return None
    size_bytes = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
    return ChunkMap(dataset) if chunk_count(dataset) <= MOST_CHUNKS and size_bytes >= LEAST_CHUNK_BYTES else None
