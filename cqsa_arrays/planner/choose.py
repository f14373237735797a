"""Choosing: the cheapest way that fits the budget, by the design's rule, or a refusal that names what would fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

from ..errors import ArgumentError, BudgetError
from ..units import format_bytes, format_seconds
from ..wording import Choice, Phrase
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
from .durability import least_interval_s
from .memory import DISK, HOST, MEMORY
from .plan import Budget, Plan
from .problem import Problem

COVERS = ("auto", "cqs", "rectangular")
# CQS Divide is the default; it gives way where it is priced this much slower or writes this many times the output.
SLOWER = 1.05
WRITES = 2.0
# Or where so much work of a durable job would be at risk.
LONGEST_INTERVAL_S = 300.0


@lru_cache(maxsize=64)  # a call after the other with arrays of one shape: 4 ms of arithmetic once
def choose(
    problem: Problem,
    budget: Budget,
    machine: Machine,
    *,
    cover: str,
    chunks: int | None,
    device: str,
    durable: bool = False,
) -> Plan:
    """The plan for ``problem`` within ``budget``; pure arithmetic, no I/O.

    ``cover`` is one of ``COVERS``; ``durable``: it will be saved now and then. Raises ArgumentError for a number of
    ``chunks`` that cannot be, BudgetError where nothing fits.
    """
    if chunks is not None and not 1 <= chunks <= MOST_CHUNKS:
        remedy = "Leave it out to let the planner choose."
        raise ArgumentError("chunks", chunks, f"a number from 1 to {MOST_CHUNKS}", remedy)
    if chunks is not None and cover == "rectangular":
        expected = Phrase.of("no number of chunks with ", Choice("cover", cover))
        raise ArgumentError("chunks", chunks, expected, "Leave one of them out.")
    if chunks is not None:
        cover = "cqs"
    quorums = list(cqs_candidates(problem, machine, budget.memory_bytes, chunks))
    others = list(rectangular_candidates(problem, machine, budget.memory_bytes))
    fed, others_fed = ([c for c in each if _host_feeds(c, budget)] for each in (quorums, others))
    found = {
        "cqs": _cheapest([c for c in fed if not _writes_too_much(c)]) or _cheapest(fed),
        "rectangular": _cheapest(others_fed),
    }
    chosen, reason = _select(found["cqs"], found["rectangular"], cover)
    if (
        durable
        and cover == "auto"
        and chosen is not None
        and chosen.cover == "cqs"
        and found["rectangular"] is not None
    ):
        interval_s = least_interval_s(problem, chosen, machine.rates)
        if interval_s > LONGEST_INTERVAL_S:
            chosen, reason = found["rectangular"], f"cqs could be saved only every {format_seconds(interval_s)}"
    if chosen is None:
        unfed = {"cqs": quorums, "rectangular": others}.get(cover, quorums + others)
        raise _host_refusal(unfed, budget) if unfed else _refusal(problem, budget, machine, cover, chunks)
    alternative = found["rectangular" if chosen.cover == "cqs" else "cqs"]
    return Plan(problem, device, budget, chosen, alternative, reason)


def take_over(problem: Problem, budget: Budget, machine: Machine, device: str, stored: Mapping[str, Any]) -> Plan:
    """The plan that covers ``problem`` as a candidate did whose fields ``stored`` has, maybe on another machine.

    Raises BudgetError where that does not fit ``budget``.
    """
    machine, group = replace(machine, tile=stored["tile_tokens"]), (stored["batches"], stored["heads"])
    if stored["cover"] == "cqs":
        states = stored["states"] if machine.gpu or stored["states"] != HOST else MEMORY
        chosen = cqs_candidate(problem, machine, group, states, stored["query_parts"])
    else:
        key_block = -(-problem.key_tokens // stored["key_parts"])
        parts, stay = stored["query_parts"], stored.get("keys_stay", False)  # not in older jobs
        chosen = rectangular_candidate(problem, machine, group, key_block, parts, keys_stay=stay)
    if chosen.memory_bytes > budget.memory_bytes or not _host_feeds(chosen, budget):
        raise BudgetError(
            Choice("memory"), f": to go on, this job needs {chosen.memory_bytes} bytes"
            f" ({format_bytes(chosen.memory_bytes)}) on {device}, the budget is {format_bytes(budget.memory_bytes)} (",
            budget.origin, "). Pass ", Choice("memory", chosen.memory_bytes), " or more.",
        )  # fmt: skip
    return Plan(problem, device, budget, chosen, None, "as the job was begun")


def _host_feeds(candidate: Candidate, budget: Budget) -> bool:
    return budget.host_bytes is None or candidate.host_bytes <= budget.host_bytes


def _host_refusal(unfed: list[Candidate], budget: Budget) -> BudgetError:
    """For plans that fit the GPU but not its host."""
    assert budget.host_bytes is not None
    least = min(unfed, key=lambda c: c.host_bytes)
    largest = max(least.host_terms, key=lambda term: term.size_bytes)
    return BudgetError(
        Choice("host_memory"), f": {least.host_bytes} bytes are needed to feed the device, the budget is"
        f' {format_bytes(budget.host_bytes)}; largest term "{largest.name}" {format_bytes(largest.size_bytes)}. Pass ',
        Choice("host_memory", least.host_bytes, rare=True), " or more.",
    )  # fmt: skip


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
        Choice("memory"), f": this problem does not fit {format_bytes(budget.memory_bytes)} (", budget.origin,
        f"); its smallest plan ({smallest.cover}) needs {smallest.memory_bytes} bytes"
        f" ({format_bytes(smallest.memory_bytes)}), of which"
        f' "{largest.name}" {format_bytes(largest.size_bytes)}. Pass ', Choice("memory", smallest.memory_bytes),
        " or more.",
    )  # fmt: skip


def _smallest(problem: Problem, machine: Machine, cover: str, chunks: int | None) -> list[Candidate]:
    """Every plan that may be the smallest: blocks of one tile, or so long that fewer of them are held."""
    found, groups = [], head_groups(problem)
    if cover != "rectangular":
        counts = chunk_counts(problem, machine) if chunks is None else [chunks]
        places = (MEMORY, DISK)
        found += [cqs_candidate(problem, machine, *each) for each in product(groups, places, counts)]
    if cover != "cqs":
        key_tiles, query_tiles = machine.tiles(problem.key_tokens), machine.tiles(problem.query_tokens)
        in_place = problem.k.in_place and problem.v.in_place
        blocks = {key_tiles} if in_place else {1, -(-key_tiles // 2), key_tiles} if machine.gpu else {1}
        for group, block, parts in product(groups, blocks, {1, -(-query_tiles // 2), query_tiles}):
            found.append(rectangular_candidate(problem, machine, group, block * machine.tile_tokens, parts))
    return found
