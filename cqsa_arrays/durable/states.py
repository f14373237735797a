"""The files of the states of a job's lanes."""

from __future__ import annotations

import os
from contextlib import suppress

from ..engine.statefile import StateFile
from ..errors import START_OVER, StorageError
from ..planner import Plan
from ..planner.memory import state_row_bytes
from ..storage import RawFile, reserve
from ..units import format_bytes


def states_path(directory: str, key: str, lane: int) -> str:
    """Where the states of a lane are kept."""
    return os.path.join(directory, f"{key}-states-{lane}")


def lane_lock(directory: str, key: str, lane: int) -> str:
    """The file whose lock whoever computes a lane holds: beside its states, which a copied job folder may share."""
    return f"{states_path(directory, key, lane)}.lock"


def reserve_states(directory: str, key: str, plan: Plan) -> None:
    """Make the files of all lanes with all of their disk blocks. Raises StorageError where there is no room."""
    from ..storage.create import sync_directory  # h5py comes with it

    size_bytes = _over(RawFile.of_descriptor(-1, ""), plan).size_bytes
    try:
        for lane in range(plan.lanes):
            descriptor = os.open(states_path(directory, key, lane), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                reserve(descriptor, 0, size_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(states_path(directory, key, 0))
    except OSError as error:
        remove_states(directory, key, plan.lanes)
        raise StorageError(
            f"scratch: cannot reserve {format_bytes(plan.lanes * size_bytes)} for states in {directory}:"
            f" {error.strerror}. Name a directory with that much room (--scratch, Options(scratch=...))."
        ) from error


def open_lane_states(directory: str, key: str, plan: Plan, lane: int) -> StateFile:
    """The states of a lane. Raises StorageError where the file is gone or cut short."""
    path = states_path(directory, key, lane)
    made = _over(RawFile(path, "states", write=True), plan)
    if os.path.getsize(path) < made.size_bytes:
        made.close()
        raise StorageError(f"{path} is shorter than what was reserved: the file is damaged. {START_OVER}")
    return made


def remove_states(directory: str, key: str, lanes: int) -> None:
    """Remove the files of all lanes."""
    for lane in range(lanes):
        for path in (states_path(directory, key, lane), lane_lock(directory, key, lane)):
            with suppress(FileNotFoundError):
                os.remove(path)


def _over(file: RawFile, plan: Plan) -> StateFile:
    chosen, problem = plan.chosen, plan.problem
    row_bytes = chosen.batches * chosen.heads * state_row_bytes(problem)
    if plan.cover_name == "rectangular":
        return StateFile(file, chosen.residency.query_chunk, row_bytes, one_at_a_time=True)
    regions = len(plan.groups) if plan.lanes_meet else 1
    return StateFile(file, problem.query_tokens, row_bytes, regions=regions)
