"""What it costs to save a job, and how often that is worth it."""

from __future__ import annotations

from dataclasses import dataclass

from ..cover import set_size
from ..units import format_bytes, format_seconds
from .candidates import Candidate
from .cost import Rates
from .memory import state_row_bytes
from .problem import Problem

MOST_LANES = 1 << 16
# Of the run time, so that slower disks stay below 3 %; a commit of nothing but its record takes some milliseconds.
SHARE = 0.02
LEAST_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Durability:
    """How a job is saved: ``lanes`` may run by themselves, each is saved every ``interval_s`` seconds.

    There are no more lanes than have something to do.

    A commit writes at most ``checkpoint_bytes`` of states; all that are kept take ``disk_bytes`` at most beside the
    output.
    """

    lanes: int
    interval_s: float
    checkpoint_bytes: int
    disk_bytes: int
    part_s: float

    def __str__(self) -> str:
        written = f"at most {format_bytes(self.checkpoint_bytes)} of states"
        risk = format_seconds(self.interval_s + self.part_s)
        return (
            f"every {format_seconds(self.interval_s)}, {written}; work at risk {risk};"
            f" {format_bytes(self.disk_bytes)} on disk"
        )


def saved_bytes(problem: Problem, chosen: Candidate) -> int:
    """Bytes of states that a commit writes at most: those in memory; others are in a file already."""
    heads, tiles = chosen.batches * chosen.heads, chosen.cover == "rectangular"
    whole = problem.query_tokens if not (tiles or chosen.states_on_disk) else chosen.residency.query_chunk
    return heads * whole * state_row_bytes(problem)


def least_interval_s(problem: Problem, chosen: Candidate, rates: Rates) -> float:
    """The shortest time between commits which keeps them within ``SHARE`` of it."""
    return max(LEAST_INTERVAL_S, saved_bytes(problem, chosen) / (rates.saved_bytes * SHARE))


def durability(problem: Problem, chosen: Candidate, rates: Rates, lanes: int, interval_s: float | None) -> Durability:
    """How a job that runs ``chosen`` is saved, every ``interval_s`` seconds or as often as ``SHARE`` allows."""
    heads, row_bytes = chosen.batches * chosen.heads, state_row_bytes(problem)
    tiles = chosen.cover == "rectangular"
    rows = chosen.residency.query_chunk if tiles else problem.query_tokens
    groups = -(-problem.batch // chosen.batches) * -(-problem.heads // chosen.heads)
    lanes = min(lanes, chosen.query_parts + groups - 1)  # task t of group g is lane (g + t) mod lanes
    if lanes > 1 and not tiles and chosen.query_parts > 1:  # they meet: each keeps what it touches of every group
        tasks = -(-chosen.query_parts // lanes)
        touched = min(chosen.query_parts, tasks * set_size(chosen.query_parts)) * chosen.residency.query_chunk
        rows = lanes * groups * min(rows, touched)
    disk = 2 * heads * rows * row_bytes
    if interval_s is None:
        interval_s = least_interval_s(problem, chosen, rates)
    return Durability(lanes, interval_s, saved_bytes(problem, chosen), disk, chosen.part_s)
