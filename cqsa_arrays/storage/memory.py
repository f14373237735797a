"""Arrays in memory and memory maps as token sources."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np

from ..errors import ArgumentError
from ..ranges import Range
from .dtypes import check_widening, copy_elements, piece_rows
from .layout import Layout, Shape4
from .overlap import share_elements
from .source import no_view

WINDOW_BYTES = 2 << 20
"""A fault maps the pages around it, too, up to a huge page where the page cache has those: they are let go together."""

ADVICE_BYTES = 128 << 10
"""Linux heeds no more than one read-ahead window (128 KiB by default) of one advice: longer runs go in steps."""


class HostSource:
    """A TokenSource over a NumPy ``array`` in ``layout`` that lies in memory; nothing is ever copied but blocks."""

    held_bytes = touched_bytes = 0

    def __init__(self, array: np.ndarray, layout: Layout, label: str) -> None:
        self.layout = layout
        self._array = layout.logical(array)
        self._label = label
        self.token_major = layout.tokens_outside_heads and self._array.shape[1] > 1
        self.vectors_together = self._array.shape[3] == 1 or self._array.strides[3] == array.itemsize
        self.in_place = array.dtype in (np.float32, np.float64) and self._array.flags.aligned and self.vectors_together
        self.description = f"{label}, in memory, {'used in place' if self.in_place else 'copied block by block'}"
        self.identity: dict[str, object] = {"shape": list(array.shape), "dtype": array.dtype.name}
        self.bytes_read = 0

    @property
    def array(self) -> np.ndarray:
        """All of it, (batch, heads, tokens, head_dim), where it lies."""
        return self._array

    @property
    def shape(self) -> Shape4:
        b, h, n, d = self._array.shape
        return b, h, n, d

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    @property
    def cell(self) -> Shape4:
        return 1, 1, 1, self.shape[3]

    def staging_bytes(self, compute_dtype: np.dtype) -> int:
        """None: NumPy widens straight into the block."""
        return 0

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        check_widening(self.dtype, out.dtype, self._label)
        block = self._array[batch.slice, heads.slice, tokens.slice]
        copy_elements(out, block)
        self.bytes_read += block.nbytes

    def view(self, batch: Range, heads: Range, tokens: Range) -> np.ndarray:
        if not self.in_place:
            raise no_view(self)
        return self._array[batch.slice, heads.slice, tokens.slice]

    def prefetch(self, batch: Range, heads: Range, tokens: Range) -> Iterator[None]:
        """Nothing to do: it is in memory."""
        return iter(())

    def overlaps(self, array: np.ndarray) -> bool:
        return isinstance(array, np.ndarray) and share_elements(self._array, array)

    def close(self) -> None:
        """Nothing to do: the caller owns the array."""


class MemmapSource:
    """A TokenSource over ``array``, a view of any kind of the np.memmap ``owner``.

    Blocks are copied out of the map piece by piece, and the pages that this touched are let go, so that a map far
    larger than memory leaves it alone. Pages of a copy-on-write map (mode "c") are kept: they may hold changes that
    are nowhere else. A file that is cut short while it is mapped ends the process; that is the nature of maps.
    """

    in_place = False
    held_bytes = touched_bytes = 0

    def __init__(self, array: np.ndarray, layout: Layout, label: str, owner: np.memmap) -> None:
        self.layout = layout
        self._array = layout.logical(array)
        if self._array.shape[3] > 1 and self._array.strides[3] != array.itemsize:
            remedy = "Copy it, or name the layout that it has in the file."
            raise ArgumentError(label, "a memory map whose vectors are scattered", "contiguous vectors", remedy)
        self._label = label
        self._pages = _Pages(owner)
        self.token_major = layout.tokens_outside_heads and self._array.shape[1] > 1
        kept = "" if self._pages.shared else ", copy-on-write: its pages stay in memory"
        self.description = f"{label}, memory map, copied block by block{kept}"
        self.identity = _map_identity(array, owner)
        self.bytes_read = 0

    @property
    def shape(self) -> Shape4:
        b, h, n, d = self._array.shape
        return b, h, n, d

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    @property
    def cell(self) -> Shape4:
        return 1, self.shape[1] if self._heads_lie_together else 1, 1, self.shape[3]

    @property
    def _row_bytes(self) -> int:
        """Bytes from one token to the next, or of one token's vectors where those lie apart."""
        _, heads, _, head_dim = self.shape
        together = heads if self._heads_lie_together else 1
        return max(abs(self._array.strides[2]), together * head_dim * self.dtype.itemsize)

    @property
    def _heads_lie_together(self) -> bool:
        """Whether the heads of one token are closer than the next token, whatever the layout is called."""
        _, head_stride, token_stride, _ = self._array.strides
        return abs(head_stride) < abs(token_stride)

    def staging_bytes(self, compute_dtype: np.dtype) -> int:
        """The part of the map that is in memory while one piece is copied: the piece and a window on either side."""
        return min(self.shape[2], piece_rows(self._row_bytes)) * self._row_bytes + 2 * WINDOW_BYTES

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        check_widening(self.dtype, out.dtype, self._label)
        for where, piece in self._pieces(batch, heads, tokens):
            copy_elements(out[where], piece)
            self._pages.let_go(piece)
            self.bytes_read += piece.nbytes

    def view(self, batch: Range, heads: Range, tokens: Range) -> np.ndarray:
        raise no_view(self)

    def prefetch(self, batch: Range, heads: Range, tokens: Range) -> Iterator[None]:
        for _, piece in self._pieces(batch, heads, tokens):
            self._pages.read_ahead(piece)
            yield

    def overlaps(self, array: np.ndarray) -> bool:
        return isinstance(array, np.ndarray) and share_elements(self._array, array)

    def close(self) -> None:
        """Nothing to do: the caller owns the map."""

    def _pieces(
        self, batch: Range, heads: Range, tokens: Range
    ) -> Iterator[tuple[tuple[slice, slice, slice], np.ndarray]]:
        """Pieces that lie together in the map: their place in the block, and the piece itself."""
        block = self._array[batch.slice, heads.slice, tokens.slice]
        for b in Range(0, len(batch)).split(1):
            for h in Range(0, len(heads)).split(len(heads) if self._heads_lie_together else 1):
                for t in Range(0, len(tokens)).split(piece_rows(self._row_bytes)):
                    where = b.slice, h.slice, t.slice
                    yield where, block[where]


class _Pages:
    """The pages of one np.memmap: which of them an array touches, and what the system should do with them."""

    def __init__(self, owner: np.memmap) -> None:
        self._map = _mmap_below(owner)
        self._start = np.frombuffer(self._map, np.uint8).__array_interface__["data"][0]
        self.shared = owner.mode != "c"

    def let_go(self, array: np.ndarray) -> None:
        """Unmap the pages under ``array`` and around it: the page cache keeps them, and changes made through the map.

        Rounding outward costs others no more than another fault.
        """
        if self.shared and hasattr(mmap, "MADV_DONTNEED"):
            start, stop = self._span(array, WINDOW_BYTES)
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def read_ahead(self, array: np.ndarray) -> None:
        """Ask for the pages under ``array``, in steps that the system heeds; none of them is mapped."""
        if hasattr(mmap, "MADV_WILLNEED"):
            start, stop = self._span(array, mmap.PAGESIZE)
            for position in range(start, stop, ADVICE_BYTES):
                self._map.madvise(mmap.MADV_WILLNEED, position, min(ADVICE_BYTES, stop - position))

    def _span(self, array: np.ndarray, unit: int) -> tuple[int, int]:
        """Bytes of the map, from and to, that hold ``array``, rounded outward to whole units of ``unit`` bytes."""
        low, high = np.lib.array_utils.byte_bounds(array)
        first = low // unit * unit
        past = -(-high // unit) * unit
        return max(0, first - self._start), min(len(self._map), past - self._start)


def memmap_below(array: np.ndarray) -> np.memmap | None:
    """The np.memmap whose memory ``array`` shows, or None.

    >>> memmap_below(np.zeros(3)) is None
    True
    """
    below: object = array
    while isinstance(below, np.ndarray):
        if isinstance(below, np.memmap) and isinstance(below.base, mmap.mmap):
            return below
        below = below.base
    return None


def _mmap_below(owner: np.memmap) -> mmap.mmap:
    assert isinstance(owner.base, mmap.mmap)
    return owner.base


def _map_identity(array: np.ndarray, owner: np.memmap) -> dict[str, object]:
    identity: dict[str, object] = {"shape": list(array.shape), "dtype": array.dtype.name}
    if owner.filename is None:
        return identity
    try:
        found = os.stat(owner.filename)
    except OSError:  # the map outlives the name of its file: temporary ones are removed at once
        return identity
    skipped = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    return identity | {
        "path": os.path.abspath(owner.filename),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "offset": owner.offset + skipped,
        "strides": list(array.strides),
    }
