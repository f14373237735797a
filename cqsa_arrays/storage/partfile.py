"""Files in the making: written as ``path + ".part"``, which gets its name when it is whole and on the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import ArgumentError, StorageError
from .rawfile import RawFile

if TYPE_CHECKING:
    from .create import NewDataset

PART_SUFFIX = ".part"
# The folder beside an output that keeps what a job needs to be resumed.
JOB_SUFFIX = ".job"


class PartFile:
    """An HDF5 file whose structure and space are on the disk already, and whose elements are still to be written.

    ``file`` writes to it by position, ``offsets`` say where each data set's elements begin. As a context manager it
    removes the file unless ``finish`` gave it its name.
    """

    def __init__(self, path: str, offsets: list[int], *, overwrite: bool) -> None:
        self.path, self.part, self.offsets = path, path + PART_SUFFIX, offsets
        self.file = RawFile(self.part, os.path.basename(path), write=True)
        self._overwrite = overwrite
        self._open = True

    @classmethod
    def create(
        cls,
        path: str,
        datasets: list[NewDataset],
        *,
        attributes: Mapping[str, object],
        links: Mapping[str, str],
        overwrite: bool,
    ) -> Self:
        """Allocate the file in place of what an earlier run may have left of it; raises as create_contiguous does."""
        from .create import create_contiguous

        _remove_leftover(path + PART_SUFFIX)
        offsets = create_contiguous(path + PART_SUFFIX, datasets, attributes, links)
        return cls(path, offsets, overwrite=overwrite)

    @classmethod
    def reopen(cls, path: str, datasets: list[NewDataset], marks: Mapping[str, object], *, overwrite: bool) -> Self:
        """The file that ``create`` made in another run, with these data sets and at least the attributes ``marks``.

        Raises StorageError where it is gone, or another.
        """
        from .create import contiguous_offsets

        return cls(path, contiguous_offsets(path + PART_SUFFIX, datasets, marks), overwrite=overwrite)

    def keep(self) -> None:
        """Close the unfinished file, for another run to go on with; once it is finished this does nothing."""
        if self._open:
            self._close()

    def finish(self) -> None:
        """Put everything on the disk and give the file its name.

        Raises StorageError, leaving the ``.part`` file, if another run has replaced it meanwhile, or if a file of that
        name has appeared that may not be overwritten.
        """
        from .create import sync_directory

        self.file.sync()
        if not self.file.is_at(self.part):
            raise StorageError(f"{self.part} was replaced while it was written. Were two runs given one output?")
        if os.path.exists(self.path) and not self._overwrite:
            self._close()
            raise StorageError(f"{self.path} has appeared meanwhile; the result is {self.part}: rename it.")
        try:
            os.replace(self.part, self.path)
        except OSError as error:
            raise StorageError(f"{self.part} cannot be renamed to {self.path}: {error.strerror}.") from error
        self._close()
        sync_directory(self.path)

    def abandon(self) -> None:
        """Close and remove the unfinished file; once it is finished or abandoned this does nothing."""
        if self._open:
            mine = self.file.is_at(self.part)
            self._close()
            if mine:
                os.remove(self.part)

    def _close(self) -> None:
        self._open = False
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abandon()


def check_target(path: str, inputs: Sequence[str], *, overwrite: bool, of_job: bool = False) -> None:
    """Raise ArgumentError unless a new file may be made at ``path``, which must be none of ``inputs``."""
    if path.endswith(os.sep):
        raise ArgumentError("out", f"{path}, a directory", "the name of a file", "Name a file in it.")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        found = "not a directory" if os.path.exists(folder) else "missing"
        raise ArgumentError("out", f"{path}, whose folder is {found}", "an existing folder", f"Make {folder} first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArgumentError("out", f"{path}, whose folder is not writable", "a writable folder", "Choose another one.")
    if os.path.isdir(path + JOB_SUFFIX) and not of_job:
        remedy = f"Finish it with cqsa resume {path}, or drop it with --restart (Options(restart=True))."
        raise ArgumentError("out", f"{path}, of which a job is unfinished", "a new file", remedy)
    for name in (path, path + PART_SUFFIX):
        if os.path.isdir(name):
            raise ArgumentError("out", f"{name}, a directory", "the name of a file", "Name a file in it.")
        if os.path.exists(name) and any(os.path.exists(one) and os.path.samefile(name, one) for one in inputs):
            raise ArgumentError("out", f"{name}, which is an input", "another file", "Inputs are never overwritten.")
        if os.path.exists(name) and not os.path.isfile(name):  # --overwrite would put a file in place of /dev/null
            raise ArgumentError("out", f"{name}, which is no regular file", "a new file", "Choose another name.")
    if os.path.lexists(path) and not overwrite:
        raise ArgumentError(
            "out",
            f"{path}, which exists",
            "a new file",
            "Choose another name, or --overwrite (Options(overwrite=True)).",
        )


def _remove_leftover(part: str) -> None:
    """Remove what an earlier run has left under the name of the unfinished file."""
    if os.path.lexists(part):
        if not stat.S_ISREG(os.lstat(part).st_mode):
            remedy = "Remove it, or choose another name."
            raise ArgumentError("out", f"{part}, which is no regular file", "nothing or an unfinished output", remedy)
        os.remove(part)
