"""Where the token rows of a contiguous array lie in its file: the pure half of positioned reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..ranges import Range
from .dtypes import piece_rows
from .layout import Shape4


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one batch entry (and one head, where heads lie outside tokens).

    ``position`` is the first row's byte in the file, ``pick`` the heads wanted of each row, and ``batch`` and
    ``heads`` say where they belong in the (batch, heads, tokens, head_dim) block that is read or written.
    """

    position: int
    batch: int
    heads: slice
    pick: slice

    def of(self, block: np.ndarray) -> np.ndarray:
        """The part of logical ``block`` that this run carries, as (tokens, heads, head_dim) like the file."""
        return block[self.batch, self.heads].swapaxes(0, 1)


@dataclass(frozen=True, slots=True)
class Rows:
    """A contiguous array in a file: logical ``shape``, ``dtype``, byte ``offset``, tokens outside heads or inside.

    A row is what lies between two consecutive tokens: one head's vector, or with ``token_major`` those of all heads.

    >>> Rows((1, 4, 100, 64), np.dtype("f4"), 2048, token_major=True).row_bytes
    1024
    """

    shape: Shape4
    dtype: np.dtype
    offset: int
    token_major: bool

    @property
    def row_shape(self) -> tuple[int, int]:
        """(heads, head_dim) of one row."""
        return (self.shape[1] if self.token_major else 1), self.shape[3]

    @property
    def row_bytes(self) -> int:
        heads, head_dim = self.row_shape
        return heads * head_dim * self.dtype.itemsize

    @property
    def piece_tokens(self) -> int:
        """How many tokens are converted at a time: those of 1 MiB of rows, at least one."""
        return min(self.shape[2], piece_rows(self.row_bytes))

    @property
    def place(self) -> Range:
        """The bytes of the file that the array has."""
        count = self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3]
        return Range(self.offset, self.offset + count * self.dtype.itemsize)

    def runs(self, batch: Range, heads: Range, tokens: Range) -> Iterator[Run]:
        """The runs that hold these tokens, in the order of the file."""
        _, all_heads, all_tokens, _ = self.shape
        for b in range(batch.start, batch.stop):
            if self.token_major:
                row = b * all_tokens + tokens.start
                position = self.offset + row * self.row_bytes
                yield Run(position, b - batch.start, slice(0, len(heads)), heads.slice)
                continue
            for h in range(heads.start, heads.stop):
                row = (b * all_heads + h) * all_tokens + tokens.start
                into = slice(h - heads.start, h - heads.start + 1)
                yield Run(self.offset + row * self.row_bytes, b - batch.start, into, slice(0, 1))

    def spans(self, batch: Range, heads: Range, tokens: Range) -> Iterator[tuple[int, int]]:
        """First and past-the-last byte of each run."""
        size = len(tokens) * self.row_bytes
        return ((run.position, run.position + size) for run in self.runs(batch, heads, tokens))

    def is_whole_row(self, run: Run) -> bool:
        """Whether ``run`` wants every head of its rows, so that its bytes have no gaps."""
        return run.pick == slice(0, self.row_shape[0])
