"""Where a run tells how far it is, and may be stopped: between two pieces of work."""

from __future__ import annotations

from typing import Protocol

from ..ranges import Range
from .schedule import BEGIN, Position, Work
from .statefile import StateFile


class Saving(Protocol):
    """What holds the states of a run: made to stand still and to write them."""

    def settle(self) -> None:
        """Return once everything before this is computed and the rows that are finished are written."""

    def save(self) -> None:
        """Write the states that have changed since the last time to the file of the job."""


class Checkpoint(Protocol):
    """Told by the executor where a run is; saves it where it is a job that can be resumed."""

    @property
    def start(self) -> Position:
        """Where the run begins."""

    @property
    def states(self) -> StateFile | None:
        """The file of the states that are saved, if any are."""

    def reached(self, position: Position, resident: Saving) -> None:
        """Everything before ``position`` is done or under way. May save it, and may stop the run by an error."""

    def done(self, work: Work) -> None:
        """``work`` comes before the next position."""

    def finished(self, group: int, rows: Range) -> None:
        """``rows`` of all heads of that group were handed out."""


class NoCheckpoint:
    """For runs that are not resumed: nothing is saved."""

    start = BEGIN
    states: StateFile | None = None

    def reached(self, position: Position, resident: Saving) -> None:
        """Nothing to do."""

    def done(self, work: Work) -> None:
        """Nothing to do."""

    def finished(self, group: int, rows: Range) -> None:
        """Nothing to do."""


NO_CHECKPOINT = NoCheckpoint()
