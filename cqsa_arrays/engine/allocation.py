"""Taking the memory of a plan, on the CPU or a GPU."""

from __future__ import annotations

from contextlib import ExitStack, closing

import numpy as np

from ..planner import Plan
from .pages import Pages
from .resident import HostResident, Inputs, Operands, Resident
from .results import Results
from .statefile import StateFile
from .states import open_states


def allocate(
    plan: Plan, inputs: Inputs, results: Results, home: np.ndarray | None, saved: StateFile | None, stack: ExitStack
) -> Resident:
    """Exactly the terms of the plan's memory table; ``stack`` gives them back. ``saved`` has the states of a job."""
    if plan.device != "cpu":
        from .cuda.resident import allocate_on_device

        return allocate_on_device(plan, inputs, results, saved, stack)
    from ..kernels.cpu.kernel import CpuKernel

    problem, size = plan.problem, plan.chosen.residency
    dtype = problem.compute_dtype
    kernel = CpuKernel(
        dtype, rows=size.query_chunk, head_dim=problem.head_dim, value_dim=problem.value_dim, threads=size.threads
    )
    stack.enter_context(closing(kernel))
    states = stack.enter_context(closing(open_states(plan, home, saved)))
    operands = Operands(
        Pages(inputs.q, slots=1, tokens=size.query_chunk, heads=size.heads, dtype=dtype),
        Pages(inputs.k, slots=size.key_slots, tokens=size.key_chunk, heads=size.heads, dtype=dtype),
        Pages(inputs.v, slots=size.key_slots, tokens=size.key_chunk, heads=size.heads, dtype=dtype),
    )
    return HostResident(kernel, operands, states, results, problem)
