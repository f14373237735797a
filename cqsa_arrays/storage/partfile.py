"""Files in the making: written as ``path + ".part"``, which gets its name when it is whole and on the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import ArgumentError, StorageError
from ..forks import preload
from ..wording import Call, Choice, Phrase
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

    def __init__(self, path: str, part: str, offsets: list[int], *, overwrite: bool, write: bool = True) -> None:
        self.path, self.part, self.offsets = path, part, offsets
        self.file = RawFile(self.part, os.path.basename(path), write=write)
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
        part: str | None = None,
    ) -> Self:
        """Allocate the file in place of what an earlier run may have left of it; raises as create_contiguous does.

        ``part`` is another name for it until it is whole.
        """
        preload("cqsa_arrays.storage.create")
        from .create import create_contiguous

        part = part or path + PART_SUFFIX
        remove_leftover(part)
        offsets = create_contiguous(part, datasets, attributes, links)
        return cls(path, part, offsets, overwrite=overwrite)

    @classmethod
    def reopen(
        cls, path: str, datasets: list[NewDataset], marks: Mapping[str, object], part: str, *, write: bool
    ) -> Self:
        """The file ``part`` that ``create`` made in another run, of these data sets and with the attributes ``marks``.

        Raises StorageError where it is gone, or another.
        """
        from .create import contiguous_offsets

        return cls(path, part, contiguous_offsets(part, datasets, marks), overwrite=False, write=write)

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


_OTHER_FORMATS = {
    ".npy": "NumPy", ".npz": "NumPy", ".zarr": "Zarr", ".n5": "N5", ".pt": "PyTorch", ".pth": "PyTorch",
    ".safetensors": "safetensors", ".gguf": "GGUF", ".onnx": "ONNX", ".nc": "netCDF", ".nc4": "netCDF",
    ".cdf": "netCDF", ".mat": "MATLAB", ".h5ad": "AnnData", ".csv": "text", ".tsv": "text", ".txt": "text",
    ".json": "JSON", ".jsonl": "JSON", ".yaml": "YAML", ".yml": "YAML", ".xml": "XML", ".parquet": "Parquet",
    ".feather": "Feather", ".arrow": "Arrow", ".ipc": "Arrow", ".orc": "ORC", ".avro": "Avro", ".xlsx": "Excel",
    ".xls": "Excel", ".db": "SQLite", ".sqlite": "SQLite", ".pkl": "pickle", ".pickle": "pickle",
    ".joblib": "joblib", ".msgpack": "MessagePack", ".tif": "TIFF", ".tiff": "TIFF", ".png": "PNG", ".jpg": "JPEG",
    ".jpeg": "JPEG", ".gif": "GIF", ".svg": "SVG", ".pdf": "PDF", ".fits": "FITS", ".root": "ROOT", ".gz": "gzip",
    ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard", ".lz4": "LZ4", ".zip": "ZIP", ".7z": "7-Zip", ".tar": "tar",
    ".tgz": "tar",
}  # fmt: skip
"""Endings of names of other formats than HDF5."""
_HDF5_ENDINGS = (".h5", ".hdf5", ".hdf", ".he5")


def target_of(path: str) -> str:
    """The file that is made or replaced by writing to ``path``: where it leads if it is a symbolic link.

    Raises ArgumentError for links that lead in a circle.
    """
    if not os.path.islink(path):
        return path
    found = os.path.realpath(path)
    if os.path.islink(found):
        raise ArgumentError("out", f"{path}, a link that leads in a circle", "a new file", "Choose another name.")
    return found


def check_name(path: str) -> None:
    """Raise ArgumentError where ``path`` is no name for an HDF5 file: of another format, or of a data set in a file."""
    expected = "the name of a new HDF5 file"
    try:
        unusable = b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        unusable = True
    if unusable:
        raise ArgumentError("out", ascii(path), expected, "No file can have that name: choose another one.")
    ending = os.path.splitext(path.rstrip(os.sep))[1].lower()
    if ending in (PART_SUFFIX, JOB_SUFFIX):
        raise ArgumentError("out", f"{path}, a name of unfinished outputs", expected, "Choose another ending.")
    if ending in _OTHER_FORMATS:
        remedy = f"Outputs are HDF5 files: name one, such as {os.path.splitext(path)[0]}.h5, and convert that."
        raise ArgumentError("out", f"{path}, a name of {_OTHER_FORMATS[ending]} files", expected, remedy)
    file, colon, rest = path.rpartition(":")
    if colon and file.lower().endswith(_HDF5_ENDINGS) and not rest.lower().endswith(_HDF5_ENDINGS):
        remedy = f"An output is a file of its own, with data sets that have names already: name it {file}."
        raise ArgumentError("out", f"{path}, a data set in a file", expected, remedy)


def check_target(path: str, inputs: Sequence[str], *, overwrite: bool, of_job: bool = False) -> None:
    """Raise ArgumentError unless a new file may be made at ``path``, which must be none of ``inputs``."""
    check_name(path)
    if path.endswith(os.sep):
        raise ArgumentError("out", f"{path}, a directory", "the name of a file", "Name a file in it.")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        found = "not a directory" if os.path.exists(folder) else "missing"
        raise ArgumentError("out", f"{path}, whose folder is {found}", "an existing folder", f"Make {folder} first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArgumentError("out", f"{path}, whose folder is not writable", "a writable folder", "Choose another one.")
    records = (os.path.join(path + JOB_SUFFIX, name) for name in ("job", "ledger.sqlite"))
    if any(map(os.path.exists, records)) and not of_job:
        restart = Choice("restart", True, rare=True)
        remedy = Phrase.of("Finish it with ", Call("resume", path), ", or drop it with ", restart, ".")
        raise ArgumentError("out", f"{path}, of which a job is unfinished", "a new file", remedy)
    for name in (path, path + PART_SUFFIX):
        if os.path.isdir(name):
            raise ArgumentError("out", f"{name}, a directory", "the name of a file", "Name a file in it.")
        if os.path.exists(name) and any(os.path.exists(one) and os.path.samefile(name, one) for one in inputs):
            raise ArgumentError("out", f"{name}, which is an input", "another file", "Inputs are never overwritten.")
        if os.path.exists(name) and not os.path.isfile(name):  # --overwrite would put a file in place of /dev/null
            raise ArgumentError("out", f"{name}, which is no regular file", "a new file", "Choose another name.")
    if os.path.lexists(path) and not overwrite:
        remedy = Phrase.of("Choose another name, or replace it: ", Choice("overwrite", True, rare=True), ".")
        raise ArgumentError("out", f"{path}, which exists", "a new file", remedy)


def remove_leftover(part: str) -> None:
    """Remove what an earlier run has left under the name of the unfinished file."""
    if os.path.lexists(part):
        if not stat.S_ISREG(os.lstat(part).st_mode):
            remedy = "Remove it, or choose another name."
            raise ArgumentError("out", f"{part}, which is no regular file", "nothing or an unfinished output", remedy)
        os.remove(part)
