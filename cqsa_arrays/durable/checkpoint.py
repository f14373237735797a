"""Committing how far a lane is. The order is what makes it safe; see ``LaneCheckpoint._commit``."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from ..engine.checkpoint import Saving
from ..engine.schedule import Position, Work
from ..engine.statefile import StateFile, Version, Versions
from ..errors import JobStopped
from ..planner import Plan
from ..planner.durability import SHARE
from ..ranges import Range
from ..storage import OutputFile
from .ledger import Ledger
from .record import NOT_TAKEN, RECENT, LaneRecord, Moment, rows_facts
from .stop import Stop


@dataclass(frozen=True, slots=True)
class Lane:
    """What a lane is saved to: its number, the plan, the ledger, the files of its states and of the output.

    ``check_inputs`` raises where an input is no longer what it was.
    """

    number: int
    plan: Plan
    ledger: Ledger
    states: StateFile
    output: OutputFile
    check_inputs: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Sealed:
    """What one commit is to say: everything before ``position`` is done."""

    position: Position
    moment: Moment
    written: dict[tuple[int, int], Version]
    kept: dict[tuple[int, int], Version]
    rows: list[tuple[int, Range]]


class LaneCheckpoint:
    """``Checkpoint`` of one lane: commits at its plan's interval, by a thread of its own, and stops where asked to.

    The computing thread only waits while states are handed to the system; they come to the disk, and are committed,
    while it goes on. ``close`` waits for the commit that is under way.
    """

    def __init__(self, lane: Lane, record: LaneRecord, end: Position, stop: Stop) -> None:
        self._lane, self._record, self._end, self._stop = lane, record, end, stop
        self._interval_s = self._asked_s = lane.plan.durability.interval_s if lane.plan.durability else 0.0
        self._begun = self._last = time.perf_counter()
        self._pairs, self._before_s = record.pairs, record.computed_s
        self._rows: list[tuple[int, Range]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cqsa-commit")
        self._pending: Future[None] | None = None

    @property
    def start(self) -> Position:
        return self._record.position

    @property
    def states(self) -> StateFile:
        return self._lane.states

    def done(self, work: Work) -> None:
        if work.step is not None:
            heads, mask = len(work.group.batch) * len(work.group.heads), self._lane.plan.problem.mask
            self._pairs += heads * sum(mask.pairs(work.rows, keys) for keys in work.step.keys)

    def finished(self, group: int, rows: Range) -> None:
        self._rows.append((group, rows))

    def reached(self, position: Position, resident: Saving) -> None:
        """Commit if it is time, or the end, or the run is to stop: then by JobStopped, with everything committed."""
        if self._pending is not None and self._pending.done():
            self._wait()
        reason, at_end = self._stop.reason, position == self._end
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
        sealed = _Sealed(position, moment, *self._lane.states.seal(), self._rows)
        self._rows = []
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
        """Everything that the ledger will name is on the disk before the ledger names it.

        1. States went to slots that no committed state has (``StateFile.write``), rows to places of their own.
        2. Both are read back for their checksums, unless this is the end.
        3. Both files are put on the disk.
        4. The inputs are still what they were: else what was computed may be of neither the old ones nor the new.
        5. One transaction names the place, the slots and the rows.
        6. Only now the slots that were committed before are free.
        """
        lane = self._lane
        try:
            versions = lane.states.checked(sealed.written)
            groups = lane.plan.groups
            # Of a lane at its end nothing is looked at again.
            checksum = lane.output.checksum if sealed.position != self._end else lambda *_: NOT_TAKEN
            rows = {(g, part): checksum(groups[g].batch, groups[g].heads, part) for g, part in sealed.rows}
            lane.states.sync()
            lane.output.sync()
            lane.check_inputs()
            record = replace(
                self._record, position=sealed.position, moments=(*self._record.moments, sealed.moment)[-RECENT:],
                versions=self._kept(sealed.position, {**sealed.kept, **versions}),
                finished=self._record.finished + len(rows),
            )  # fmt: skip
            lane.ledger.commit(
                {**record.facts(lane.number), **rows_facts(lane.number, rows)}, drop=self._obsolete(record)
            )
        except BaseException as error:
            lane.states.failed(error)
            raise
        lane.states.committed(versions)
        self._record = record

    def _kept(self, position: Position, versions: Versions) -> dict[tuple[int, int], Version]:
        """Those that a later run needs: where lanes do not meet, nothing of the groups that are finished."""
        first = 0 if self._lane.plan.lanes_meet else position.group
        return {key: version for key, version in versions.items() if key[0] >= first}

    def _obsolete(self, record: LaneRecord) -> list[str]:
        before, now = ({group for group, _ in one.versions} for one in (self._record, record))
        return [f"states/{self._lane.number}/{group}" for group in before - now]

    def close(self) -> None:
        """Wait for what is under way; its error gives way to that which ends the run."""
        self._pool.shutdown()
