"""Files that are written once: under a temporary name, put on the disk, and then named; with a checksum of their own.

What a record says is input like any other: ``Fields`` takes nothing out of it that is not of its type and range.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import START_OVER, StorageError

FORMAT = 2
# No count in a record is more, and none of them less than 0 unless it says so.
MOST = 1 << 100
# Systems and disks that have no hard links say so in one of these ways.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_MOST_BYTES = 1 << 30


def write_record(path: str, facts: Mapping[str, Any]) -> None:
    """Make the file ``path``, or replace it, at once: what it says is on the disk before it has its name.

    The name is there for good after ``sync_directory``. Raises OSError.
    """
    text = json.dumps({"format": FORMAT, **facts}, separators=(",", ":"))
    data = f"{text}\n{zlib.crc32(text.encode()):08x}\n".encode()
    temporary = f"{path}.new-{secrets.token_hex(4)}"
    try:
        descriptor = create_own(temporary)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _rename(temporary, path, data)
    except OSError:
        with suppress(OSError):
            os.remove(temporary)
        raise


def create_own(path: str) -> int:
    """Make a file whose name nobody else has, and open it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except FileExistsError:
        if os.stat(path).st_size:
            raise
        return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # the first reply was lost


def _rename(temporary: str, path: str, data: bytes) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        with open(path, "rb") as file:
            if file.read() != data:
                raise
        # the first reply was lost


def read_record(path: str) -> Fields:
    """What ``write_record`` wrote. Raises FileNotFoundError, and StorageError for anything else in that place."""
    try:
        with open(path, "rb") as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, _MOST_BYTES))
    except OSError as error:
        raise gone_or_failed(path, error) from error
    text, _, checksum = data.removesuffix(b"\n").rpartition(b"\n")
    if checksum != b"%08x" % zlib.crc32(text):
        raise damaged(path, "its checksum is not that of what it says")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is no record ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise damaged(path, "it is no record")
    if found.get("format") != FORMAT:
        raise StorageError(
            f"{path}: a record of format {found.get('format')!r}; this version reads {FORMAT}. Go on with the version"
            " that began the job. ", START_OVER,
        )  # fmt: skip
    return Fields(found, path)


def gone_or_failed(path: str, error: OSError) -> OSError:
    """FileNotFoundError where another process has removed the file, also while it was read; else StorageError."""
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return StorageError(f"{path}: {error.strerror}.")


def damaged(path: str, what: str) -> StorageError:
    """The error of a record that cannot be right."""
    return StorageError(f"{path}: damaged: {what}. The job cannot go on. ", START_OVER)


def link_once(source: str, target: str) -> bool:
    """Give ``source`` the further name ``target``; False where another file has that name already.

    Where the disk knows no hard links it is renamed, which is as safe while nobody else does so at the same moment.
    Raises FileNotFoundError where ``source`` or the directory is gone.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        with suppress(FileNotFoundError):
            return os.path.samefile(source, target)  # the first reply was lost
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.exists(target):
            return False
        os.rename(source, target)
    return True


def sync_directory(path: str) -> None:
    """Put the names in a directory on the disk, on systems that can."""
    if os.name == "posix":
        directory = os.open(path or ".", os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object of the file ``path``, of which nothing is believed. Every method raises StorageError."""

    found: Mapping[str, Any]
    path: str

    def wrong(self, name: str) -> StorageError:
        return damaged(self.path, f"{name!r} cannot be {_shown(self.found.get(name))}")

    def whole(self, name: str, least: int = 0, most: int = MOST) -> int:
        """A whole number of that range."""
        value: Any = self.found.get(name)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name)
        return value

    def number(self, name: str) -> float:
        """A finite number, at least 0."""
        value: Any = self.found.get(name)
        if type(value) not in (int, float) or not 0 <= value < MOST:
            raise self.wrong(name)
        return float(value)

    def text(self, name: str, pattern: str = r"[^\0]*") -> str:
        """Text that is all of ``pattern``."""
        value = self.found.get(name)
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL):
            raise self.wrong(name)
        return value

    def flag(self, name: str) -> bool:
        value = self.found.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.found.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name)
        return value

    def within(self, name: str) -> Fields:
        """The object of that name."""
        return Fields(self.mapping(name), self.path)

    def rows(self, name: str, columns: int) -> list[list[Any]]:
        """A list of lists of so many numbers, each at least 0."""
        value = self.found.get(name)
        if not isinstance(value, list):
            raise self.wrong(name)
        for row in value:
            good = isinstance(row, list) and len(row) == columns
            if not good or not all(type(x) in (int, float) and 0 <= x < MOST for x in row):
                raise self.wrong(name)
        return value

    def wholes(self, name: str, columns: int) -> list[list[int]]:
        """As ``rows``, of whole numbers."""
        value = self.rows(name, columns)
        if any(type(x) is not int for row in value for x in row):
            raise self.wrong(name)
        return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
