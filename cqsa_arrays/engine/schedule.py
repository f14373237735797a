"""The order of the work, made one piece at a time from a place in it: a run may begin anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import Self

from ..cover import Cover, Step, Task
from ..masks import Mask
from ..planner import Group, Plan
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
    """A step of one group of heads, or some of its rows. A dead task has no step.

    ``ends_task`` is the task that it completes, ``ends_group``: nothing of the group comes after it in this lane.
    """

    position: Position
    group: Group
    step: Step | None
    rows: Range
    ends_task: int | None
    ends_group: bool

    def pairs(self, mask: Mask, rows: int | None = None) -> int:
        """Visible (query, key) pairs of the first ``rows`` rows (None: all of them), of all heads."""
        if self.step is None:
            return 0
        first = self.rows if rows is None else Range(self.rows.start, self.rows.start + rows)
        return len(self.group.batch) * len(self.group.heads) * sum(mask.pairs(first, keys) for keys in self.step.keys)

    def cut(self, rows: int) -> tuple[Work, Work | None]:
        """The first ``rows`` rows, and what is left, if anything is."""
        if rows >= len(self.rows):
            return self, None
        middle = self.rows.start + rows
        first = replace(self, rows=Range(self.rows.start, middle), ends_task=None, ends_group=False)
        position = replace(self.position, rows=self.position.rows + rows)
        return first, replace(self, position=position, rows=Range(middle, self.rows.stop))

    @property
    def begins_step(self) -> bool:
        return self.step is not None and self.rows.start == self.step.queries.start

    @property
    def ends_step(self) -> bool:
        return self.step is not None and self.rows.stop == self.step.queries.stop


@dataclass(frozen=True, slots=True)
class Schedule:
    """The work of one of ``lanes`` lanes, which share the tasks of every group evenly; each keeps the plan's order.

    A run may stop and save its states at any row of a step, and go on from there; see ``pace``. ``edges`` are the
    covers of the first and of the last group, where those have their own.
    """

    groups: Sequence[Group]
    cover: Cover
    lanes: int = 1
    lane: int = 0
    edges: tuple[Cover, Cover] | None = None

    @classmethod
    def of(cls, plan: Plan, lane: int = 0) -> Self:
        """That of a lane of ``plan``."""
        return cls(plan.groups, plan.build_cover(), plan.lanes, lane, plan.build_edge_covers())

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
        for index in self.own_groups(start.group):
            resumed, cover, tasks = index == start.group, self.cover_of(index), self.tasks(index)
            if resumed:
                tasks = tasks[-(-max(0, start.task - tasks.start) // self.lanes) :]
            for task, following in pairwise(chain(tasks, (None,))):
                assert task is not None
                at = start if resumed and task == start.task else Position(index, task)
                yield from self._of_task(at, cover.task(task), following is None)

    def tasks(self, group: int) -> range:
        """The lane's tasks of the group with that index."""
        return range((self.lane - group) % self.lanes, self.cover_of(group).task_count, self.lanes)

    def own_groups(self, start: int = 0) -> Iterator[int]:
        """The groups from ``start`` on of which the lane may have tasks; of many groups and lanes a lane has few."""
        most = max(cover.task_count for cover in (self.cover, *(self.edges or ())))
        while start < len(self.groups):
            first = (self.lane - start) % self.lanes
            if first < most:
                yield start
            start += max(1, first - most + 1)

    def _of_task(self, start: Position, task: Task, last: bool) -> Iterator[Work]:
        group, step = self.groups[start.group], None
        steps = islice(task.steps(), start.step, None)
        for number, (step, following) in enumerate(pairwise(chain(steps, (None,))), start.step):
            assert step is not None
            rows = Range(step.queries.start + (start.rows if number == start.step else 0), step.queries.stop)
            position = Position(start.group, task.index, number, rows.start - step.queries.start)
            ends = following is None
            yield Work(position, group, step, rows, task.index if ends else None, ends and last)
        if step is None:
            yield Work(Position(start.group, task.index), group, None, Range(0, 0), task.index, last)
