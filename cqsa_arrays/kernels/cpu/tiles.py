"""Register and cache tile sizes of the CPU kernels, one set per vector instruction set and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Keys whose scores are held at once: a multiple of every ``keys`` below; 96 keys or values of head dimension 64 stay in
# a 48 KiB first-level cache beside one panel of queries.
BLOCK_KEYS = 96
# Keys of a block whose weighted values are summed in registers, and keys accumulated from zero before one merge into
# the totals, which are float64: equal terms are all rounded the same way, and the error grows with their number.
PART_KEYS = 32
SPAN_KEYS = 1536
# Added to largest scores where sums of large values were not finite: all weights of a span add up to less than 1.
MARGIN = 8.0
# Elements of a dot product that are summed in one go: longer sums lose digits with the square root of their length.
SEGMENT_DIM = 256
# Query panels that share one pass over a key block: they stay in the second-level cache while keys stream past.
GROUP_BYTES = 768 << 10
GROUP_PANELS = 32
# Panels that share a pass over the keys where there are few rows: one alone takes 20 % longer, two 8 %, so many 2 %.
SHARING_PANELS = 4
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """One register tile: ``keys`` (or value columns) scalars broadcast against ``vectors`` vectors of query rows."""

    name: str
    dtype: str
    lanes: int
    vectors: int
    keys: int

    @property
    def rows(self) -> int:
        """Query rows of one panel."""
        return self.lanes * self.vectors

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def columns(self, value_dim: int) -> int:
        """Value columns of the transposed accumulator, padded to whole register tiles."""
        return -(-value_dim // self.keys) * self.keys

    def scratch_bytes(self, rows: int, head_dim: int, value_dim: int) -> int:
        """Scratch of one thread: the panels of a work item, one block of scores, one block of values."""
        columns = self.columns(value_dim)
        panels = group_panels(self, rows, head_dim, value_dim)
        elements = self.rows * (panels * (head_dim + columns + 3) + 3 + BLOCK_KEYS) + BLOCK_KEYS * columns
        totals = 8 * self.rows * (panels * total_rows(self.itemsize, columns) + 2)
        return elements * self.itemsize + totals + (BLOCK_KEYS + 2) * ALIGNMENT


def total_rows(itemsize: int, columns: int) -> int:
    """Rows of float64 that the totals of a panel take: acc, l, m and the unit of the sums.

    Totals of float64 arithmetic have low parts of acc and l besides.
    """
    return columns + 3 if itemsize < 8 else 2 * columns + 4


# Accumulators + query vectors + one broadcast fill the register file: 32 zmm, 16 ymm, 32 Neon registers.
_TILES = {
    ("avx512", "float32"): Tile("avx512", "float32", lanes=16, vectors=3, keys=8),
    ("avx512", "float64"): Tile("avx512", "float64", lanes=8, vectors=3, keys=8),
    ("avx2", "float32"): Tile("avx2", "float32", lanes=8, vectors=3, keys=4),
    ("avx2", "float64"): Tile("avx2", "float64", lanes=4, vectors=3, keys=4),
    ("neon", "float32"): Tile("neon", "float32", lanes=4, vectors=3, keys=8),
    ("neon", "float64"): Tile("neon", "float64", lanes=2, vectors=3, keys=8),
    ("sse2", "float32"): Tile("sse2", "float32", lanes=4, vectors=2, keys=4),
    ("sse2", "float64"): Tile("sse2", "float64", lanes=2, vectors=2, keys=4),
}


def instruction_set(triple: str, features: str) -> str:
    """The tile family for an LLVM target triple and its comma-separated feature list ("+avx2,-avx512f,...")."""
    enabled = set(features.split(","))
    if triple.startswith(("aarch64", "arm64")):
        return "neon"
    if {"+avx512f", "+fma"} <= enabled:
        return "avx512"
    return "avx2" if {"+avx2", "+fma"} <= enabled else "sse2"


def tile_for(instruction_set: str, dtype: str) -> Tile:
    """The tile of a family ("avx512", "avx2", "neon", "sse2") for "float32" or "float64" arithmetic."""
    return _TILES[instruction_set, dtype]


def group_panels(tile: Tile, rows: int, head_dim: int, value_dim: int) -> int:
    """Panels per work item; depends on the problem alone, so that results do not depend on the number of threads."""
    panel_bytes = tile.rows * (head_dim + tile.columns(value_dim)) * tile.itemsize
    panels = -(-rows // tile.rows)
    return max(1, min(GROUP_PANELS, GROUP_BYTES // panel_bytes, -(-panels // 12)))


def largest_scratch_bytes(dtype: str, rows: int, head_dim: int, value_dim: int) -> int:
    """Scratch of one thread on whichever instruction set needs most, so that planning need not ask the processor."""
    return max(t.scratch_bytes(rows, head_dim, value_dim) for (_, name), t in _TILES.items() if name == dtype)
