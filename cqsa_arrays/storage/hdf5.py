"""HDF5 files as people see them: open("qkv.h5").q is an array on disk that can be sliced and computed from."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError, CqsaError, StorageError
from .contiguous import ContiguousSource
from .dtypes import BFLOAT16
from .layout import Layout
from .source import TokenSource

if TYPE_CHECKING:
    import h5py

    from .stored import StoredArray

Locking = bool | str | None
"""h5py's ``locking``: True, False, "best-effort" or None for HDF5's own choice. Locks hang on some network disks."""


class DiskArray:
    """An array in an HDF5 file that is read when it is sliced; no file stays open.

    Slices of contiguous data are read-only views of a memory map, without a copy; others are read block by block.

    >>> q = open_file("qkv.h5").q                                     # doctest: +SKIP
    >>> q.shape, q.dtype, q[0, 0, :2].shape                           # doctest: +SKIP
    ((1, 8, 4096, 64), dtype('float16'), (2, 64))
    """

    def __init__(self, stored: StoredArray, locking: Locking = None) -> None:
        self.stored = stored
        self._locking = locking
        self._map: np.memmap | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes of ``layout``."""
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        """Element type; bfloat16 is that of ml_dtypes however it is stored."""
        return self.stored.dtype

    @property
    def ndim(self) -> int:
        return len(self.stored.shape)

    @property
    def layout(self) -> Layout:
        """What the axes are."""
        return self.stored.layout

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        if self.stored.offset is not None:
            return self._mapped().view(np.ndarray)[key]
        from .links import encoded

        self._check_unchanged()
        with opened(self.stored.path, self._locking) as file:
            block = np.asarray(file[encoded(self.stored.name)][key])
        return block.view(BFLOAT16) if block.dtype in (np.uint16, np.dtype("V2")) else block.astype(self.dtype)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[...], dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        how = "memory-mapped" if self.stored.offset is not None else f"read by blocks: {self.stored.not_mapped}"
        return f"<DiskArray {self.stored.label} {self.layout}{self.shape} {self.dtype.name}, {how}>"

    def in_layout(self, layout: Layout) -> DiskArray:
        """The same array, with its axes taken as ``layout``."""
        return DiskArray(replace(self.stored, layout=layout), self._locking)

    def source(self) -> TokenSource:
        """The engine's view of this array; close it after use. Raises StorageError if the file has changed."""
        self._check_unchanged()
        if self.stored.offset is not None:
            return ContiguousSource(self.stored)
        from .chunked import open_chunked

        return open_chunked(self.stored, self._locking)

    def _mapped(self) -> np.memmap:
        """The map of the whole data set, made at the first use."""
        if self._map is None:
            self._check_unchanged()
            assert self.stored.offset is not None
            self._map = np.memmap(self.stored.path, self.dtype, "r", self.stored.offset, self.shape)
        return self._map

    def _check_unchanged(self) -> None:
        """Raise StorageError if the file is not what it was when the facts were taken: offsets may have moved."""
        try:
            found = os.stat(self.stored.path)
        except OSError as error:
            raise StorageError(
                f"{self.stored.label}: {error.strerror}. The file is gone since it was opened."
            ) from error
        if (found.st_size, found.st_mtime_ns) != (self.stored.file_size, self.stored.file_mtime_ns):
            raise StorageError(f"{self.stored.label}: the file has changed since it was opened. Open it again.")


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """The three inputs of attention in one file."""

    path: str
    q: DiskArray
    k: DiskArray
    v: DiskArray


def open_file(
    path: str | os.PathLike[str], *, layout: str | None = None, locking: Locking = None, follow_links: bool = False
) -> OpenedFile:
    """The data sets /q, /k and /v of an HDF5 file, with nothing read yet and no file left open.

    External links are followed to files beside this one or below, with ``follow_links`` to any. Raises ArgumentError
    for a path that is no file or lacks one of them, StorageError for a file that cannot be read.
    """
    path = os.fspath(path)
    q, k, v = (
        dataset_in(path, f"/{name}", layout=layout, locking=locking, argument=name, follow_links=follow_links)
        for name in "qkv"
    )
    return OpenedFile(path, q, k, v)


def dataset(
    reference: str,
    *,
    layout: str | None = None,
    locking: Locking = None,
    argument: str = "array",
    follow_links: bool = False,
) -> DiskArray:
    """One data set, named "file.h5:/path". Raises as open_file does, naming ``argument``.

    >>> dataset("model.h5:/layers/0/q")                               # doctest: +SKIP
    """
    path, name = split_reference(reference)
    if name is None:
        remedy = "Name the data set after the file, such as file.h5:/q."
        raise ArgumentError(argument, repr(reference), "an existing file and a data set in it", remedy)
    return dataset_in(path, name, layout=layout, locking=locking, argument=argument, follow_links=follow_links)


def dataset_in(
    path: str,
    name: str,
    *,
    layout: str | None = None,
    locking: Locking = None,
    argument: str = "array",
    follow_links: bool = False,
) -> DiskArray:
    """The data set ``name`` of the file ``path``, whatever characters the path has. Raises as open_file does."""
    passed: list[str] = []
    while True:
        with opened(path, locking) as file:
            from .links import MOST_LINKS, External, check_external, find
            from .stored import inspect

            found = find(file, name, argument)
            if not isinstance(found, External):
                stored = inspect(found, argument, layout)
                return DiskArray(replace(stored, linked_from=tuple(passed)), locking)
        passed.append(os.path.abspath(path))
        if len(passed) > MOST_LINKS:
            raise StorageError(f"{passed[0]} leads through more than {MOST_LINKS} external links: a circle?")
        home = os.path.dirname(os.path.realpath(passed[0]))
        path, name = check_external(found, path, home, follow_links=follow_links), found.name


def split_reference(reference: str) -> tuple[str, str | None]:
    """File and data set of "file.h5:/path"; None for the data set where the text is a file's own name.

    A colon may be part of either: the shortest part before one that is a file counts.

    >>> split_reference("missing.h5:/q")
    ('missing.h5', '/q')
    """
    if os.path.isfile(reference):
        return reference, None
    colons = [i for i, letter in enumerate(reference) if letter == ":"]
    for i in colons:
        if os.path.isfile(reference[:i]):
            return reference[:i], reference[i + 1 :]
    path, colon, name = reference.rpartition(":")
    return (path, name) if colon else (reference, None)


@contextmanager
def opened(path: str, locking: Locking) -> Iterator[h5py.File]:
    """The file at ``path``, open for reading in h5py; what h5py says of a file that it cannot open becomes ours."""
    import h5py

    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # no path at all: with a null character or half a letter in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(f"{path}: {reason}. Check the path.") from error
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise StorageError(f"{path} is {what}; expected an HDF5 file. Name the file itself.")
    try:
        file = h5py.File(path, "r", locking=locking)
    except OSError as error:
        raise StorageError(_reason(path, str(error))) from error
    try:
        with file:
            yield file
    except CqsaError:
        raise
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error


def _reason(path: str, said: str) -> str:
    if "truncated" in said:
        return f"{path} is truncated: copy or write it again ({said})"
    if "signature not found" in said:
        return f"{path} is not an HDF5 file; expected one with the data sets /q, /k and /v ({said})"
    if "lock" in said:
        remedy = "another program may be writing it; if its disk has no locks, pass locking=False"
        return f"{path} cannot be locked: {remedy} ({said})"
    return f"{path} cannot be opened: {said}"
