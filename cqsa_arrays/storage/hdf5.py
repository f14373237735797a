"""HDF5 files as people see them: open("qkv.h5").q is an array on disk that can be sliced and computed from."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError, CqsaError, StorageError, one_line
from ..forks import preload
from ..wording import Choice, Phrase
from .contiguous import ContiguousSource
from .layout import Layout
from .source import TokenSource

if TYPE_CHECKING:
    import h5py

    from .stored import StoredArray

Locking = bool | str | None
"""h5py's ``locking``: True, False, "best-effort" or None for HDF5's own choice. Locks hang on some network disks."""


class DiskArray:
    """An array in an HDF5 file that is read when it is sliced; no file stays open.

    Keys mean what they mean in NumPy. Slices of contiguous data are read-only views of a memory map, without a copy;
    of other data a copy of what is picked is read. It is pickled as the place of its data, some hundred bytes:
    processes that see the same file may be sent it. Reading raises StorageError where the file is gone or has changed
    since it was opened.

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
    def locking(self) -> Locking:
        """How its file is opened."""
        return self._locking

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
        self.stored.check_readable()
        self._check_unchanged()
        from .links import encoded
        from .picking import pick

        with opened(self.stored.path, self._locking) as file:
            return pick(file[encoded(self.stored.name)], key, self.dtype)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[...], dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        how = "memory-mapped" if self.stored.offset is not None else f"read by blocks: {self.stored.not_mapped}"
        how = how if self.stored.unreadable is None else f"not readable: {self.stored.unreadable}"
        return f"<DiskArray {one_line(self.stored.label)} {self.layout}{self.shape} {self.dtype.name}, {one_line(how)}>"

    def __reduce__(self) -> tuple[type[DiskArray], tuple[StoredArray, Locking]]:
        """Where the array is, without its elements: another process opens the file again."""
        return type(self), (self.stored, self._locking)

    def in_layout(self, layout: Layout) -> DiskArray:
        """The same array, with its axes taken as ``layout``."""
        return DiskArray(replace(self.stored, layout=layout), self._locking)

    def source(self) -> TokenSource:
        """The engine's view of this array; close it after use. Raises StorageError if the file has changed."""
        self.stored.check_readable()
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
            try:
                self._map = np.memmap(self.stored.path, self.dtype, "r", self.stored.offset, self.shape)
            except OSError as error:
                raise StorageError(f"{self.stored.label}: cannot be mapped: {error.strerror}.") from error
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

    A colon may be part of either: the longest part before one that is a file counts.

    >>> split_reference("missing.h5:/q")
    ('missing.h5', '/q')
    """
    if os.path.isfile(reference):
        return reference, None
    colons = [i for i, letter in enumerate(reference) if letter == ":"]
    for i in reversed(colons):
        if os.path.isfile(reference[:i]):
            return reference[:i], reference[i + 1 :]
    path, colon, name = reference.rpartition(":")
    return (path, name) if colon else (reference, None)


def check_locking(locking: object, argument: str = "locking") -> None:
    """Raise ArgumentError for what h5py does not take."""
    if not (locking is None or isinstance(locking, bool) or locking == "best-effort"):
        remedy = "False opens files on disks that have no locks."
        raise ArgumentError(argument, repr(locking), "True, False, 'best-effort' or None", remedy)


@contextmanager
def opened(path: str, locking: Locking) -> Iterator[h5py.File]:
    """The file at ``path``, open for reading in h5py; what h5py says of a file that it cannot open becomes ours."""
    for name in ("links", "slabs", "stored", "chunked"):
        preload(f"cqsa_arrays.storage.{name}")
    from .slabs import open_for_reading

    check_locking(locking)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # no path at all: with a null character or half a letter in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(f"{path}: {reason}. Check the path.") from error
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise StorageError(f"{path} is {what}; expected an HDF5 file. Name the file itself.")
    try:
        file = open_for_reading(path, locking)
    except OSError as error:
        raise StorageError(why_not_opened(path, str(error))) from error
    try:
        with file:
            yield file
    except CqsaError:
        raise
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error


def why_not_opened(path: str, said: str) -> str | Phrase:
    """What HDF5 ``said`` of a file that it does not open, and what to do."""
    if "truncated file" in said:
        return f"{path} is truncated: copy or write it again ({said})"
    if "signature not found" in said:
        return f"{path} is not an HDF5 file; expected one with the data sets /q, /k and /v ({said})"
    if "unable to lock" in said or "file locking" in said:
        return Phrase.of(
            f"{path} cannot be locked ({said}). Another program may be writing it: wait for that. If none is, or its"
            " disk has no locks, open it without one: ", Choice("locking", False, rare=True), ", or the variable"
            " HDF5_USE_FILE_LOCKING=FALSE",
        )  # fmt: skip
    if "already open for write" in said:
        return (
            f"{path} is marked as being written. Wait for the program that writes it; if that was killed, remove the"
            f" mark with HDF5's own tool: h5clear -s {path} ({said})"
        )
    return f"{path} cannot be opened: {said}"
