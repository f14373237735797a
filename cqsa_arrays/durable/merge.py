"""Putting the lanes of a job together where they have seen different keys of the same rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import closing

import numpy as np

from ..block_statistics import BlockStatistics
from ..engine import OutputResults
from ..engine.states import StateBlock
from ..errors import START_OVER, StorageError
from ..planner import Group, Plan
from ..ranges import Range
from ..storage import RawFile
from .folder import JobPaths
from .record import LaneRecord
from .states import open_states
from .stop import Stop


def merge_lanes(plan: Plan, records: list[LaneRecord], paths: JobPaths, results: OutputResults, stop: Stop) -> None:
    """Hand every row to ``results``: the states of its lanes, merged in the order of the lanes.

    It reads two states at a time, and may be done again: the same states give the same rows. ``stop`` may end it.
    """
    chosen, problem, cut = plan.chosen, plan.problem, plan.build_cover().queries
    block = StateBlock(cut.longest, chosen.batches * chosen.heads, problem.value_dim, problem.compute_dtype)
    table = _table(plan, records, paths, stop)
    for group in plan.groups:
        for chunk in map(cut.__getitem__, range(len(cut))):
            stop.check()
            if len(chunk):
                results.take(group, chunk, _merged(table, records, paths, block, group, chunk), in_place=False)


def _table(plan: Plan, records: list[LaneRecord], paths: JobPaths, stop: Stop) -> np.ndarray:
    """A row for each state: group, first row, lane, byte in the lane's file, bytes, checksum; sorted."""
    parts = [np.empty((0, 6), np.int64)]
    for record in records:
        stop.check()
        if record.versions:
            with closing(open_states(paths.states(record.lane, record.attempt), plan, record.lane)) as states:
                where = states.where(record.versions)
            rows = [
                (*key, record.lane, where[key], version.size_bytes, version.checksum)
                for key, version in record.versions.items()
            ]
            parts.append(np.array(rows, np.int64))
    table = np.concatenate(parts)
    return table[np.lexsort(table[:, 2::-1].T)]


def _merged(
    table: np.ndarray, records: list[LaneRecord], paths: JobPaths, block: StateBlock, group: Group, chunk: Range
) -> BlockStatistics:
    """The state of a chunk over the keys of all lanes; one that no lane has touched is empty."""
    state, flat = block.view(group, Range(0, len(chunk)))
    merged = None
    for lane, position, size_bytes, checksum in _states_of(table, group.index, chunk.start):
        with closing(RawFile(paths.states(lane, records[lane].attempt), "states")) as file:
            if size_bytes == flat.nbytes:
                file.read_into(flat, position)
        if size_bytes != flat.nbytes or zlib.crc32(flat.view(np.uint8).data) != checksum:
            raise StorageError(
                f"states: what lane {lane} has of the rows from {chunk.start} on is not what was committed: the file is"
                " damaged. ", START_OVER,
            )  # fmt: skip
        merged = (
            BlockStatistics(state.acc.copy(), state.m.copy(), state.l.copy()) if merged is None else merged.merge(state)
        )
    return merged or BlockStatistics.empty(state.m.shape, state.acc.shape[-1], state.acc.dtype)


def _states_of(table: np.ndarray, group: int, start: int) -> Iterator[tuple[int, int, int, int]]:
    """Lane, byte, bytes and checksum of each, in the order of the lanes."""
    of_group = slice(*np.searchsorted(table[:, 0], (group, group + 1)))
    first, last = np.searchsorted(table[of_group, 1], (start, start + 1))
    for row in table[of_group][first:last].tolist():
        yield row[2], row[3], row[4], row[5]
