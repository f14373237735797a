"""Everything of a run that holds memory on a GPU or feeds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
from cupy.cuda.runtime import CUDARuntimeError
from cupy_backends.cuda.api.driver import CUDADriverError

from ...errors import DeviceError
from ...kernels.base import KeyBlock
from ...kernels.cuda.kernel import CudaKernel
from ...planner import Group, Plan, Problem
from ...planner.memory import DISK, HOST, OUTPUT_SLOTS, PINNED_PIECES, READER_THREADS, output_slot, output_tile
from ...ranges import Range
from ...storage import ArraySink
from ...storage.dtypes import SUPPORTED
from ...wording import Choice
from ...workers import Workers, kept_workers
from ..resident import Inputs, Operands
from ..results import OutputResults, Results, StatisticsResults
from ..schedule import Work
from ..statefile import StateFile
from ..states import scratch_file
from .crew import Crew, at_work
from .departures import Departures
from .lanes import Lanes
from .link import Link
from .memory import Arena, PinnedPieces, pinned
from .pages import Access, DevicePages, access_to
from .results import DeviceArrayOutput, DeviceOutput, DeviceResults, DeviceStatistics, DeviceTiles, Finished
from .states import DeviceStates, NoStates, PinnedStates, Saved, StatesOnDisk, WaitingPlace
from .transfer import Transfers, open_transfers

LANES = 2
# Files are read ahead into the page cache: a group of heads needs most of its blocks in the first part of its time.
READ_AHEAD_BYTES = 1 << 30


@dataclass(slots=True)
class DeviceResident:
    """As ``Resident``, on a GPU: calls put work on its streams, and wait only for blocks to be on their way there."""

    kernel: CudaKernel
    operands: Operands[DevicePages]
    states: DeviceStates | NoStates
    results: DeviceResults
    lanes: Lanes
    link: Link
    problem: Problem
    read_ahead_bytes: int | None
    group: Group | None = None  # the one that is computed

    def begin(self, group: Group) -> None:
        """Turn to another group of heads; rows of the last one may still be on their way out."""
        self.operands.begin(group)
        self.states.begin(group)
        self.group = group

    def attend(
        self, work: Work, queries: Any, blocks: list[KeyBlock], done: Callable[[Range], None], upcoming: Work | None
    ) -> None:
        """Put a launch with the blocks of ``work``, which were loaded last, on the lane of its rows."""
        step, part = work.step, work.rows
        assert step is not None
        assert self.group is not None, "begin() comes first"
        self.link.start()
        _preload(self.operands, self.link, upcoming)
        lane = self.lanes.of(self.group, step.queries)
        state = self.states.load(step.queries, part, lane)
        finish = self.results.whole(self.group, step.queries, part) if state.statistics is None else None
        rows = slice(part.start - step.queries.start, part.stop - step.queries.start)

        def loaded() -> None:
            for pages in self.operands:
                pages.await_loaded(lane)

        with lane:
            used = self.kernel.accumulate(
                queries[:, :, rows], part.start, blocks, state.statistics, diagonal=self.problem.mask.diagonal,
                scale=self.problem.scale, done=done, fresh=state.fresh, finish=finish, loaded=loaded,
            )  # fmt: skip
        self.states.store(step.queries, part, used)
        for pages in self.operands:
            pages.release(lane, used)
        _preload(self.operands, self.link, upcoming)  # the rest, in places of blocks that this launch reads
        if upcoming is not None and upcoming.step is not None and upcoming.group == self.group:
            self.states.preload(upcoming.step.queries)

    def catch_up(self) -> bool:
        """Wait for the launch that was put on the device first; False where none is under way."""
        return self.kernel.catch_up()

    def take(self, group: Group, rows: Range, *, in_place: bool) -> None:
        """Hand out ``rows``, which are finished once their lane has come so far."""
        lane = self.lanes.leave(group, rows)
        state, release = self.states.finish(rows, lane)
        self.results.take(Finished(group, rows, state, lane, release))

    def settle(self) -> None:
        """Return once the device has done what was put on it and the rows handed out are written."""
        self.results.drain()
        cupy.cuda.Device().synchronize()

    def save(self) -> None:
        """Write the states that have changed to the file of the job."""
        self.states.save()

    def drain(self) -> None:
        """Wait for everything; meanwhile what brings blocks ends, for nothing is asked for any more."""
        self.link.close()
        self.kernel.drain()
        self.results.drain()
        self.lanes.synchronize()


def allocate_on_device(
    plan: Plan, inputs: Inputs, results: Results, saved: StateFile | None, first: Work | None, stack: ExitStack
) -> DeviceResident:
    """Exactly the terms of the plan's two memory tables; ``stack`` gives them back.

    The blocks of ``first``, what is computed first, begin to come before the rest is allocated.
    """
    stack.enter_context(_translated_errors(plan.device))
    device = stack.enter_context(cupy.cuda.Device(int(plan.device.removeprefix("cuda:"))))
    device.use()  # a thread that has used none yet has no context, which compiled code asks for
    problem, accesses = plan.problem, tuple(access_to(source) for source in (inputs.q, inputs.k, inputs.v))
    transfers = _transfers(accesses, results, plan.problem)
    arena = stack.enter_context(closing(Arena()))
    pieces = stack.enter_context(closing(PinnedPieces(PINNED_PIECES)))
    # Whatever fails, nothing is given back while a copy or kernel still uses it.
    stack.callback(device.synchronize)
    link = _link(accesses, device, pieces, transfers, stack)
    arena.allocate(plan.memory_bytes)  # takes the driver as long as threads to begin
    lanes = _lanes(plan)
    operands = _operands(inputs, accesses, plan, link, arena)
    _preload(operands, link, first)
    kernel = CudaKernel(problem.q.dtype, head_dim=problem.head_dim, value_dim=problem.value_dim, scale=problem.scale)
    stack.enter_context(closing(kernel))
    writers = stack.enter_context(kept_workers(OUTPUT_SLOTS, "output"))
    outgoing = stack.enter_context(closing(_outgoing(plan, results, kernel, arena, transfers, writers)))
    kept = None if saved is None else Saved(saved, pieces)
    states = stack.enter_context(closing(_states(plan, outgoing.home, arena, kept, stack)))
    ahead = READ_AHEAD_BYTES if problem.on_disk_bytes else None
    return DeviceResident(kernel, operands, states, outgoing, lanes, link, problem, ahead)


def _lanes(plan: Plan) -> Lanes:
    """Streams that begin after what is on the caller's: arrays may still be computed there."""
    ranges = plan.chosen.query_parts * len(plan.groups)
    before = cupy.cuda.get_current_stream().record()
    lanes = Lanes(tuple(cupy.cuda.Stream(non_blocking=True) for _ in range(min(LANES, ranges))))
    for stream in lanes.streams:
        stream.wait_event(before)
    return lanes


def _link(
    accesses: tuple[Access, ...],
    device: cupy.cuda.Device,
    pieces: PinnedPieces,
    transfers: Transfers | None,
    stack: ExitStack,
) -> Link:
    """With threads for blocks that are sent, and threads for those that are read, in all as many as planned."""
    both = Access.SENT in accesses and Access.READ in accesses
    size = max(1, READER_THREADS // 2) if both else READER_THREADS
    copies = cupy.cuda.Stream(non_blocking=True)
    readers = stack.enter_context(kept_workers(size, "reader")) if Access.READ in accesses else None
    crew = None
    if Access.SENT in accesses:
        assert transfers is not None, "an array of the host"
        crew = stack.enter_context(at_work(Crew(transfers, pieces, copies, size)))
    return stack.enter_context(closing(Link(device, pieces, copies, crew, readers)))


def _operands(
    inputs: Inputs, accesses: tuple[Access, ...], plan: Plan, link: Link, arena: Arena
) -> Operands[DevicePages]:
    size, (q, k, v) = plan.chosen.residency, accesses
    key_size = {"slots": size.key_slots, "tokens": size.key_chunk, "heads": size.heads}
    query_size = {"slots": size.query_slots, "tokens": size.query_chunk, "heads": size.heads}
    keys = DevicePages(inputs.k, k, link, arena, **key_size)
    values = DevicePages(inputs.v, v, link, arena, **key_size)
    return Operands(DevicePages(inputs.q, q, link, arena, **query_size), keys, values)


def _preload(operands: Operands[DevicePages], link: Link, work: Work | None) -> None:
    """Begin to bring blocks of ``work``, as far as there is room beside what is loaded."""
    if work is None or work.step is None or not work.begins_step:
        return
    for pages, tokens in operands.of(work.step):
        pages.preload(work.group, tokens)
    link.start()


def _states(
    plan: Plan, home: Any | None, arena: Arena, saved: Saved | None, stack: ExitStack
) -> DeviceStates | NoStates:
    if plan.no_states:
        return NoStates()
    chosen, problem = plan.chosen, plan.problem
    size, dtype = chosen.residency, problem.compute_dtype
    elements = size.heads * size.query_chunk * size.state_row_bytes // problem.compute_itemsize
    waiting: WaitingPlace | None = None
    if chosen.states == HOST:
        waiting = PinnedStates()
    elif chosen.states == DISK:
        passing = pinned(elements * problem.compute_itemsize)
        if saved is None:
            row_bytes = size.heads * size.state_row_bytes
            file = scratch_file(plan.budget.scratch, problem.query_tokens, row_bytes)
            stack.enter_context(closing(file))
        waiting = StatesOnDisk(file if saved is None else saved.file, passing)
    slots = [arena.take(elements, dtype) for _ in range(size.state_slots)]
    return DeviceStates(slots, problem.value_dim, home=home, waiting=waiting, saved=saved)


def _transfers(accesses: tuple[Access, ...], results: Results, problem: Problem) -> Transfers | None:
    """For arrays of the host, from or to which something is copied; None where there is none."""
    into = isinstance(results, OutputResults) and not problem.result.on_device and isinstance(results.sink, ArraySink)
    return open_transfers() if into or Access.SENT in accesses else None


def _outgoing(
    plan: Plan,
    results: Results,
    kernel: CudaKernel,
    arena: Arena,
    transfers: Transfers | None,
    writers: Workers,
) -> DeviceResults:
    problem, holds_states = plan.problem, plan.states_in_result
    if isinstance(results, StatisticsResults):
        return DeviceStatistics(results.statistics, holds_states=holds_states)
    assert isinstance(results, OutputResults)
    if problem.result.on_device:
        assert isinstance(results.sink, ArraySink)
        return DeviceArrayOutput(results.sink.out, kernel, holds_states=holds_states)
    dtype = SUPPORTED[problem.result.dtype]
    slot = output_slot(problem, plan.chosen.residency)
    as_it_is = isinstance(results.sink, ArraySink) and not slot.lse_itemsize and _takes(results.sink.out, dtype)
    device, sent_by = cupy.cuda.Device(), transfers if as_it_is else None
    departures = Departures(results.sink, sent_by, writers, device, slot.locked_bytes)
    if plan.no_states:
        return DeviceTiles(departures, arena, dtype, output_tile(problem, plan.chosen.residency))
    return DeviceOutput(departures, kernel, arena, slot, dtype)


def _takes(array: Any, dtype: np.dtype) -> bool:
    """Whether vectors of ``dtype`` become those of ``array`` by copying their bytes."""
    return array.dtype == dtype and (array.shape[3] == 1 or array.strides[3] == dtype.itemsize)


@contextmanager
def _translated_errors(device: str) -> Iterator[None]:
    """What CUDA reports becomes an error of ours that names the device."""
    try:
        yield
    except (CUDARuntimeError, CUDADriverError) as error:
        said = f"{device}: {error}. The run was stopped; compute on the CPU with "
        raise DeviceError(said, Choice("device", "cpu"), ".") from error
