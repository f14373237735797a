"""Putting the lanes of a job together where they have seen different keys of the same rows."""

from __future__ import annotations

from contextlib import ExitStack, closing

from ..block_statistics import BlockStatistics
from ..engine import OutputResults
from ..engine.statefile import StateFile
from ..engine.states import StateBlock
from ..planner import Group, Plan
from ..ranges import Range
from .ledger import Ledger
from .record import read_lane
from .states import open_lane_states


def merge_lanes(plan: Plan, ledger: Ledger, directory: str, key: str, results: OutputResults) -> None:
    """Hand every row to ``results``: the states of its lanes, merged in the order of the lanes.

    It reads two states at a time, and may be done again: the same states give the same rows.
    """
    chosen, problem, cut = plan.chosen, plan.problem, plan.build_cover().queries
    block = StateBlock(cut.longest, chosen.batches * chosen.heads, problem.value_dim, problem.compute_dtype)
    with ExitStack() as stack:
        lanes = []
        for lane in range(plan.lanes):
            states = stack.enter_context(closing(open_lane_states(directory, key, plan, lane)))
            states.restore(read_lane(ledger, lane).versions)
            lanes.append(states)
        for group in plan.groups:
            for states in lanes:
                states.begin(group.index)
            for chunk in map(cut.__getitem__, range(len(cut))):
                if len(chunk):
                    results.take(group, chunk, _merged(lanes, block, group, chunk), in_place=False)


def _merged(lanes: list[StateFile], block: StateBlock, group: Group, chunk: Range) -> BlockStatistics:
    """The state of a chunk over the keys of all lanes; those that no lane has seen are empty."""
    state, flat = block.view(group, Range(0, len(chunk)))
    merged = None
    for states in lanes:
        if states.rows_of(chunk):
            states.read(chunk, flat)
            merged = (
                BlockStatistics(state.acc.copy(), state.m.copy(), state.l.copy())
                if merged is None
                else (merged.merge(state))
            )
    return merged or BlockStatistics.empty(state.m.shape, state.acc.shape[-1], state.acc.dtype)
