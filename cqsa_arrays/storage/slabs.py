"""Reading through HDF5 in bounded memory: caches of a known size, and no read that touches many chunks at once.

Imported only when an HDF5 file is at hand: this module imports h5py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import h5py
import numpy as np
from h5py import h5s

METADATA_CACHE_BYTES = 96 << 10
"""The most that HDF5 keeps of a file's structure, as it is stored; by itself it keeps up to 32 MiB. In memory that is
8.3 times as large, measured: each key of the index of chunks has room for 32 axes."""

INDEX_ENTRY_BYTES = 560
"""The most that HDF5 keeps in memory of one chunk's place in the index, where nodes of it are half full."""

CHUNKS_AT_ONCE = 64
"""The most chunks that one read touches. Reads of 16 and of 1024 take a third longer for each chunk, of 10^5 five times
as long."""

CHUNK_BYTES = 7 << 10
"""What HDF5 allocates for each of those: its selections in the chunk and in memory; 5.8 to 6.5 KiB were measured."""


def open_for_reading(path: str, locking: bool | str | None) -> h5py.File:
    """The file at ``path``, open in h5py, with a small cache of its structure and none of chunks.

    The chunk cache takes its memory from the C heap and leaves that full of holes: 20 MiB in a budget of 15.
    """
    file = h5py.File(path, "r", rdcc_nbytes=0, locking=locking)
    config = file.id.get_mdc_config()
    config.set_initial_size = True
    config.initial_size = config.min_size = config.max_size = METADATA_CACHE_BYTES
    file.id.set_mdc_config(config)
    return file


def read_slab(
    dataset: h5py.Dataset, start: Sequence[int], out: np.ndarray, *, step: Sequence[int] | None = None
) -> None:
    """Fill C-contiguous ``out`` with the elements of ``dataset`` from ``start`` on, every ``step``-th of each axis.

    The stored bits are copied, as the type of ``dataset``; ``out`` has an axis for each of its axes. Raises OSError as
    HDF5 does.
    """
    step = (1,) * len(start) if step is None else tuple(step)
    stored, memory, memory_type = dataset.id.get_space(), h5s.create_simple(out.shape), dataset.id.get_type()
    for piece in itertools.product(*_pieces(dataset.chunks, start, out.shape, step)):
        count = tuple(len(one) for one in piece)
        first = tuple(s + one.start * by for s, one, by in zip(start, piece, step, strict=True))
        stored.select_hyperslab(first, count, step)
        memory.select_hyperslab(tuple(one.start for one in piece), count)
        dataset.id.read(memory, stored, out, memory_type)


def _pieces(
    chunks: Sequence[int] | None, start: Sequence[int], count: Sequence[int], step: Sequence[int]
) -> list[list[range]]:
    """For each axis the cuts of its ``count`` indices; a product of one cut of each touches CHUNKS_AT_ONCE at most.

    >>> _pieces((1, 64), (5, 0), (100, 64), (1, 1))
    [[range(0, 59), range(59, 100)], [range(0, 64)]]
    """
    if chunks is None or 0 in count:
        return [[range(0, n)] for n in count]
    found, left = [], CHUNKS_AT_ONCE
    for size, first, n, by in reversed(list(zip(chunks, start, count, step, strict=True))):
        cell = max(size, by)  # has one chunk of those that are read, or one element
        cells = min((first + (n - 1) * by) // cell - first // cell + 1, left)
        wide = cells * cell
        borders = range(first // wide * wide, first + (n - 1) * by + 1, wide)
        cuts = [max(0, -((first - border) // by)) for border in borders] + [n]
        found.append([range(a, b) for a, b in itertools.pairwise(cuts) if a < b])
        left //= cells
    return found[::-1]
