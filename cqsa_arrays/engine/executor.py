"""The serial executor: runs a plan, one step after the other, on the CPU or a GPU. Start reading at ``run``.

On a GPU the loop is the same and runs ahead of the device: blocks, kernels and results are only put on its streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, pairwise

from ..cover import Cover, Step
from ..planner import Group, Plan
from ..ranges import Range
from .ahead import ReadAhead, Work
from .allocation import allocate
from .progress import Progress
from .resident import Inputs
from .results import Results


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run took and moved."""

    elapsed_s: float
    flops: int
    input_read_bytes: int
    state_moved_bytes: int


def run(plan: Plan, inputs: Inputs, results: Results, progress: Progress) -> RunReport:
    """Compute every row of the plan's problem and hand it to ``results`` once its last key has been seen."""
    start, before = time.perf_counter(), _bytes_read(inputs)
    cover = plan.build_cover()
    with ExitStack() as stack:
        in_place = plan.states_in_result and results.home is not None
        resident = allocate(plan, inputs, results, results.home if in_place else None, stack)
        works = schedule(plan.groups, cover)
        ahead = stack.enter_context(closing(ReadAhead(works, resident.operands, resident.read_ahead_bytes)))
        current = None
        for work, upcoming in ahead:
            if work.group is not current:
                resident.begin(current := work.group)
            if work.step is not None:
                blocks = resident.operands.load(work.step)
                ahead.request()  # only now is it known which blocks this step has driven out
                resident.attend(work.step, *blocks, _tell(plan, work.step, progress))
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


def _tell(plan: Plan, step: Step, progress: Progress) -> Callable[[Range], None]:
    """Counts the pairs of ``step`` of which one head has finished some rows; called from any thread."""
    mask = plan.problem.mask

    def done(rows: Range) -> None:
        progress.advance(sum(mask.pairs(rows, tokens) for tokens in step.keys))

    return done


def _bytes_read(inputs: Inputs) -> int:
    return sum(source.bytes_read for source in {id(s): s for s in (inputs.q, inputs.k, inputs.v)}.values())
