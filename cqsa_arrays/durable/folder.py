"""The files of a job: a folder beside its output."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass

from ..errors import ArgumentError, StorageError
from ..storage import JOB_SUFFIX
from .lock import Lock

SETUP, FINISH = "setup", "finish"
# What jobs make in their folder.
OWN = re.compile(
    r"ledger\.(sqlite|new)(-journal)?|(setup|finish)\.lock(-journal)?|[0-9a-f]+-states-\d+(\.lock(-journal)?)?"
)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """``out.h5.job``, the folder of the job that writes ``out.h5``."""

    out: str

    @property
    def path(self) -> str:
        return self.out + JOB_SUFFIX

    @property
    def ledger(self) -> str:
        """What was committed."""
        return os.path.join(self.path, "ledger.sqlite")

    @property
    def new_ledger(self) -> str:
        """The ledger of a job that is not begun yet; what is left of one is written over."""
        return os.path.join(self.path, "ledger.new")

    @property
    def exists(self) -> bool:
        """Whether a job was begun and neither finished nor dropped."""
        return os.path.isfile(self.ledger)

    def require(self) -> None:
        """Raise ArgumentError where no job is unfinished."""
        if not self.exists:
            finished = "It is finished: cqsa verify checks it."
            remedy = finished if os.path.exists(self.out) else "Name the output of a job, or begin one: cqsa attend."
            found = f"{self.out}, of which no job is unfinished"
            raise ArgumentError("out", found, "the output of an unfinished job", remedy)

    def make(self) -> None:
        """Make the folder, unless it is there. Raises StorageError where it cannot be, or holds what is no job's."""
        try:
            os.makedirs(self.path, exist_ok=True)
            foreign = sorted(name for name in os.listdir(self.path) if not OWN.fullmatch(name))
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}. A job keeps its record there.") from error
        if foreign:
            raise StorageError(f"{self.path} holds {foreign[0]}, which is of no job. Move it, or name another output.")

    def lock(self, name: str, patience_s: float = 0.0) -> Lock | None:
        """The lock of that name, or None where another process holds it."""
        return Lock.take(os.path.join(self.path, f"{name}.lock"), patience_s=patience_s)

    def remove(self) -> None:
        """Remove what jobs make in the folder, and the folder; the ledger first, for without it there is no job."""
        try:
            with suppress(FileNotFoundError):
                os.remove(self.ledger)
            for name in os.listdir(self.path) if os.path.isdir(self.path) else ():
                if OWN.fullmatch(name):
                    with suppress(FileNotFoundError):
                        os.remove(os.path.join(self.path, name))
            with suppress(OSError):  # somebody else's files are in it
                os.rmdir(self.path)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be removed: {error.strerror}.") from error
