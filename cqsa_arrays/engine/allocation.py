"""Taking the memory of a plan, on the CPU or a GPU."""

from __future__ import annotations

from contextlib import ExitStack, closing

import numpy as np

from .. import buffers
from ..forks import preload
from ..planner import Plan
from ..workers import stack_bytes
from .pages import Pages
from .resident import HostResident, Inputs, Operands, Resident
from .results import Results
from .schedule import Work
from .statefile import StateFile
from .states import open_states

# By how much the C heap grows during a run, besides what the plan counts: Python's objects, HDF5's.
HEAP_BYTES = 8 << 20


def make_ready(plan: Plan) -> None:
    """Load the kernel of a run on the CPU, and see that the system has room for all of the run; to be called first.

    Where memory is refused later, nothing good comes of it: LLVM ends the process, and Python waits for ever for a
    thread that could not begin. Raises MemoryError. Nothing is kept, and no page is touched.
    """
    if plan.device == "cpu":
        preload("cqsa_arrays.kernels.cpu.kernel")
        from ..kernels.cpu.kernel import load

        load(plan.problem.compute_dtype)
        threads = 2 * plan.chosen.residency.threads + 3  # of kernel and output; read-ahead, progress bar, commits
        buffers.allocate(plan.memory_bytes + threads * stack_bytes() + HEAP_BYTES, np.uint8)


def allocate(
    plan: Plan, inputs: Inputs, results: Results, saved: StateFile | None, first: Work | None, stack: ExitStack
) -> Resident:
    """Exactly the terms of the plan's memory table; ``stack`` gives them back.

    ``saved`` has the states of a job. ``first`` is computed first: where blocks are copied to another memory, its are
    on their way when this returns.
    """
    if plan.device != "cpu":
        from .cuda.resident import allocate_on_device

        return allocate_on_device(plan, inputs, results, saved, first, stack)
    from ..kernels.cpu.kernel import CpuKernel

    problem, size = plan.problem, plan.chosen.residency
    dtype = problem.compute_dtype
    kernel = CpuKernel(
        dtype, rows=size.query_chunk, head_dim=problem.head_dim, value_dim=problem.value_dim, threads=size.threads,
        least_items=-(-2 * size.threads // size.heads),
    )  # fmt: skip
    stack.enter_context(closing(kernel))
    home = results.home if plan.states_in_result else None
    states = stack.enter_context(closing(open_states(plan, home, saved)))
    operands = Operands(
        Pages(inputs.q, slots=1, tokens=size.query_chunk, heads=size.heads, dtype=dtype),
        Pages(inputs.k, slots=size.key_slots, tokens=size.key_chunk, heads=size.heads, dtype=dtype),
        Pages(inputs.v, slots=size.key_slots, tokens=size.key_chunk, heads=size.heads, dtype=dtype),
    )
    return HostResident(kernel, operands, states, results, problem)
