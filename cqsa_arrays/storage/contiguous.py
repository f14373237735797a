"""Contiguous data in a file, read by position: no HDF5 and no lock in the loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..buffers import allocate
from ..ranges import Range
from .dtypes import check_widening, copy_elements
from .layout import Shape4
from .rawfile import RawFile, coalesce
from .rows import Run
from .source import no_view

if TYPE_CHECKING:
    from .stored import StoredArray


class ContiguousSource:
    """A TokenSource over a ``stored`` array that has an offset.

    Blocks of the stored type whose memory lies as the file does are read straight into place. Others pass through a
    piece of at most 1 MiB (or one row, where that is longer). Where only some heads of a token-major row are wanted,
    the rest is read and dropped, which is faster than one call for each token.
    """

    in_place = False
    held_bytes = touched_bytes = 0

    def __init__(self, stored: StoredArray) -> None:
        self._file = RawFile(stored.path, stored.label)
        self._rows = stored.rows
        self.layout = stored.layout
        self.identity = stored.identity
        self.description = f"{stored.description}, contiguous, positioned reads"

    @property
    def shape(self) -> Shape4:
        return self._rows.shape

    @property
    def dtype(self) -> np.dtype:
        return self._rows.dtype

    @property
    def token_major(self) -> bool:
        return self._rows.token_major

    @property
    def cell(self) -> Shape4:
        heads, head_dim = self._rows.row_shape
        return 1, heads, 1, head_dim

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def staging_bytes(self, compute_dtype: np.dtype) -> int:
        """One piece, whatever the compute type: a block may lie otherwise than the file."""
        return self._rows.piece_tokens * self._rows.row_bytes

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        check_widening(self.dtype, out.dtype, self._file.label)
        stage: np.ndarray | None = None
        for run in self._rows.runs(batch, heads, tokens):
            target = run.of(out)
            if self.dtype == out.dtype and self._rows.is_whole_row(run) and target.flags.c_contiguous:
                self._file.read_into(target, run.position)
                continue
            if stage is None:
                stage = allocate((min(len(tokens), self._rows.piece_tokens), *self._rows.row_shape), self.dtype)
            self._read_through(run, stage, target)

    def _read_through(self, run: Run, stage: np.ndarray, target: np.ndarray) -> None:
        for piece in Range(0, len(target)).split(len(stage)):
            part = stage[: len(piece)]
            self._file.read_into(part, run.position + piece.start * self._rows.row_bytes)
            copy_elements(target[piece.slice], part[:, run.pick])

    def view(self, batch: Range, heads: Range, tokens: Range) -> np.ndarray:
        raise no_view(self)

    def prefetch(self, batch: Range, heads: Range, tokens: Range) -> Iterator[None]:
        return self._file.read_ahead(coalesce(self._rows.spans(batch, heads, tokens)))

    def overlaps(self, array: np.ndarray) -> bool:
        """No array shares memory with a file that is read by position."""
        return False

    def close(self) -> None:
        self._file.close()
