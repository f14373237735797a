"""The serial executor: runs a plan, one step after the other, on the CPU or a GPU. Start reading at ``run``.

On a GPU the loop is the same and runs ahead of the device: it waits for blocks to be on their way there, not for work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

from ..planner import Plan
from ..ranges import Range
from .ahead import ReadAhead
from .allocation import allocate
from .checkpoint import NO_CHECKPOINT, Checkpoint
from .pace import Pace, parts
from .progress import Progress
from .resident import Inputs
from .results import Results
from .schedule import Schedule, Work


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run took and moved."""

    elapsed_s: float
    flops: int
    input_read_bytes: int
    state_moved_bytes: int

    @property
    def rate(self) -> float:
        """Floating-point operations a second."""
        return self.flops / max(self.elapsed_s, 1e-9)

    def __add__(self, other: RunReport) -> RunReport:
        return RunReport(
            self.elapsed_s + other.elapsed_s, self.flops + other.flops,
            self.input_read_bytes + other.input_read_bytes, self.state_moved_bytes + other.state_moved_bytes,
        )  # fmt: skip


def run(
    plan: Plan,
    inputs: Inputs,
    results: Results,
    progress: Progress,
    checkpoint: Checkpoint = NO_CHECKPOINT,
    lane: int = 0,
) -> RunReport:
    """Compute the rows of one lane and hand each to ``results`` once its last key has been seen.

    Where the tasks of a group are shared by several lanes, its states are left in the file of ``checkpoint`` instead.
    """
    start, before = time.perf_counter(), _bytes_read(inputs)
    order = Schedule.of(plan, lane)
    with ExitStack() as stack:
        in_place = plan.states_in_result and results.home is not None
        first = next(order.works(checkpoint.start), None)
        resident = allocate(plan, inputs, results, checkpoint.states, first, stack)
        works = order.works(checkpoint.start)
        ahead = stack.enter_context(closing(ReadAhead(works, resident.operands, resident.read_ahead_bytes)))
        current, pace = None, Pace(plan)
        for work, upcoming in parts(ahead, pace.rows):
            checkpoint.reached(work.position, resident)
            if work.group != current:
                resident.begin(current := work.group)
            if work.step is not None:
                blocks = resident.operands.load(work.step)
                ahead.request()  # only now is it known which blocks this step has driven out
                pace.begun(work.pairs(plan.problem.mask))
                resident.attend(work, *blocks, _tell(plan, work, pace, progress), upcoming)
                while pace.is_ahead and resident.catch_up():
                    pass
            checkpoint.done(work)
            if work.ends_task is not None and not plan.lanes_meet:
                for rows in order.cover_of(work.group.index).finished_by(work.ends_task):
                    resident.take(work.group, rows, in_place=in_place)
                    checkpoint.finished(work.group.index, rows)
            elif work.ends_group:
                resident.settle()
                resident.save()
        checkpoint.reached(order.end, resident)
        resident.drain()
        moved = resident.states.moved_bytes
    return RunReport(time.perf_counter() - start, plan.problem.flops, _bytes_read(inputs) - before, moved)


def _tell(plan: Plan, work: Work, pace: Pace, progress: Progress) -> Callable[[Range], None]:
    """Counts the pairs of ``work`` of which one head has finished some rows; called from any thread."""
    mask, keys = plan.problem.mask, work.step.keys if work.step is not None else ()

    def done(rows: Range) -> None:
        pairs = sum(mask.pairs(rows, tokens) for tokens in keys)
        pace.done(pairs)
        progress.advance(pairs)

    return done


def _bytes_read(inputs: Inputs) -> int:
    return sum(source.bytes_read for source in {id(s): s for s in (inputs.q, inputs.k, inputs.v)}.values())
