"""Choosing: the cheapest way that fits the budget, by the design's rule, or a refusal that names what would fit."""

from __future__ import annotations

from ..errors import ArgumentError, BudgetError
from ..units import format_bytes
from .candidates import (
    MOST_CHUNKS,
    Candidate,
    Machine,
    chunk_counts,
    cqs_candidate,
    cqs_candidates,
    head_groups,
    rectangular_candidate,
    rectangular_candidates,
)
from .memory import total_bytes
from .plan import Budget, Plan
from .problem import Problem

COVERS = ("auto", "cqs", "rectangular")
# CQS Divide is the default; it gives way where it is priced this much slower or writes this many times the output.
SLOWER = 1.05
WRITES = 2.0


def choose(problem: Problem, budget: Budget, machine: Machine, *, cover: str, chunks: int | None, device: str) -> Plan:
    """The plan for ``problem`` within ``budget``; pure arithmetic, no I/O.

    Raises ArgumentError for an unknown ``cover`` or number of ``chunks``, BudgetError where nothing fits.
    """
    if cover not in COVERS:
        raise ArgumentError("cover", repr(cover), f"one of {', '.join(COVERS)}", "'auto' lets the planner choose.")
    if chunks is not None and not 1 <= chunks <= MOST_CHUNKS:
        remedy = "Leave it out to let the planner choose."
        raise ArgumentError("chunks", chunks, f"a number from 1 to {MOST_CHUNKS}", remedy)
    if chunks is not None and cover == "rectangular":
        raise ArgumentError("chunks", chunks, "no number of chunks with cover='rectangular'", "Leave one of them out.")
    if chunks is not None:
        cover = "cqs"
    quorums = list(cqs_candidates(problem, machine, budget.memory_bytes, chunks))
    found = {
        "cqs": _cheapest([c for c in quorums if not _writes_too_much(c)]) or _cheapest(quorums),
        "rectangular": _cheapest(list(rectangular_candidates(problem, machine, budget.memory_bytes))),
    }
    chosen, reason = _select(found["cqs"], found["rectangular"], cover)
    if chosen is None:
        raise _refusal(problem, budget, machine, cover, chunks)
    _check_host(chosen, budget)
    alternative = found["rectangular" if chosen.cover == "cqs" else "cqs"]
    return Plan(problem, device, budget, chosen, alternative, reason)


def _check_host(chosen: Candidate, budget: Budget) -> None:
    """What feeds a GPU has fixed sizes: it fits the host's budget, or no plan does."""
    if budget.host_bytes is not None and total_bytes(chosen.host_terms) > budget.host_bytes:
        largest = max(chosen.host_terms, key=lambda term: term.size_bytes)
        raise BudgetError(
            f"host_memory: {total_bytes(chosen.host_terms)} bytes are needed to feed the device, the budget is"
            f' {format_bytes(budget.host_bytes)}; largest term "{largest.name}" {format_bytes(largest.size_bytes)}.'
        )


def _writes_too_much(candidate: Candidate) -> bool:
    moved = candidate.traffic
    return candidate.states_on_disk and moved.state_written_bytes > WRITES * moved.output_written_bytes


def _cheapest(candidates: list[Candidate]) -> Candidate | None:
    return min(candidates, key=lambda c: c.estimated_s, default=None)


def _select(cqs: Candidate | None, rectangular: Candidate | None, cover: str) -> tuple[Candidate | None, str]:
    if cover == "cqs":
        return cqs, "asked for"
    if cover == "rectangular":
        return rectangular, "asked for"
    if cqs is None or rectangular is None:
        return (cqs or rectangular), "the only cover that fits the budget"
    if _writes_too_much(cqs):
        written, output = cqs.traffic.state_written_bytes, cqs.traffic.output_written_bytes
        return rectangular, f"cqs would write {format_bytes(written)} of states for {format_bytes(output)} of output"
    if cqs.estimated_s > SLOWER * rectangular.estimated_s:
        return rectangular, f"cqs is priced {cqs.estimated_s / rectangular.estimated_s - 1:.0%} slower"
    return cqs, "the default; not priced over 5 % slower than the other"


def _refusal(problem: Problem, budget: Budget, machine: Machine, cover: str, chunks: int | None) -> BudgetError:
    """Names the largest term of the smallest plan and the smallest budget that works."""
    smallest = min(_smallest(problem, machine, cover, chunks), key=lambda c: c.memory_bytes)
    largest = max(smallest.terms, key=lambda term: term.size_bytes)
    return BudgetError(
        f"memory: this problem does not fit {format_bytes(budget.memory_bytes)} ({budget.origin}); its smallest plan"
        f" ({smallest.cover}) needs {smallest.memory_bytes} bytes ({format_bytes(smallest.memory_bytes)}), of which"
        f' "{largest.name}" {format_bytes(largest.size_bytes)}.'
        f" Pass memory={smallest.memory_bytes} or more."
    )


def _smallest(problem: Problem, machine: Machine, cover: str, chunks: int | None) -> list[Candidate]:
    group = head_groups(problem)[-1]
    found = []
    if cover != "rectangular":
        counts = chunk_counts(problem, machine) if chunks is None else [chunks]
        places = (False,) if machine.gpu else (False, True)
        found += [cqs_candidate(problem, machine, group, place, count) for place in places for count in counts]
    if cover != "cqs":
        in_place = problem.k.in_place and problem.v.in_place
        block = problem.key_tokens if in_place else machine.tile_tokens
        found.append(rectangular_candidate(problem, machine, group, block, machine.tiles(problem.query_tokens)))
    return found
