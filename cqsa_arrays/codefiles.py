"""Machine code kept on disk between processes: an aid, whose failure never stops a computation.

A file holds the SHA-256 of what the code was made from and of the code, then the code. A file that is cut short,
damaged or of another version is therefore taken for missing, and is replaced.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger("cqsa_arrays")
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class CodeFile:
    """The file ``name`` in the first of ``folders`` that has it, or that can be written.

    ``made_from`` stands for everything that the code depends on and ``name`` does not tell: sources and versions.
    ``variable`` is the environment variable that names another folder, for the user.
    """

    folders: Sequence[Path]
    name: str
    made_from: bytes
    variable: str

    def load(self) -> bytes | None:
        """The code, or None where no folder has it, whole and made from the same."""
        for folder in self.folders:
            try:
                content = (folder / self.name).read_bytes()
            except OSError:
                continue
            code = content[_DIGEST_BYTES:]
            if content[:_DIGEST_BYTES] == self._digest(code):
                return code
        return None

    def save(self, code: bytes) -> None:
        """Keep ``code`` in the first folder that takes it; a warning where none does, once in a process.

        Other processes see the file whole or not at all, also where several save it at the same time.
        """
        reason = "there is no directory for it"
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write_whole(folder / self.name, self._digest(code) + code)
            except OSError as error:
                reason = f"{folder}: {error.strerror}"
            else:
                return
        _warn(self.variable, reason)

    def _digest(self, code: bytes) -> bytes:
        return hashlib.sha256(hashlib.sha256(self.made_from).digest() + code).digest()


def home_folder(path: str) -> list[Path]:
    """The folder ``path``, which begins with "~"; none where nobody knows of a home directory."""
    found = os.path.expanduser(path)
    return [Path(found)] if os.path.isabs(found) else []


def _write_whole(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` by one step, with the permissions that the process gives its files."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


@lru_cache  # the same words once in a process
def _warn(variable: str, reason: str) -> None:
    logger.warning(
        "compiled code cannot be kept on disk (%s): each process compiles it anew. Set %s to a directory that can be"
        " written.",
        reason, variable,
    )  # fmt: skip
