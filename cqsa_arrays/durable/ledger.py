"""The record of a job: facts by name in one SQLite file, each with a checksum; what is committed survives anything."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

from ..errors import START_OVER, StorageError

FORMAT = 1
# For another process that commits, not for one that computes: commits take milliseconds.
PATIENCE_S = 30.0
# Of a damaged file, SQLite's own message may be no text.
_FAILURES = (sqlite3.Error, UnicodeDecodeError)


class Ledger:
    """Facts (anything that JSON holds) by name. ``commit`` is all or nothing, and on the disk when it returns.

    By any thread. Raises StorageError for a file that is no ledger, of another format or damaged, and where the disk
    fails or another program locks the file for long.
    """

    def __init__(self, path: str, *, create: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        if not create and not os.path.isfile(path):
            raise StorageError(f"{path}: there is no record of a job.")
        if create:
            for leftover in (path, f"{path}-journal"):
                with suppress(FileNotFoundError):
                    os.remove(leftover)
        try:
            self._connection = sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False)
            self._open(create)
        except _FAILURES as error:
            raise self._failed(error) from error

    def _open(self, create: bool) -> None:
        execute = self._connection.execute
        # A rollback journal, which is deleted durably: works on every file system, and for several processes.
        execute("PRAGMA journal_mode = DELETE")
        execute("PRAGMA synchronous = EXTRA")
        if create:
            execute("CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT, checksum INTEGER)")
            execute(f"PRAGMA user_version = {FORMAT}")
        found = execute("PRAGMA user_version").fetchone()[0]
        if found != FORMAT:
            self.close()
            raise StorageError(
                f"{self.path}: a record of format {found}; this version reads {FORMAT}. Go on with the version that"
                f" began the job. {START_OVER}"
            )
        broken = execute("PRAGMA quick_check(1)").fetchone()[0]
        if broken != "ok":
            raise sqlite3.DatabaseError(broken)

    def facts(self, prefix: str = "") -> dict[str, Any]:
        """Every fact whose name begins with ``prefix``."""
        with self._lock:
            try:
                # Not LIKE: its wildcards may be part of a name.
                query = "SELECT name, value, checksum FROM facts WHERE substr(name, 1, ?) = ? ORDER BY name"
                rows = self._connection.execute(query, (len(prefix), prefix)).fetchall()
            except _FAILURES as error:
                raise self._failed(error) from error
        return {name: self._checked(name, value, checksum) for name, value, checksum in rows}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What is read meanwhile is of one moment, whoever commits."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            try:
                self._connection.execute("BEGIN")
            except _FAILURES as error:
                raise self._failed(error) from error
            try:
                yield
            finally:
                self._connection.rollback()

    def get(self, name: str) -> Any:
        """One fact, or None."""
        return self.facts(name).get(name)

    def commit(self, facts: Mapping[str, Any], drop: Iterable[str] = ()) -> None:
        """Set ``facts`` and forget those named ``drop``, at once."""
        texts = {name: json.dumps(value) for name, value in facts.items()}
        with self._lock:
            try:
                with self._connection:
                    self._connection.execute("BEGIN IMMEDIATE")
                    self._connection.executemany("DELETE FROM facts WHERE name = ?", [(name,) for name in drop])
                    self._connection.executemany(
                        "INSERT OR REPLACE INTO facts VALUES (?, ?, ?)",
                        [(name, text, _checksum(name, text)) for name, text in texts.items()],
                    )
            except _FAILURES as error:
                raise self._failed(error) from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _checked(self, name: object, value: object, checksum: object) -> Any:
        if not isinstance(name, str) or not isinstance(value, str) or checksum != _checksum(name, value):
            raise self.damaged(f"the entry {name!r} is not what was written")
        return json.loads(value)

    def damaged(self, what: str) -> StorageError:
        """The error of a record that cannot be right."""
        return StorageError(f"{self.path}: damaged: {what}. The job cannot go on. {START_OVER}")

    def _failed(self, error: Exception) -> StorageError:
        code = getattr(error, "sqlite_errorcode", None)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StorageError(f"{self.path}: locked by another program. Close that, and resume the job.")
        broken = code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
        if broken or type(error) in (sqlite3.DatabaseError, UnicodeDecodeError):
            return self.damaged(str(error))
        return StorageError(f"{self.path}: {error}. What was committed before is safe.")


def _checksum(name: str, text: str) -> int:
    return zlib.crc32(f"{name}\0{text}".encode())
