"""Which keys a query sees, as one key interval per query row.

A mask is a function from a row to the half-open key interval that it sees, so that a whole rectangle of the score
matrix is known to be full, empty or partial from four numbers and no array over all rows is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .ranges import Range

# Larger than any row or key index, small enough that adding a row to it stays inside 64 bits.
UNBOUNDED_DIAGONAL = 1 << 62


class Mask(Protocol):
    """What the cover, the planner and the kernels ask of a mask."""

    @property
    def diagonal(self) -> int:
        """Row r sees the keys ``j <= r + diagonal``."""

    def keys_of(self, row: int, key_tokens: int) -> Range:
        """The keys that ``row`` sees."""

    def live(self, queries: Range, keys: Range) -> bool:
        """Whether any row of ``queries`` sees any key of ``keys``."""

    def pairs(self, queries: Range, keys: Range) -> int:
        """How many (row, key) pairs of the rectangle are visible."""


@dataclass(frozen=True, slots=True)
class Full:
    """Every query sees every key."""

    @property
    def diagonal(self) -> int:
        return UNBOUNDED_DIAGONAL

    def keys_of(self, row: int, key_tokens: int) -> Range:
        return Range(0, key_tokens)

    def live(self, queries: Range, keys: Range) -> bool:
        return len(queries) > 0 and len(keys) > 0

    def pairs(self, queries: Range, keys: Range) -> int:
        return len(queries) * len(keys)


@dataclass(frozen=True, slots=True)
class Causal:
    """Query i sees the keys ``j <= i + offset``.

    Offset 0 aligns the diagonal to the top left corner; ``offset = Nk - Nq`` aligns it to the bottom right one, which
    is what a decoder wants that continues a sequence. Rows that see no key end as output 0 and log-sum-exp -inf.
    """

    offset: int = 0

    @property
    def diagonal(self) -> int:
        return self.offset

    def keys_of(self, row: int, key_tokens: int) -> Range:
        return Range(0, min(max(row + self.offset + 1, 0), key_tokens))

    def live(self, queries: Range, keys: Range) -> bool:
        return len(queries) > 0 and len(keys) > 0 and keys.start <= queries.stop - 1 + self.offset

    def pairs(self, queries: Range, keys: Range) -> int:
        # Row r sees clip(r + offset + 1 - keys.start, 0, len(keys)) keys: an arithmetic series, then a plateau.
        first = self.offset + 1 - keys.start
        rising = queries & Range(1 - first, len(keys) - first)
        below = max(0, queries.stop - max(queries.start, len(keys) - first)) * len(keys)
        return below + (rising.start + rising.stop - 1 + 2 * first) * len(rising) // 2
