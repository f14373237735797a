"""Token ranges and how a sequence is cut into chunks whose borders are tile borders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """The tokens ``start <= t < stop`` of one sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __and__(self, other: Range) -> Range:
        """The common tokens; an empty range where there are none."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def split(self, size: int) -> list[Range]:
        """Consecutive pieces of at most ``size`` tokens."""
        return [Range(s, min(s + size, self.stop)) for s in range(self.start, self.stop, size)]


@dataclass(frozen=True, slots=True)
class Cut:
    """``tokens`` cut into ``parts`` chunks of whole tiles, handed out as evenly as whole tiles allow.

    Chunks are computed from their index, never listed. With more parts than tiles some chunks are empty.
    """

    tokens: int
    parts: int
    tile: int

    def __getitem__(self, index: int) -> Range:
        if not 0 <= index < self.parts:
            raise IndexError(index)
        tiles = -(-self.tokens // self.tile)
        start, stop = (tiles * i // self.parts * self.tile for i in (index, index + 1))
        return Range(min(start, self.tokens), min(stop, self.tokens))

    def __len__(self) -> int:
        return self.parts

    def index_of(self, chunk: Range) -> int:
        """The index of a chunk that is not empty."""
        tiles = -(-self.tokens // self.tile)
        # Chunk i begins at tile tiles * i // parts; of the chunks that begin at one tile, only the last is not empty.
        return ((chunk.start // self.tile + 1) * self.parts - 1) // tiles

    @property
    def longest(self) -> int:
        """Upper bound on the tokens of any chunk, reached where the tokens are whole tiles."""
        tiles = -(-self.tokens // self.tile)
        return min(self.tokens, -(-tiles // self.parts) * self.tile)
