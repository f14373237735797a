"""The files of a job: a folder beside its output."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from ..errors import StorageError
from ..storage import JOB_SUFFIX
from .lock import Lock

SETUP, FINISH = "setup", "finish"


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

    def make(self) -> None:
        """Make the folder, unless it is there."""
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be made: {error.strerror}. A job keeps its record there."
            ) from error

    def lock(self, name: str, patience_s: float = 0.0) -> Lock | None:
        """The lock of that name, or None where another process holds it."""
        return Lock.take(os.path.join(self.path, f"{name}.lock"), patience_s=patience_s)

    def remove_remains(self) -> None:
        """Remove what a run has left that was killed after its output had its name and its ledger was gone."""
        if os.path.isdir(self.path) and (lock := self.lock(SETUP)) is not None:
            if not self.exists:
                self.remove()
            lock.release()

    def remove(self) -> None:
        """Remove the folder; the ledger first, for without it there is no job."""
        if os.path.lexists(self.ledger):
            os.remove(self.ledger)
        shutil.rmtree(self.path, ignore_errors=True)
