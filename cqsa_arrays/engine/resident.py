"""Everything of a run that holds memory: where blocks and states are, and the kernel that computes on them."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..cover import Step
from ..kernels.base import Kernel, KeyBlock
from ..planner import Group, Plan
from ..ranges import Range
from ..storage import TokenSource
from .pages import Pages
from .results import Results
from .states import StateStore, open_states


@dataclass(frozen=True, slots=True)
class Inputs:
    """The three sources of one problem."""

    q: TokenSource
    k: TokenSource
    v: TokenSource


class Blocks(Protocol):
    """The resident blocks of one input; see ``Pages`` and ``cuda.pages.DevicePages``."""

    def begin(self, group: Group) -> None:
        """Serve the heads of ``group`` from now on."""

    def load(self, tokens: Range) -> Any:
        """The block (batch, heads, tokens, dim) of the group."""

    def prefetch(self, group: Group, tokens: Range) -> None:
        """Ask the system to read a block ahead; for another thread."""


@dataclass(frozen=True, slots=True)
class Resident:
    """What ``executor.run`` works with on the CPU; ``cuda.resident`` has the same on a GPU."""

    kernel: Kernel
    queries: Blocks
    keys: Blocks
    values: Blocks
    states: StateStore
    results: Results

    def begin(self, group: Group) -> None:
        """Turn to another group of heads."""
        for part in (self.queries, self.keys, self.values, self.states):
            part.begin(group)

    def load(self, step: Step) -> tuple[Any, list[KeyBlock]]:
        """The blocks of ``step``, read unless they are resident."""
        queries = self.queries.load(step.queries)
        return queries, [KeyBlock(r.start, self.keys.load(r), self.values.load(r)) for r in step.keys]

    def lane(self, step: Step) -> AbstractContextManager[None]:
        """Where the kernel is called with the blocks of ``step``, which were loaded last."""
        return nullcontext()

    def take(self, group: Group, rows: Range, *, in_place: bool) -> None:
        """Hand out ``rows``, which are finished."""
        self.results.take(group, rows, self.states.load(rows), in_place=in_place)

    def prefetch(self, group: Group, step: Step) -> None:
        """Ask for the input blocks of ``step`` to be read ahead; called from another thread."""
        self.queries.prefetch(group, step.queries)
        for tokens in step.keys:
            self.keys.prefetch(group, tokens)
            self.values.prefetch(group, tokens)

    def preload(self, group: Group, step: Step) -> None:
        """Bring the blocks of the next step over while this one computes, where that is another memory."""

    def drain(self) -> None:
        """Wait for work that is under way."""


def allocate(plan: Plan, inputs: Inputs, results: Results, home: np.ndarray | None, stack: ExitStack) -> Resident:
    """Exactly the terms of the plan's memory table; ``stack`` gives them back."""
    if plan.device != "cpu":
        from .cuda.resident import allocate_on_device

        return allocate_on_device(plan, inputs, results, stack)
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
        results,
    )
