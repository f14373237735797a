"""The order of the work, made one piece at a time from a place in it: a run may begin anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise

from ..cover import Cover, Step, Task
from ..planner import Group
from ..ranges import Range


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place between two pieces of work: what comes before it is done. ``rows`` of the step's queries are."""

    group: int = 0
    task: int = 0
    step: int = 0
    rows: int = 0


BEGIN = Position()


@dataclass(frozen=True, slots=True)
class Work:
    """Some rows of one step of one group of heads. A dead task has no step.

    ``ends_task`` is the task that it completes, ``ends_group``: nothing of the group comes after it in this lane.
    """

    position: Position
    group: Group
    step: Step | None
    rows: Range
    ends_task: int | None
    ends_group: bool

    @property
    def begins_step(self) -> bool:
        return self.step is not None and self.rows.start == self.step.queries.start

    @property
    def ends_step(self) -> bool:
        return self.step is not None and self.rows.stop == self.step.queries.stop


@dataclass(frozen=True, slots=True)
class Schedule:
    """The work of one of ``lanes`` lanes, which share the tasks of every group evenly; each keeps the plan's order.

    A step is handed out in parts of at most ``part_rows`` query rows (None: whole): between two of them a run can stop
    and save its states, and no part changes what another computes. ``edges`` are the covers of the first and of the
    last group, where those have their own.
    """

    groups: tuple[Group, ...]
    cover: Cover
    part_rows: int | None = None
    lanes: int = 1
    lane: int = 0
    edges: tuple[Cover, Cover] | None = None

    def cover_of(self, group: int) -> Cover:
        """The cover of the group with that index."""
        if self.edges is None or 0 < group < len(self.groups) - 1:
            return self.cover
        return self.edges[group > 0]

    @property
    def end(self) -> Position:
        """Where everything is done."""
        return Position(len(self.groups))

    def works(self, start: Position = BEGIN) -> Iterator[Work]:
        """Everything from ``start`` on."""
        for index in range(start.group, len(self.groups)):
            resumed = index == start.group
            first = max(start.task if resumed else 0, (self.lane - index) % self.lanes)
            cover = self.cover_of(index)
            tasks = chain(range(first, cover.task_count, self.lanes), (None,))
            for task, following in pairwise(tasks):
                assert task is not None
                at = start if resumed and task == start.task else Position(index, task)
                yield from self._of_task(at, cover.task(task), following is None)

    def _of_task(self, start: Position, task: Task, last: bool) -> Iterator[Work]:
        group, step = self.groups[start.group], None
        steps = islice(task.steps(), start.step, None)
        for number, (step, following) in enumerate(pairwise(chain(steps, (None,))), start.step):
            assert step is not None
            rows = Range(step.queries.start + (start.rows if number == start.step else 0), step.queries.stop)
            for part in rows.split(self.part_rows or len(rows)):
                position = Position(start.group, task.index, number, part.start - step.queries.start)
                ends = following is None and part.stop == rows.stop
                yield Work(position, group, step, part, task.index if ends else None, ends and last)
        if step is None:
            yield Work(Position(start.group, task.index), group, None, Range(0, 0), task.index, last)
