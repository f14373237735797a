"""The states of one attempt at a lane: a file that has only this writer."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress

from ..engine.schedule import Schedule
from ..engine.statefile import Places, StateFile, by_rows
from ..errors import START_OVER, StorageError
from ..planner import Plan
from ..planner.memory import state_row_bytes
from ..storage import RawFile, reserve
from ..units import format_bytes
from ..wording import Choice
from .claims import claimed_by
from .folder import ATTEMPT, STATES, JobPaths
from .records import create_own


def require_room(directory: str, plan: Plan) -> None:
    """Raise StorageError where the disk has no room for states: of all lanes that meet, else of one after the other."""
    saved = plan.durability
    needed = 0 if saved is None else saved.disk_bytes
    try:
        if shutil.disk_usage(directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _no_room(os.path.join(directory, ""), needed, error) from error


def make_states(path: str, plan: Plan, lane: int) -> StateFile:
    """The file, with all of its disk blocks. Raises StorageError where there is no room, and leaves nothing then."""
    try:
        descriptor = create_own(path)
    except OSError as error:
        raise _no_room(path, 0, error) from error
    made = _over(RawFile.of_descriptor(descriptor, "states"), plan, lane)
    try:
        reserve(descriptor, 0, made.size_bytes)
    except OSError as error:
        made.close()
        os.remove(path)
        raise _no_room(path, made.size_bytes, error) from error
    return made


def open_states(path: str, plan: Plan, lane: int, *, write: bool = False) -> StateFile:
    """The states of an attempt. Raises StorageError where the file is gone or cut short."""
    file = RawFile(path, "states", write=write)
    made = _over(file, plan, lane)
    if os.fstat(file.descriptor).st_size < made.size_bytes:
        made.close()
        raise StorageError(f"{path} is shorter than what was reserved: the file is damaged. ", START_OVER)
    return made


def remove_states(directory: str, key: str) -> None:
    """Remove the files of all attempts of a job."""
    own = re.compile(key + STATES)
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(directory):
            if own.fullmatch(name):
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(directory, name))


def attempts_with_states(paths: JobPaths, lane: int) -> list[str]:
    """The attempts at a lane that have files of states."""
    own = re.compile(rf"{paths.key}-{lane}-({ATTEMPT})\.states")
    return [found[1] for name in os.listdir(paths.scratch) if (found := own.fullmatch(name))]


def attempts_over(paths: JobPaths, lane: int) -> frozenset[str]:
    """Those whose states nobody writes any more: they were closed, or their process is dead for certain."""

    def is_over(attempt: str) -> bool:
        if os.path.exists(f"{paths.states(lane, attempt)}.over"):
            return True
        who = claimed_by(paths.directory, f"lane-{lane}", int(attempt.partition("-")[0]))
        return who is not None and who.is_dead

    return frozenset(filter(is_over, attempts_with_states(paths, lane)))


def heirs_of(paths: JobPaths, lane: int, attempt: str, attempts: Iterable[str]) -> list[str]:
    """Those of ``attempts`` that have taken over the states of ``attempt``: their file is the same."""

    def is_heir(other: str) -> bool:
        with suppress(FileNotFoundError):
            return other != attempt and os.path.samefile(paths.states(lane, attempt), paths.states(lane, other))
        return False

    return sorted(filter(is_heir, attempts))


def remove_states_of(paths: JobPaths, lane: int, attempt: str) -> None:
    """Remove the states of one attempt, and what was said of them."""
    path = paths.states(lane, attempt)
    for name in (path, f"{path}.heir", f"{path}.over"):
        with suppress(FileNotFoundError):
            os.remove(name)


def _over(file: RawFile, plan: Plan, lane: int) -> StateFile:
    chosen, problem = plan.chosen, plan.problem
    row_bytes = chosen.batches * chosen.heads * state_row_bytes(problem)
    if plan.cover_name == "rectangular":
        return StateFile(file, chosen.residency.query_chunk, row_bytes, lambda group, start: 0)
    if not plan.lanes_meet:
        return StateFile(file, problem.query_tokens, row_bytes, by_rows)
    rows, place = _touched(plan, lane)
    return StateFile(file, rows, row_bytes, place, all_groups=True)


def _touched(plan: Plan, lane: int) -> tuple[int, Places]:
    """The rows of all query chunks that a lane touches, group by group, and where each has its place among them."""
    places: dict[tuple[int, int], int] = {}
    rows = 0
    for work in Schedule.of(plan, lane).works():
        if work.step is not None and (key := (work.group.index, work.step.queries.start)) not in places:
            places[key] = rows
            rows += len(work.step.queries)

    def place(group: int, start: int) -> int:
        if (group, start) not in places:
            raise StorageError(
                f"the checkpoint of lane {lane} has states that are not this lane's: it is damaged. ", START_OVER
            )
        return places[group, start]

    return rows, place


def _no_room(path: str, size_bytes: int, error: OSError) -> StorageError:
    return StorageError(
        f"scratch: cannot reserve {format_bytes(size_bytes)} for states in {os.path.dirname(path)}: {error.strerror}."
        " Name a directory with that much room: ", Choice("scratch", ..., rare=True), ".",
    )  # fmt: skip
