"""The serial executor: runs a plan on the CPU, one step after the other. Start reading at ``run``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from ..cover import Cover, Step
from ..kernels.base import Kernel, KeyBlock
from ..planner import Group, Plan
from ..ranges import Range
from ..storage import TokenSource
from .pages import Pages
from .progress import Progress
from .results import Results
from .states import StateStore, open_states


@dataclass(frozen=True, slots=True)
class Inputs:
    """The three sources of one problem."""

    q: TokenSource
    k: TokenSource
    v: TokenSource


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


@dataclass(frozen=True, slots=True)
class Resident:
    """Everything of a run that holds memory."""

    kernel: Kernel
    queries: Pages
    keys: Pages
    values: Pages
    states: StateStore

    def begin(self, group: Group) -> None:
        """Turn to another group of heads."""
        for part in (self.queries, self.keys, self.values, self.states):
            part.begin(group)

    def load(self, step: Step) -> tuple[np.ndarray, list[KeyBlock]]:
        """The blocks of ``step``, read unless they are resident."""
        queries = self.queries.load(step.queries)
        return queries, [KeyBlock(r.start, self.keys.load(r), self.values.load(r)) for r in step.keys]

    def prefetch(self, work: Work) -> None:
        """Ask for the input blocks of ``work`` to be read ahead; called from another thread."""
        if work.step is not None:
            self.queries.prefetch(work.group, work.step.queries)
            for tokens in work.step.keys:
                self.keys.prefetch(work.group, tokens)
                self.values.prefetch(work.group, tokens)


def run(plan: Plan, inputs: Inputs, results: Results, progress: Progress) -> RunReport:
    """Compute every row of the plan's problem and hand it to ``results`` once its last key has been seen."""
    start, before = time.perf_counter(), _bytes_read(inputs)
    cover = plan.build_cover()
    with ExitStack() as stack:
        in_place = plan.states_in_result and results.home is not None
        resident = _allocate(plan, inputs, results.home if in_place else None, stack)
        ahead = stack.enter_context(closing(ReadAhead(resident)))
        current = None
        for work, upcoming in pairwise(chain(schedule(plan.groups, cover), (None,))):
            assert work is not None
            if work.group is not current:
                resident.begin(current := work.group)
            if work.step is not None:
                queries, blocks = resident.load(work.step)
                ahead.request(upcoming)  # only now is it known which blocks this step has driven out
                _attend(plan, resident, work.step, queries, blocks, progress)
            if work.ends_task is not None:
                for rows in cover.finished_by(work.ends_task):
                    results.take(work.group, rows, resident.states.load(rows), in_place=in_place)
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
    plan: Plan, resident: Resident, step: Step, queries: np.ndarray, blocks: list[KeyBlock], progress: Progress
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


def _allocate(plan: Plan, inputs: Inputs, home: np.ndarray | None, stack: ExitStack) -> Resident:
    """Exactly the terms of the plan's memory table."""
    from ..kernels.cpu.kernel import CpuKernel

    problem, size = plan.problem, plan.chosen.residency
    dtype = problem.compute_dtype
    kernel = CpuKernel(
        dtype, rows=size.query_chunk, head_dim=problem.head_dim, value_dim=problem.value_dim, threads=size.threads
    )
    stack.enter_context(closing(kernel))
    states = stack.enter_context(closing(open_states(plan, home)))
    return Resident(
        kernel,
        Pages(inputs.q, slots=1, tokens=size.query_chunk, heads=size.heads, dtype=dtype),
        Pages(inputs.k, slots=size.key_slots, tokens=size.key_chunk, heads=size.heads, dtype=dtype),
        Pages(inputs.v, slots=size.key_slots, tokens=size.key_chunk, heads=size.heads, dtype=dtype),
        states,
    )


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
        if self._pending is None and work is not None:
            self._pending = self._pool.submit(self._resident.prefetch, work)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _bytes_read(inputs: Inputs) -> int:
    return sum(source.bytes_read for source in {id(s): s for s in (inputs.q, inputs.k, inputs.v)}.values())
