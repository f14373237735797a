"""Everything of a run that holds memory on a GPU or feeds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import cupy
from cupy.cuda.driver import CUDADriverError
from cupy.cuda.runtime import CUDARuntimeError

from ...cover import Step
from ...errors import DeviceError
from ...kernels.cuda.kernel import CudaKernel
from ...planner import Group, Plan
from ...planner.memory import PINNED_PIECE_BYTES, PINNED_PIECES, READER_THREADS, output_slot
from ...ranges import Range
from ...storage import ArraySink, DeviceSource
from ...storage.dtypes import SUPPORTED
from ...workers import Workers
from ..resident import Inputs, Resident
from ..results import OutputResults, Results, StatisticsResults
from ..states import open_states
from .lanes import Lanes
from .memory import Arena, PinnedPieces
from .pages import DevicePages, Link
from .results import DeviceArrayOutput, DeviceOutput, DeviceStatistics


@dataclass(frozen=True, slots=True)
class DeviceResident(Resident):
    """Blocks, states and kernel on a GPU; every call only puts work on its streams."""

    kernel: CudaKernel
    queries: DevicePages
    keys: DevicePages
    values: DevicePages
    lanes: Lanes

    def begin(self, group: Group) -> None:
        Resident.begin(self, group)
        self.lanes.fork()

    @contextmanager
    def lane(self, step: Step) -> Iterator[None]:
        stream = self.lanes.take(step.queries)
        pages = (self.queries, self.keys, self.values)
        for each in pages:
            each.await_loaded(stream)
        with stream:
            yield
        for each in pages:
            each.release(stream)
        self.lanes.launched(step.queries, stream)

    def take(self, group: Group, rows: Range, *, in_place: bool) -> None:
        self.lanes.join()
        Resident.take(self, group, rows, in_place=in_place)

    def preload(self, group: Group, step: Step) -> None:
        """Nothing of the step that is computed gives way: its blocks were used last."""
        self.queries.preload(group, step.queries)
        for tokens in step.keys:
            self.keys.preload(group, tokens)
            self.values.preload(group, tokens)

    def drain(self) -> None:
        self.lanes.join()
        self.kernel.drain()
        self.results.drain()
        cupy.cuda.get_current_stream().synchronize()


def allocate_on_device(plan: Plan, inputs: Inputs, results: Results, stack: ExitStack) -> DeviceResident:
    """Exactly the terms of the plan's two memory tables; ``stack`` gives them back."""
    stack.enter_context(_translated_errors(plan.device))
    device = stack.enter_context(cupy.cuda.Device(int(plan.device.removeprefix("cuda:"))))
    before = cupy.cuda.get_current_stream()
    compute = stack.enter_context(cupy.cuda.Stream(non_blocking=True))
    compute.wait_event(before.record())  # arrays of the caller's may still be computed there
    arena = stack.enter_context(closing(Arena(plan.memory_bytes)))
    streamed = not all(isinstance(source, DeviceSource) for source in (inputs.q, inputs.k, inputs.v))
    pieces = PinnedPieces(PINNED_PIECES, PINNED_PIECE_BYTES) if streamed else None
    readers = stack.enter_context(closing(Workers(READER_THREADS, "reader")))
    # Whatever fails, nothing is given back while a copy or kernel still uses it.
    stack.callback(device.synchronize)
    link = Link(device, arena, pieces, readers, cupy.cuda.Stream(non_blocking=True), compute)
    problem, size = plan.problem, plan.chosen.residency
    kernel = CudaKernel(problem.q.dtype, head_dim=problem.head_dim, value_dim=problem.value_dim, scale=problem.scale)
    stack.enter_context(closing(kernel))
    key_size = {"slots": size.key_slots, "tokens": size.key_chunk, "heads": size.heads}
    query_size = {"slots": size.query_slots, "tokens": size.query_chunk, "heads": size.heads}
    keys, values = (DevicePages(source, link, **key_size) for source in (inputs.k, inputs.v))
    queries = DevicePages(inputs.q, link, **query_size)
    states = stack.enter_context(closing(open_states(plan, None, arena.take)))
    outgoing = stack.enter_context(closing(_outgoing(plan, results, kernel, link)))
    # Launches of CQS Divide on different query chunks are independent; those of a query tile follow each other.
    lanes = Lanes(compute, 2 if plan.cover_name == "cqs" and plan.chosen.query_parts > 1 else 1)
    return DeviceResident(kernel, queries, keys, values, states, outgoing, lanes)


def _outgoing(
    plan: Plan, results: Results, kernel: CudaKernel, link: Link
) -> DeviceOutput | DeviceArrayOutput | DeviceStatistics:
    problem = plan.problem
    if isinstance(results, StatisticsResults):
        return DeviceStatistics(results, link.compute)
    assert isinstance(results, OutputResults)
    if problem.result.on_device:
        assert isinstance(results.sink, ArraySink)
        return DeviceArrayOutput(results.sink.out, kernel)
    slot = output_slot(problem, plan.chosen.residency)
    return DeviceOutput(
        results.sink, kernel, link, slot, value_dim=problem.value_dim, dtype=SUPPORTED[problem.result.dtype]
    )


@contextmanager
def _translated_errors(device: str) -> Iterator[None]:
    """What CUDA reports becomes an error of ours that names the device."""
    try:
        yield
    except (CUDARuntimeError, CUDADriverError) as error:
        raise DeviceError(f"{device}: {error}. The run was stopped; compute on the CPU with device='cpu'.") from error
