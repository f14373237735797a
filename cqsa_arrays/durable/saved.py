"""What an unfinished job has committed, for those who only look: which rows have seen which keys, and their states.

Nothing is written, and nobody is waited for. A checkpoint is a picture that is consistent by itself; where what it
names is no longer there, its writer has gone on, and there is a newer one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from ..block_statistics import BlockStatistics
from ..engine.schedule import Position, Schedule
from ..errors import ArgumentError
from ..planner import Group, Plan
from ..ranges import Range
from ..storage import OutputFile, Rows, copy_elements
from ..wording import Call, Phrase
from .attempt import newest
from .claims import Observer
from .ending import living, was_finished
from .fact import JobFact
from .folder import JobFolder, JobPaths, Picture
from .job import require_job
from .pages import Pages
from .record import LaneRecord
from .setup import OutputSpec
from .states import open_states


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of a query chunk of one group which have seen the same ``keys``; ``finished``: all, and they are written."""

    group: Group
    chunk: Range
    rows: Range
    keys: tuple[Range, ...]
    finished: bool


class SavedRows:
    """A data set of the unfinished output as journals say it is: a source of tokens, as far as ``read`` goes."""

    def __init__(self, output: OutputFile, rows: Rows, pages: Pages) -> None:
        self._output, self._rows, self._pages = output, rows, pages
        self.shape, self.dtype = rows.shape, rows.dtype

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        """Fill ``out`` with those rows, which must be finished."""
        for run in self._rows.runs(batch, heads, tokens):
            stored = np.empty((len(tokens), *self._rows.row_shape), self._rows.dtype)
            flat = stored.reshape(-1).view(np.uint8)
            self._output.file.read_into(flat, run.position)
            self._pages.put(run.position, flat)
            copy_elements(run.of(out), stored[:, run.pick])


@dataclass(frozen=True, slots=True)
class SavedLane:
    """A lane as it was committed last."""

    paths: JobPaths
    plan: Plan
    record: LaneRecord
    places: tuple[Place, ...]

    def state_of(self, place: Place, rows: np.ndarray) -> BlockStatistics:
        """The saved state of some rows, (batch, heads, R). Raises StorageError where it is not that any more."""
        dtype, dim = np.dtype(self.plan.problem.compute_dtype), self.plan.problem.value_dim
        batches, heads, count = len(place.group.batch), len(place.group.heads), len(place.chunk)
        flat = np.empty(batches * heads * count * (dim + 2), dtype)
        path = self.paths.states(self.record.lane, self.record.attempt)
        with closing(open_states(path, self.plan, self.record.lane)) as states:
            states.restore(self.record.versions)
            states.begin(place.group.index)
            states.read(place.chunk, flat)
        acc, rest = flat[: flat.size // (dim + 2) * dim], flat[flat.size // (dim + 2) * dim :]
        m, normalizer = rest.reshape(2, batches, heads, count)[..., rows - place.chunk.start]
        chosen = acc.reshape(batches, heads, count, dim)[:, :, rows - place.chunk.start]
        return BlockStatistics(chosen, m, normalizer)


@dataclass(frozen=True, slots=True)
class SavedJob:
    """An unfinished job."""

    folder: JobFolder
    fact: JobFact
    plan: Plan

    @classmethod
    def of(cls, out: str, plan_of: Callable[[JobFact], Plan]) -> SavedJob:
        """That of ``out``; ``plan_of(fact)`` gives its plan. Raises as ``require_job`` does."""
        folder = JobFolder(out)
        fact = require_job(folder)
        return cls(folder, fact, plan_of(fact))

    @property
    def paths(self) -> JobPaths:
        return self.fact.paths(self.folder)

    def lane(self, number: int, picture: Picture | None = None) -> SavedLane:
        """That lane as it is now, or as a ``picture`` has it.

        Raises FileNotFoundError where it has gone on meanwhile, or the job has ended.
        """
        record = newest(self.paths, self.plan, number, self.paths.look() if picture is None else picture)
        places = (*_finished(self.plan, record), *_unfinished(self.plan, record, number))
        return SavedLane(self.paths, self.plan, record, places)

    def rows(self, record: LaneRecord, spec: OutputSpec) -> tuple[OutputFile, list[SavedRows]]:
        """/out and /lse as far as a lane has written them; the file must be closed (``keep``)."""
        output = OutputFile.reopen(
            self.folder.out, shape=spec.shape, dtype=spec.dtype, layout=spec.layout, lse_dtype=spec.lse_dtype,
            marks={"job": self.fact.mark}, part=self._output(), write=False,
        )  # fmt: skip
        with ExitStack() as undo:
            undo.callback(output.keep)
            pages = Pages(record.journals, self.paths.journal, output.place)
            undo.pop_all()
        return output, [SavedRows(output, rows, pages) for rows in output.data_sets]

    def _output(self) -> str:
        """The name of the output now. Raises FileNotFoundError where it has its own name already."""
        for path in (self.paths.output, self.paths.finished):
            if os.path.exists(path):
                return path
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.paths.output)

    @property
    def is_ending(self) -> bool:
        """Whether the output is complete and about to have its name."""
        return not os.path.exists(self.paths.output)

    def require_unnamed(self) -> None:
        """Raise ArgumentError where the output has its name, and only the folder of the job is still there."""
        if self.is_ending and not os.path.exists(self.paths.finished) and was_finished(self.folder.out, self.fact):
            finished = Phrase.of("It is finished: ", Call("verify"), " checks it.")
            found = f"{self.folder.out}, of which no job is unfinished"
            raise ArgumentError("path", found, "the output of an unfinished job", finished)

    @property
    def is_worked_on(self) -> bool:
        """Whether a process may be working on it, as far as can be known at once."""
        return any(living(self.folder, Observer(self.folder.path)))


def _finished(plan: Plan, record: LaneRecord) -> Iterator[Place]:
    """The rows of the tasks before the lane's position that these have finished; where lanes meet, none."""
    if plan.lanes_meet:
        return
    everything, at = (Range(0, plan.problem.key_tokens),), record.position
    order = Schedule.of(plan, record.lane)
    for index in takewhile(lambda index: index <= at.group, order.own_groups()):
        group, cover = plan.groups[index], order.cover_of(index)
        for task in takewhile(lambda task: (index, task) < (at.group, at.task), order.tasks(index)):  # noqa: B023
            for rows in cover.finished_by(task):
                yield Place(group, rows, rows, everything, finished=True)


def _unfinished(plan: Plan, record: LaneRecord, lane: int) -> Iterator[Place]:
    """The rows with a saved state, and what they have seen: from the order of the work, up to the lane's position."""
    order = Schedule.of(plan, lane)
    by_group: dict[int, set[int]] = {}
    for number, start in record.versions:
        by_group.setdefault(number, set()).add(start)
    for number, saved in sorted(by_group.items()):
        group = plan.groups[number]
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
