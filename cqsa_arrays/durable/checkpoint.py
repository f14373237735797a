"""Committing how far a lane is. The order is what makes it safe; see ``LaneCheckpoint._commit``."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from ..engine.checkpoint import Saving
from ..engine.schedule import Position, Work
from ..engine.statefile import StateFile, Version
from ..errors import JobStopped
from ..planner import Plan, Rates
from ..planner.durability import SHARE
from ..ranges import Range
from ..storage import OutputFile
from ..workers import Pool
from .attempt import Attempt
from .claims import this_process
from .journal import Extent
from .record import RECENT, Moment
from .stop import Stop


@dataclass(frozen=True, slots=True)
class Lane:
    """What a lane is saved to: the plan, the files of this attempt at it, and the output.

    ``check`` raises where an input is no longer what it was, or the job is not there any more.
    """

    plan: Plan
    attempt: Attempt
    output: OutputFile
    check: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Sealed:
    """What one commit is to say: everything before ``position`` is done."""

    position: Position
    moment: Moment
    written: dict[tuple[int, int], Version]
    kept: dict[tuple[int, int], Version]
    journals: tuple[Extent, ...]
    saving_s: float


class LaneCheckpoint:
    """``Checkpoint`` of one lane: commits at its plan's interval, by a thread of its own, and stops where asked to.

    The computing thread only waits while states are handed to the system; they come to the disk, and are committed,
    while it goes on. ``close`` waits for the commit that is under way.
    """

    def __init__(self, lane: Lane, end: Position, stop: Stop) -> None:
        self._lane, self._record, self._end, self._stop = lane, lane.attempt.record, end, stop
        self._interval_s = self._asked_s = lane.plan.durability.interval_s if lane.plan.durability else 0.0
        self._begun = self._last = time.perf_counter()
        self._pairs, self._before_s = self._record.pairs, self._record.computed_s
        # Of the last part and the last commit; of the first one what the plan's rates say.
        self._part_s = 0.0
        self._commit_s = lane.plan.durability.checkpoint_bytes / Rates().saved_bytes if lane.plan.durability else 0.0
        self._reached = self._begun
        self._pool = Pool(1, "commit")
        self._pending: Future[None] | None = None

    @property
    def start(self) -> Position:
        return self._record.position

    @property
    def states(self) -> StateFile:
        return self._lane.attempt.states

    def done(self, work: Work) -> None:
        self._pairs += work.pairs(self._lane.plan.problem.mask)
        if work.step is not None:
            self._stop.worked = True

    def finished(self, group: int, rows: Range) -> None:
        """The journal has them."""

    def reached(self, position: Position, resident: Saving) -> None:
        """Commit if it is time, or the end, or the run is to stop: then by JobStopped, with everything committed."""
        self._part_s = time.perf_counter() - self._reached
        try:
            self._reach(position, resident)
        finally:
            self._reached = time.perf_counter()

    def _reach(self, position: Position, resident: Saving) -> None:
        if self._pending is not None and self._pending.done():
            self._wait()
        # What is done must be committed within the time, and another part would be done only after it.
        reason, at_end = self._stop.reason_within(self._part_s + self._commit_s), position == self._end
        if position == self._record.position and not at_end:  # nothing new
            if reason:
                raise JobStopped(reason)
            return
        # Where every place was asked for, every one is committed.
        free = self._pending is None or self._asked_s == 0
        due = free and time.perf_counter() - self._last >= self._interval_s
        if not (due or reason or at_end):
            return
        self._wait()
        resident.settle()  # what is under way is computed meanwhile: that is no cost
        began = time.perf_counter()
        resident.save()
        moment = Moment(time.time(), self._pairs, self._before_s + time.perf_counter() - self._begun)
        attempt = self._lane.attempt
        journals = attempt.journals(attempt.journal.seal())
        sealed = _Sealed(position, moment, *attempt.states.seal(), journals, time.perf_counter() - began)
        self._pending = self._pool.submit(self._commit, sealed)
        self._last = time.perf_counter()
        # What the computing thread waited must stay the share that the plan allows, on a slow disk too.
        self._interval_s = max(self._asked_s, (self._last - began) / SHARE if self._asked_s else 0.0)
        if reason or at_end:
            self._wait()
        if reason and not at_end:
            raise JobStopped(reason)

    def _wait(self) -> None:
        """Wait for the commit that is under way; its error is raised here."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _commit(self, sealed: _Sealed) -> None:
        """Everything that a checkpoint will name is on the disk before it has its own name.

        1. States went to slots that no committed state has (``StateFile.write``), rows to the output and the journal.
        2. States are read back for their checksums.
        3. Output, journal and states are put on the disk.
        4. The inputs are still what they were: else what was computed may be of neither the old ones nor the new.
        5. The checkpoint gets its name.
        6. Only now the slots that were committed before are free.
        """
        lane, attempt, began = self._lane, self._lane.attempt, time.perf_counter()
        try:
            versions = attempt.states.checked(sealed.written)
            if sealed.journals != self._record.journals:
                lane.output.sync()
                attempt.journal.sync()
            if versions:
                attempt.states.sync()
            lane.check()
            record = replace(
                self._record, attempt=attempt.name, by=this_process(), position=sealed.position,
                moments=(*self._record.moments, sealed.moment)[-RECENT:],
                versions=self._kept(sealed.position, {**sealed.kept, **versions}), journals=sealed.journals,
            )  # fmt: skip
            attempt.commit(record, at_end=sealed.position == self._end)
        except BaseException as error:
            attempt.states.failed(error)
            raise
        attempt.states.committed(versions)
        self._record, self._commit_s = record, sealed.saving_s + time.perf_counter() - began

    def _kept(self, position: Position, versions: dict[tuple[int, int], Version]) -> dict[tuple[int, int], Version]:
        """Those that a later run needs: where lanes do not meet, nothing of the groups that are finished."""
        first = 0 if self._lane.plan.lanes_meet else position.group
        return {key: version for key, version in versions.items() if key[0] >= first}

    def close(self) -> None:
        """Wait for what is under way; its error gives way to that which ends the run."""
        self._pool.close()
