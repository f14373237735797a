"""The serial executor: runs a plan, one step after the other, on the CPU or a GPU. Start reading at ``run``.

On a GPU the loop is the same and runs ahead of the device: blocks, kernels and results are only put on its streams.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from ..cover import Cover, Step
from ..kernels.base import KeyBlock
from ..planner import Group, Plan
from ..ranges import Range
from .progress import Progress
from .resident import Inputs, Resident, allocate
from .results import Results


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run took and moved."""

    elapsed_s: float
    flops: int
    input_read_bytes: int
    state_moved_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """One step of one group of heads; ``ends_task`` is the task that it completes. A dead task has no step."""

    group: Group
    step: Step | None
    ends_task: int | None


def run(plan: Plan, inputs: Inputs, results: Results, progress: Progress) -> RunReport:
    """Compute every row of the plan's problem and hand it to ``results`` once its last key has been seen."""
    start, before = time.perf_counter(), _bytes_read(inputs)
    cover = plan.build_cover()
    with ExitStack() as stack:
        in_place = plan.states_in_result and results.home is not None
        resident = allocate(plan, inputs, results, results.home if in_place else None, stack)
        ahead = stack.enter_context(closing(ReadAhead(resident)))
        current = None
        for work, upcoming in pairwise(chain(schedule(plan.groups, cover), (None,))):
            assert work is not None
            if work.group is not current:
                resident.begin(current := work.group)
            if work.step is not None:
                blocks = resident.load(work.step)
                ahead.request(upcoming)  # only now is it known which blocks this step has driven out
                with resident.lane(work.step):
                    _attend(plan, resident, work.step, *blocks, progress)
                if upcoming is not None and upcoming.step is not None:
                    resident.preload(upcoming.group, upcoming.step)
            if work.ends_task is not None:
                for rows in cover.finished_by(work.ends_task):
                    resident.take(work.group, rows, in_place=in_place)
        resident.drain()
        moved = resident.states.moved_bytes
    return RunReport(time.perf_counter() - start, plan.problem.flops, _bytes_read(inputs) - before, moved)


def schedule(groups: tuple[Group, ...], cover: Cover) -> Iterator[Work]:
    """The order of the work, made one step at a time."""
    for group in groups:
        for task in cover.tasks():
            step = None
            for step, following in pairwise(chain(task.steps(), (None,))):
                yield Work(group, step, None if following else task.index)
            if step is None:
                yield Work(group, None, task.index)


def _attend(
    plan: Plan, resident: Resident, step: Step, queries: Any, blocks: list[KeyBlock], progress: Progress
) -> None:
    """Merge the statistics of one query range against its key ranges into its state."""
    mask = plan.problem.mask
    state = resident.states.load(step.queries)

    def done(rows: Range) -> None:
        progress.advance(sum(mask.pairs(rows, tokens) for tokens in step.keys))

    resident.kernel.accumulate(
        queries, step.queries.start, blocks, state, diagonal=mask.diagonal, scale=plan.problem.scale, done=done
    )
    resident.states.store(step.queries, state)


class ReadAhead:
    """Has the next step's blocks read into the page cache while this step computes; never waits for it."""

    def __init__(self, resident: Resident) -> None:
        self._resident = resident
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cqsa-ahead")
        self._pending: Future[None] | None = None

    def request(self, work: Work | None) -> None:
        """Read ahead for ``work``, unless the last request is still under way; an error of that one is raised."""
        if self._pending is not None and self._pending.done():
            self._pending.result()
            self._pending = None
        if self._pending is None and work is not None and work.step is not None:
            self._pending = self._pool.submit(self._resident.prefetch, work.group, work.step)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _bytes_read(inputs: Inputs) -> int:
    return sum(source.bytes_read for source in {id(s): s for s in (inputs.q, inputs.k, inputs.v)}.values())
