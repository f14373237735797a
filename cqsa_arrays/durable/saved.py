"""What an unfinished job has committed, for those who only look: which rows have seen which keys, and their states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from ..block_statistics import BlockStatistics
from ..engine.schedule import Position, Schedule
from ..engine.statefile import StateFile
from ..planner import Group, Plan
from ..ranges import Range
from .folder import JobFolder
from .job import JobFact, read_fact
from .ledger import Ledger
from .record import LaneRecord, read_lane, read_rows
from .states import open_lane_states


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of a query chunk of one group which have seen the same ``keys``; ``finished``: all, and they are written."""

    group: Group
    chunk: Range
    rows: Range
    keys: tuple[Range, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class SavedLane:
    """A lane as it was committed last."""

    lane: int
    plan: Plan
    places: tuple[Place, ...]
    states: StateFile

    def state_of(self, place: Place, rows: np.ndarray) -> BlockStatistics:
        """The saved state of some rows, (batch, heads, R)."""
        dtype, dim = np.dtype(self.plan.problem.compute_dtype), self.plan.problem.value_dim
        batches, heads, count = len(place.group.batch), len(place.group.heads), len(place.chunk)
        flat = np.empty(batches * heads * count * (dim + 2), dtype)
        self.states.begin(place.group.index)
        self.states.read(place.chunk, flat)
        acc, rest = flat[: flat.size // (dim + 2) * dim], flat[flat.size // (dim + 2) * dim :]
        m, normalizer = rest.reshape(2, batches, heads, count)[..., rows - place.chunk.start]
        chosen = acc.reshape(batches, heads, count, dim)[:, :, rows - place.chunk.start]
        return BlockStatistics(chosen, m, normalizer)


def read_saved(out: str, plan_of: Callable[[JobFact], Plan], stack: ExitStack) -> list[SavedLane]:
    """The lanes of the unfinished job of ``out``; ``plan_of(fact)`` gives its plan. ``stack`` closes the files."""
    folder = JobFolder(out)
    folder.require()
    with closing(Ledger(folder.ledger)) as ledger:
        fact = read_fact(ledger)
        plan = plan_of(fact)
        return [_saved(ledger, folder, fact, plan, lane, stack) for lane in range(fact.lanes)]


def _saved(ledger: Ledger, folder: JobFolder, fact: JobFact, plan: Plan, lane: int, stack: ExitStack) -> SavedLane:
    with ledger.reading():
        record = read_lane(ledger, lane)
        finished = read_rows(ledger, lane, record.finished)
    states = stack.enter_context(closing(open_lane_states(fact.directory(folder), fact.key, plan, lane)))
    states.restore(record.versions)
    everything = (Range(0, plan.problem.key_tokens),)
    written = [Place(plan.groups[group], rows, rows, everything, finished=True) for group, rows, _ in finished]
    return SavedLane(lane, plan, (*written, *_unfinished(plan, record, lane)), states)


def _unfinished(plan: Plan, record: LaneRecord, lane: int) -> Iterator[Place]:
    """The rows with a saved state, and what they have seen: from the order of the work, up to the lane's position."""
    order = Schedule(plan.groups, plan.build_cover(), None, plan.lanes, lane)
    for group in plan.groups:
        saved = {start for number, start in record.versions if number == group.index}
        if not saved:
            continue
        tiles = plan.cover_name == "rectangular"
        begin = Position(group.index, record.position.task if tiles else 0)
        seen: dict[Range, list[Range]] = {}
        more: tuple[Range, Range, tuple[Range, ...]] | None = None  # of the step that is not complete
        for work in takewhile(lambda w: w.position < record.position, order.works(begin)):
            if work.position.group != group.index:
                break
            if work.step is None:
                continue
            done = record.position
            if (done.group, done.task, done.step) == _step_of(work.position) and done.rows:
                split = work.step.queries.start + done.rows
                more = work.step.queries, Range(work.step.queries.start, split), work.step.keys
            else:
                seen.setdefault(work.step.queries, []).extend(work.step.keys)
        if more is not None:
            chunk, rows, keys = more
            before = tuple(seen.pop(chunk, []))
            if chunk.start in saved:
                yield Place(group, chunk, rows, (*before, *keys), finished=False)
                if before:
                    yield Place(group, chunk, Range(rows.stop, chunk.stop), before, finished=False)
        for chunk, found in seen.items():
            if chunk.start in saved:
                yield Place(group, chunk, chunk, tuple(found), finished=False)


def _step_of(position: Position) -> tuple[int, int, int]:
    return position.group, position.task, position.step
