"""Outputs: results are written in place in a file that is whole from the start and gets its name at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from ..ranges import Range
from .dtypes import copy_elements, element_dtype
from .layout import Layout, Shape4
from .partfile import PartFile, check_target
from .rawfile import RawFile
from .rows import Rows

if TYPE_CHECKING:
    from .create import NewDataset


class Sink(Protocol):
    """Where results go: blocks of output rows and of their log-sum-exp, each written once, in any order."""

    @property
    def staging_bytes(self) -> int:
        """The most bytes that one write holds besides its block."""

    def write_out(self, batch: Range, heads: Range, tokens: Range, block: np.ndarray) -> None:
        """Store ``block``, (batch, heads, tokens, head_dim), narrowed to the type of the output."""

    def write_lse(self, batch: Range, heads: Range, tokens: Range, block: np.ndarray) -> None:
        """Store ``block``, (batch, heads, tokens): natural logarithms."""

    def sync(self) -> None:
        """Return once everything written so far would survive a loss of power."""

    def finish(self) -> None:
        """Everything is written: make it the result."""

    def abandon(self) -> None:
        """Leave no trace."""


class Writer(Protocol):
    """What writes to the file of an output."""

    def write_from(self, array: np.ndarray, position: int) -> None:
        """Write C-contiguous ``array`` at ``position``; raises StorageError."""

    def write_apart(self, vectors: np.ndarray, position: int, stride: int) -> None:
        """Write each of the C-contiguous ``vectors`` at ``position``, and from one to the next ``stride`` bytes on."""


class ArraySink:
    """A Sink over NumPy arrays: ``out`` in ``layout``, and ``lse`` (or None) with the axes ``layout.lse_name``."""

    def __init__(self, out: np.ndarray, lse: np.ndarray | None, layout: Layout) -> None:
        self.out = layout.logical(out)
        self._lse = None if lse is None else np.expand_dims(lse, tuple(range(3 - lse.ndim)))

    @property
    def staging_bytes(self) -> int:
        return 0

    def write_out(self, batch: Range, heads: Range, tokens: Range, block: np.ndarray) -> None:
        copy_elements(self.out[batch.slice, heads.slice, tokens.slice], block)

    def write_lse(self, batch: Range, heads: Range, tokens: Range, block: np.ndarray) -> None:
        if self._lse is not None:
            copy_elements(self._lse[batch.slice, heads.slice, tokens.slice], block)

    def sync(self) -> None:
        """Nothing to do: memory does not outlast the process."""

    def finish(self) -> None:
        """Nothing to do: the arrays are the result."""

    def abandon(self) -> None:
        """Nothing to do: the caller drops the arrays."""


class OutputFile:
    """A Sink over an HDF5 file with the contiguous data sets /out and, if wanted, /lse.

    It is allocated whole as ``path + ".part"``; blocks are written into it by position, the HDF5 structure is never
    touched again, and ``finish`` gives it its name: an unfinished file never looks finished. As a context manager it
    abandons the file unless it was finished.

    >>> with OutputFile.create(                                       # doctest: +SKIP
    ...     "out.h5", shape=(1, 8, 4096, 64), dtype=np.dtype("f2"), layout=Layout("bhnd"), lse_dtype=np.dtype("f4"),
    ...     attributes={"plan": {...}},
    ... ) as sink:
    ...     sink.write_out(Range(0, 1), Range(0, 8), Range(0, 128), block)
    ...     sink.finish()
    """

    def __init__(self, part: PartFile, out: Rows, lse: Rows | None, writer: Writer | None = None) -> None:
        self._part, self._out, self._lse = part, out, lse
        self._writer: Writer = part.file if writer is None else writer

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        shape: Shape4,
        dtype: np.dtype,
        layout: Layout,
        lse_dtype: np.dtype | None,
        attributes: Mapping[str, object],
        overwrite: bool = False,
        inputs: Sequence[str] = (),
        part: str | None = None,
    ) -> Self:
        """Allocate the whole output of logical ``shape`` in ``layout``, /lse with the axes ``layout.lse_name``.

        ``attributes`` go to the file's root, nested ones as JSON text. ``inputs`` are paths that must not be written
        to. An existing file stays as it is until ``finish``, and is refused without ``overwrite``. Raises ArgumentError
        for a path that cannot be an output, or of which a job is unfinished unless this is of that job, whose name for
        the unfinished file is ``part``; StorageError where there is no room: then nothing is left behind.
        """
        check_target(path := os.fspath(path), inputs, overwrite=overwrite, of_job=part is not None)
        element_dtype(dtype, "dtype")
        new = _datasets(shape, dtype, layout, lse_dtype)
        made = PartFile.create(path, new, attributes=attributes, links={}, overwrite=overwrite, part=part)
        return cls._over(made, shape, dtype, layout, lse_dtype)

    @classmethod
    def reopen(
        cls,
        path: str,
        *,
        shape: Shape4,
        dtype: np.dtype,
        layout: Layout,
        lse_dtype: np.dtype | None,
        marks: Mapping[str, object],
        part: str,
        write: bool = True,
    ) -> Self:
        """The unfinished file ``part`` that ``create`` made of the same elsewhere, told by the attributes ``marks``."""
        found = PartFile.reopen(path, _datasets(shape, dtype, layout, lse_dtype), marks, part, write=write)
        return cls._over(found, shape, dtype, layout, lse_dtype)

    def through(self, writer: Writer) -> Self:
        """The same file, with ``writer`` for all that is written."""
        return type(self)(self._part, self._out, self._lse, writer)

    @property
    def file(self) -> RawFile:
        return self._part.file

    @property
    def data_sets(self) -> tuple[Rows, ...]:
        """Where /out has its rows, and /lse, if it is there."""
        return (self._out,) if self._lse is None else (self._out, self._lse)

    @property
    def place(self) -> Range:
        """The bytes from the first element of any data set to the last one."""
        places = [rows.place for rows in self.data_sets]
        return Range(min(place.start for place in places), max(place.stop for place in places))

    @classmethod
    def _over(cls, part: PartFile, shape: Shape4, dtype: np.dtype, layout: Layout, lse_dtype: np.dtype | None) -> Self:
        token_major = layout.tokens_outside_heads and shape[1] > 1
        out = Rows(shape, dtype, part.offsets[0], token_major)
        lse = None if lse_dtype is None else Rows((*shape[:3], 1), lse_dtype, part.offsets[1], token_major=False)
        return cls(part, out, lse)

    @property
    def staging_bytes(self) -> int:
        return self._out.piece_tokens * self._out.row_bytes

    def write_out(self, batch: Range, heads: Range, tokens: Range, block: np.ndarray) -> None:
        write_rows(self._writer, self._out, (batch, heads, tokens), block)

    def write_lse(self, batch: Range, heads: Range, tokens: Range, block: np.ndarray) -> None:
        if self._lse is not None:
            write_rows(self._writer, self._lse, (batch, heads, tokens), block[..., None])

    def keep(self) -> None:
        """Close the unfinished file, for another run to go on with; after ``finish`` this does nothing."""
        self._part.keep()

    def sync(self) -> None:
        self._part.file.sync()

    def finish(self) -> None:
        """Put everything on the disk and give the file its name; raises as PartFile.finish does."""
        self._part.finish()

    def abandon(self) -> None:
        """Close and remove the unfinished file; after ``finish`` this does nothing."""
        self._part.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abandon()


def _datasets(shape: Shape4, dtype: np.dtype, layout: Layout, lse_dtype: np.dtype | None) -> list[NewDataset]:
    """What the file holds."""
    from .create import NewDataset

    new = [NewDataset("/out", layout.physical_shape(shape), dtype, {"layout": layout.name})]
    if lse_dtype is not None:
        new.append(NewDataset("/lse", layout.lse_shape(shape), lse_dtype, {"layout": layout.lse_name}))
    return new


def output_staging_bytes(shape: Shape4, dtype: np.dtype, layout: Layout) -> int:
    """``staging_bytes`` of the OutputFile that ``create`` would make of these."""
    rows = Rows(shape, dtype, 0, layout.tokens_outside_heads and shape[1] > 1)
    return rows.piece_tokens * rows.row_bytes


def write_rows(file: Writer, rows: Rows, where: tuple[Range, Range, Range], block: np.ndarray) -> None:
    """Write logical ``block`` to ``rows`` of ``file`` at ``where`` (batch, heads, tokens), narrowed piece by piece.

    Bytes that lie together in memory, in the stored type, are written from where they are. Where ``block`` lacks heads
    of a token-major row, each token is a write of its own, for the bytes between belong to others.
    """
    for run in rows.runs(*where):
        source = run.of(block)
        gapless = rows.is_whole_row(run)
        if gapless and source.dtype == rows.dtype and source.flags.c_contiguous:
            file.write_from(source, run.position)
            continue
        for piece in Range(0, len(source)).split(rows.piece_tokens):
            stored = np.empty(source[piece.slice].shape, rows.dtype)
            copy_elements(stored, source[piece.slice])
            position = run.position + piece.start * rows.row_bytes
            if gapless:
                file.write_from(stored, position)
                continue
            file.write_apart(stored, position + run.pick.start * stored[0, 0].nbytes, rows.row_bytes)
