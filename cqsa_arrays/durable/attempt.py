"""One attempt at a lane: what it has read of those before it, and the files that only it writes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable
from contextlib import ExitStack, closing, suppress
from typing import Self

from ..engine.schedule import Schedule
from ..engine.statefile import StateFile
from ..planner import Plan
from .folder import LOOKS, JobPaths, Picture
from .journal import Extent, Journal
from .record import LaneRecord, lane_record
from .records import damaged, link_once, read_record, sync_directory, write_record
from .states import attempts_with_states, heirs_of, make_states, open_states, remove_states_of

MOST_STATE_BYTES = 1 << 60


class Attempt:
    """An attempt at a lane, going on from ``record``, which another one may have made. A context manager.

    ``claim`` is the one under which it is made. ``over`` are attempts that were over before ``record`` was known to be
    the newest checkpoint.
    """

    def __init__(self, paths: JobPaths, plan: Plan, record: LaneRecord, claim: int, over: Collection[str] = ()) -> None:
        self.name, self._claim = new_attempt(claim), claim
        self._paths, self._plan, self.record = paths, plan, record
        self._over, self._is_heir = over, False
        self._number, self._is_named, self._at_end = 0, False, False
        self.journal = Journal(paths.journal(self.name), self.name)
        self._before, self._path = record, paths.states(record.lane, self.name)

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self._remove_states)
            self.states = self._inherited() or self._copied()
            undo.callback(self.states.close)
            self.states.restore(self.record.versions)
            undo.pop_all()
        return self

    def _inherited(self) -> StateFile | None:
        """The states of an attempt that is over under this one's name; or None.

        Its checkpoint stays good until there is one of this attempt: what it names is not written over before that.
        """
        if not (self.record.attempt in self._over and self.record.versions):
            return None
        before = self._paths.states(self.record.lane, self.record.attempt)
        try:
            # By one attempt only, which is then the file's only writer. (The reply may be lost: then it is copied.)
            os.link(before, f"{before}.heir")
            self._is_heir = True
            os.link(before, self._path)
        except FileExistsError:
            if not (os.path.samefile(before, self._path) if self._is_heir else self._follows_an_heir()):
                return None
        except OSError:  # a disk without links
            return None
        return open_states(self._path, self._plan, self.record.lane, write=True)

    def _follows_an_heir(self) -> bool:
        """Whether an heir that is over and has committed nothing could be followed: a name goes away once."""
        for heir in heirs_of(self._paths, self.record.lane, self.record.attempt, self._over):
            try:
                os.rename(self._paths.states(self.record.lane, heir), self._path)
            except FileNotFoundError:
                if not os.path.exists(self._path):  # else the first reply was lost
                    continue
            self._is_heir = True
        return self._is_heir

    def _copied(self) -> StateFile:
        states = make_states(self._path, self._plan, self.record.lane)
        with ExitStack() as undo:
            undo.callback(states.close)
            if self.record.versions:
                path = self._paths.states(self.record.lane, self.record.attempt)
                with closing(open_states(path, self._plan, self.record.lane)) as before:
                    states.copy_from(before, self.record.versions)
                states.sync()  # the next checkpoint may name what was copied
            undo.pop_all()
        return states

    def __exit__(self, *_error: object) -> None:
        self.states.close()
        self.journal.close()
        if not self._is_named:
            self._remove_states()
        elif not self._at_end:
            with suppress(OSError), open(f"{self._path}.over", "xb"):
                pass  # the next attempt may go on in this file

    def _remove_states(self) -> None:
        """Of an attempt that has committed nothing. What it was to be the heir of may have another one then."""
        heir = f"{self._paths.states(self._before.lane, self._before.attempt)}.heir"
        for name in (self._path, *([heir] if self._is_heir else [])):
            with suppress(FileNotFoundError):
                os.remove(name)

    def journals(self, extent: Extent) -> tuple[Extent, ...]:
        """What a checkpoint is to say of journals, of which this attempt's is that long."""
        return (*self._before.journals, extent) if extent.size_bytes else self._before.journals

    def commit(self, record: LaneRecord, *, at_end: bool) -> None:
        """Make ``record`` the newest checkpoint of this attempt, and where it is the last one the lane's end."""
        path, first = self._paths.checkpoint(record.lane, self.name, self._number + 1), self._number == 0
        if first and self._paths.scratch != self._paths.directory:
            sync_directory(self._paths.scratch)  # the name of the states, which this checkpoint or a later one names
        try:
            write_record(path, record.facts())
        finally:
            self._is_named = self._is_named or os.path.exists(path)
        if at_end:
            link_once(path, self._paths.done(record.lane))
        sync_directory(self._paths.directory)
        old = [path] if at_end else []
        if self._number:
            old.append(self._paths.checkpoint(record.lane, self.name, self._number))
        for name in old:
            with suppress(FileNotFoundError):
                os.remove(name)
        if first and self._is_heir:
            forget(self._paths, record.lane, self._paths.look(), [self._before.attempt])
        if at_end:
            left = attempts_with_states(self._paths, record.lane) if self._claim > 1 else [self.name]
            remove_unneeded(self._paths, self._plan, record.lane, left)
        self.record, self._number, self._at_end = record, self._number + 1, at_end


def new_attempt(claim: int) -> str:
    """The name of an attempt under that claim; no other has it."""
    return f"{claim}-{secrets.token_hex(4)}"


def remove_unneeded(paths: JobPaths, plan: Plan, lane: int, attempts: list[str]) -> None:
    """Remove the states of ``attempts`` at a lane that is done, whoever still writes; but not those to be merged."""
    needed = _read(paths.done(lane), paths, lane).attempt if plan.lanes_meet else ""
    for attempt in attempts:
        if attempt != needed:
            remove_states_of(paths, lane, attempt)


def forget(paths: JobPaths, lane: int, picture: Picture, attempts: Iterable[str]) -> None:
    """Remove the checkpoints and states of attempts that are over, and are not the farthest."""
    for attempt in attempts:
        for _, number in filter(lambda found: found[0] == attempt, picture.checkpoints.get(lane, ())):
            with suppress(FileNotFoundError):
                os.remove(paths.checkpoint(lane, attempt, number))
        remove_states_of(paths, lane, attempt)


def newest(paths: JobPaths, plan: Plan | None, lane: int, picture: Picture) -> LaneRecord:
    """The newest checkpoint of a lane: of any attempt, the one that is farthest.

    Raises FileNotFoundError where one has gone since the ``picture``, for there must be a newer one; StorageError where
    what is there cannot be right.
    """
    if lane in picture.done:
        record = _read(paths.done(lane), paths, lane)
        return record if plan is None else _checked(record, plan, paths.done(lane))
    found = []
    for attempt, number in picture.checkpoints.get(lane, ()):
        path = paths.checkpoint(lane, attempt, number)
        record = _read(path, paths, lane)
        found.append(record if plan is None else _checked(record, plan, path))
    return max(found, key=lambda record: (record.position, record.attempt), default=LaneRecord(paths.key, lane))


def newest_now(paths: JobPaths, plan: Plan | None, lane: int, picture: Picture) -> LaneRecord | None:
    """As ``newest``; where something has gone since the ``picture``, of what is there now. None if that never ends."""
    for _ in range(LOOKS):
        with suppress(FileNotFoundError):
            return newest(paths, plan, lane, picture)
        picture = paths.look()
    return None


def link_done(paths: JobPaths, lane: int, picture: Picture, record: LaneRecord) -> None:
    """Make ``record``, which is at the end of the lane, its end; its attempt died before it could.

    Raises FileNotFoundError where it did not: it has made it the end, and removed the checkpoint.
    """
    numbers = [number for attempt, number in picture.checkpoints.get(lane, ()) if attempt == record.attempt]
    link_once(paths.checkpoint(lane, record.attempt, max(numbers, default=0)), paths.done(lane))
    sync_directory(paths.directory)


def _read(path: str, paths: JobPaths, lane: int) -> LaneRecord:
    return lane_record(read_record(path), paths.key, lane)


def _checked(record: LaneRecord, plan: Plan, path: str) -> LaneRecord:
    """``record``, whose position is one of the plan, and whose states are of its groups and rows."""
    rows = plan.problem.query_tokens
    for (group, start), version in record.versions.items():
        if group >= len(plan.groups) or max(start, version.rows) > rows or version.size_bytes > MOST_STATE_BYTES:
            raise damaged(path, f"it has states of group {group} and row {start}")
    order = Schedule.of(plan, record.lane)
    if record.position == order.end:
        return record
    try:
        first = next(order.works(record.position), None)
    except (IndexError, ValueError):
        first = None
    if first is None or first.position != record.position:
        raise damaged(path, f"{record.position} is no place in the work of lane {record.lane}")
    return record
