"""Locks between processes which the system releases when their holder dies, however it dies."""

from __future__ import annotations

import sqlite3
from typing import Self

from ..errors import StorageError


class Lock:
    """Held by one process at a time: a lock of SQLite's on an empty file, which works on every system."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    def take(cls, path: str, *, patience_s: float = 0.0) -> Self | None:
        """The lock, or None where another process, or another part of this one, holds it for that long."""
        connection = None
        try:
            connection = sqlite3.connect(path, timeout=patience_s, isolation_level=None, check_same_thread=False)
            connection.execute("BEGIN EXCLUSIVE")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if connection is not None:
                connection.close()
            if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                return None
            raise StorageError(f"{path}: cannot be locked: {error}.") from error
        return cls(connection)

    def release(self) -> None:
        """Let others have it."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()
