"""Chunked, compressed and other data that only HDF5 can read, block by block through h5py.

Imported only when such a data set is at hand: this module imports h5py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import h5py
import numpy as np

from ..buffers import allocate
from ..errors import StorageError
from ..ranges import Range
from .chunkmap import ChunkMap, chunk_count, chunk_map
from .dtypes import check_widening, copy_elements, piece_rows
from .hdf5 import why_not_opened
from .layout import Shape4
from .links import damage_named, encoded
from .rawfile import RawFile, coalesce
from .slabs import CHUNK_BYTES, CHUNKS_AT_ONCE, INDEX_ENTRY_BYTES, open_for_reading, read_slab
from .source import no_view
from .stored import StoredArray

# HDF5's cache of the structure of one open file, its free lists, and our map of chunks, as seen in resident memory.
LIBRARY_BYTES = 1 << 20
# The stored chunk, and the inflated one while its buffer of half the size, then of twice its size, is copied.
FILTER_COPIES = 4


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """How a stored array is cut into the boxes that are read at a time, in (batch, heads, tokens, head_dim).

    ``chunk`` is HDF5's chunk; a box is one chunk wide in batch and heads, has all of head_dim, and as many whole chunks
    of tokens as fit in a conversion piece, at least one. So each chunk is decompressed once for each read.
    """

    chunk: Shape4
    box: Shape4
    row_bytes: int

    @property
    def box_bytes(self) -> int:
        return self.box[0] * self.box[1] * self.box[2] * self.row_bytes

    def boxes(self, batch: Range, heads: Range, tokens: Range) -> Iterator[tuple[Range, Range, Range]]:
        """The parts of boxes that hold these tokens."""
        wide, high, long, _ = self.box
        return itertools.product(_aligned(batch, wide), _aligned(heads, high), _aligned(tokens, long))


def chunk_grid(stored: StoredArray) -> ChunkGrid:
    """The grid of ``stored``; data without chunks are read as if cut by rows."""
    b, h, n, d = stored.logical_shape
    row = (1, h if stored.token_major else 1, 1, d)
    chunk = stored.layout.logical_shape(stored.chunks) if stored.chunks else row
    row_bytes = d * stored.dtype.itemsize
    wide, high, long, _ = (min(c, length) for c, length in zip(chunk, (b, h, n, d), strict=True))
    chunks_at_once = piece_rows(wide * high * long * row_bytes)
    return ChunkGrid(chunk, (wide, high, max(1, min(n, long * chunks_at_once)), d), row_bytes)


class ChunkedSource:
    """A TokenSource over an open h5py ``dataset`` with the facts ``stored``; closes its file if ``owns_file``."""

    in_place = False

    def __init__(self, dataset: h5py.Dataset, stored: StoredArray, *, owns_file: bool) -> None:
        self._dataset, self._stored, self._owns_file = dataset, stored, owns_file
        self._grid = chunk_grid(stored)
        self._file = RawFile(stored.path, stored.label) if stored.on_disk else None
        self._map: ChunkMap | None = None
        how = ", ".join((stored.not_mapped or stored.kind, *stored.filters))
        self.description = f"{stored.description}, {how}, block reads through h5py"
        self.layout = stored.layout
        self.identity = stored.identity
        self.bytes_read = 0

    @property
    def shape(self) -> Shape4:
        return self._stored.logical_shape

    @property
    def dtype(self) -> np.dtype:
        return self._stored.dtype

    @property
    def token_major(self) -> bool:
        return self._stored.token_major

    @property
    def cell(self) -> Shape4:
        b, h, n, d = (min(pair) for pair in zip(self._grid.chunk, self.shape, strict=True))
        return b, h, n, d

    @property
    def held_bytes(self) -> int:
        """What HDF5 keeps for itself, and in its larger caches where the caller opened the file."""
        if self._owns_file or not self._stored.chunks:
            return LIBRARY_BYTES
        chunk_cache = self._dataset.id.get_access_plist().get_chunk_cache()[1]
        return chunk_cache + LIBRARY_BYTES + INDEX_ENTRY_BYTES * chunk_count(self._dataset)

    @property
    def touched_bytes(self) -> int:
        """What HDF5 holds for the chunks that one of its reads touches."""
        return CHUNKS_AT_ONCE * CHUNK_BYTES if self._stored.chunks else 0

    def staging_bytes(self, compute_dtype: np.dtype) -> int:
        """One box, and the copies of a chunk that pass through its filters, whose buffers grow by doubling."""
        if not self._stored.chunks:
            return self._grid.box_bytes
        return self._grid.box_bytes + FILTER_COPIES * math.prod(self._stored.chunks) * self.dtype.itemsize

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        check_widening(self.dtype, out.dtype, self._stored.label)
        most = min(self._grid.box_bytes, len(batch) * len(heads) * len(tokens) * self._grid.row_bytes)
        stage = allocate(most // self.dtype.itemsize, self.dtype)
        for b, h, t in self._grid.boxes(batch, heads, tokens):
            where = tuple(slice(r.start - o.start, r.stop - o.start) for r, o in ((b, batch), (h, heads), (t, tokens)))
            copy_elements(out[where], self._read_box(b, h, t, stage))

    def _read_box(self, batch: Range, heads: Range, tokens: Range, stage: np.ndarray) -> np.ndarray:
        """The elements of one box in ``stage``, as a logical view, with their stored bits untouched."""
        layout = self._stored.layout
        start = layout.order((batch.start, heads.start, tokens.start, 0))
        count = layout.order((len(batch), len(heads), len(tokens), self.shape[3]))
        block = stage[: int(np.prod(count))].reshape(count)
        try:
            read_slab(self._dataset, start, block)
        except (OSError, RuntimeError, ValueError) as error:
            if not self._dataset:  # by another thread
                raise StorageError(f"{self._stored.label}: its file was closed while it was read.") from error
            place = f"tokens {tokens.start} to {tokens.stop}"
            raise StorageError(f"{self._stored.label}: {place} cannot be read: {error}") from error
        self.bytes_read += block.nbytes
        return layout.logical(block)

    def view(self, batch: Range, heads: Range, tokens: Range) -> np.ndarray:
        raise no_view(self)

    def prefetch(self, batch: Range, heads: Range, tokens: Range) -> Iterator[None]:
        if self._file is None or not self._dataset:  # closed: the read will say so
            return iter(())
        return self._file.read_ahead(self._spans(batch, heads, tokens))

    def overlaps(self, array: np.ndarray) -> bool:
        """No array shares memory with a file that is read by position."""
        return False

    def close(self) -> None:
        if self._owns_file:
            self._dataset.file.close()
        if self._file is not None:
            self._file.close()

    def _spans(self, batch: Range, heads: Range, tokens: Range) -> Iterator[tuple[int, int]]:
        """Where the stored chunks of these tokens lie in the file, box by box."""
        if self._map is None:
            with damage_named(self._stored.label):
                self._map = chunk_map(self._dataset)
        places, asked = self._map, set[int]()
        if places is None:
            return
        for box in self._grid.boxes(batch, heads, tokens):
            new = places.extents(self._cells(*box)) - asked
            asked |= new
            yield from coalesce(map(places.span, new))

    def _cells(self, batch: Range, heads: Range, tokens: Range) -> Iterator[tuple[int, ...]]:
        """The chunks that hold these tokens, by their places on the axes of the data set."""
        b, h, n, d = (
            range(r.start // size, -(-r.stop // size))
            for r, size in zip((batch, heads, tokens, Range(0, self.shape[3])), self._grid.chunk, strict=True)
        )
        return map(self._stored.layout.order, itertools.product(b, h, n, d))


def open_chunked(stored: StoredArray, locking: bool | str | None) -> ChunkedSource:
    """Open the file of ``stored`` again, for reading block by block."""
    try:
        file = open_for_reading(stored.path, locking)
    except OSError as error:
        raise StorageError(why_not_opened(stored.path, str(error))) from error
    return ChunkedSource(file[encoded(stored.name)], stored, owns_file=True)


def _aligned(wanted: Range, size: int) -> list[Range]:
    """``wanted``, cut at every multiple of ``size``."""
    return [wanted & Range(s, s + size) for s in range(wanted.start // size * size, wanted.stop, size)]
