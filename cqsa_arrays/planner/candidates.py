"""The ways to run a problem: a cover, its chunks, which heads go together and where states live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product

from ..cover import Cover, CqsCover, RectangularCover, perfect_sizes, set_size
from ..ranges import Cut
from .cost import Rates, Traffic, Work, estimate_device_s, estimate_s, traffic
from .memory import (
    DEVICE_TILE_TOKENS,
    TILE_TOKENS,
    MemoryTerm,
    Residency,
    device_terms,
    host_terms,
    memory_terms,
    state_row_bytes,
    total_bytes,
)
from .problem import Problem

# More chunks than this never pay on one machine, and difference sets past it take longer to find than to use.
MOST_CHUNKS = 1 << 20
# What finding the difference set and the owners of its pairs takes for each chunk.
CHUNK_TABLE_BYTES = 32
# A GPU waits for its first blocks, so that smaller ones can pay: this many sizes that fit are priced.
DEVICE_CHOICES = 8
# Longest key block of the rectangular cover.
KEY_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """What the planner knows of the computing machine; ``gpu``: a GPU computes, the host feeds it."""

    threads: int
    cache_bytes: int
    rates: Rates
    gpu: bool = False

    @property
    def tile_tokens(self) -> int:
        """Chunk borders are multiples of it."""
        return DEVICE_TILE_TOKENS if self.gpu else TILE_TOKENS

    def tiles(self, tokens: int) -> int:
        return -(-tokens // self.tile_tokens)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a problem, with its price.

    ``query_parts`` and ``key_parts`` cut the tokens; ``batches`` x ``heads`` go through the cover together, the groups
    one after the other; ``states_on_disk`` is where partial states wait between tasks.
    ``terms`` count against the budget of the computing device, ``host_terms`` against that of a GPU's host.
    """

    cover: str
    query_parts: int
    key_parts: int
    batches: int
    heads: int
    states_on_disk: bool
    residency: Residency
    terms: tuple[MemoryTerm, ...]
    traffic: Traffic
    scratch_bytes: int
    estimated_s: float
    tile_tokens: int = TILE_TOKENS
    host_terms: tuple[MemoryTerm, ...] = ()

    @property
    def memory_bytes(self) -> int:
        return total_bytes(self.terms)

    def build_cover(self, problem: Problem) -> Cover:
        """The cover of one group of heads."""
        queries = Cut(problem.query_tokens, self.query_parts, self.tile_tokens)
        keys = Cut(problem.key_tokens, self.key_parts, self.tile_tokens)
        return (CqsCover if self.cover == "cqs" else RectangularCover)(queries, keys, problem.mask)


def head_groups(problem: Problem) -> list[tuple[int, int]]:
    """(batches, heads) that may go through the cover together, largest first."""
    groups = [(problem.batch, problem.heads), (1, problem.heads)]
    heads = problem.heads
    while heads > 1 and not problem.token_major:
        heads = -(-heads // 2)
        groups.append((1, heads))
    return list(dict.fromkeys(groups))


def _key_passes(problem: Problem, query_parts: int, key_parts: int) -> float:
    """How often that many query tiles read the keys, at most: what each tile's last row sees, in whole blocks."""
    queries, keys = problem.query_tokens, problem.key_tokens
    live = problem.pairs / (problem.batch * problem.heads * queries * keys)
    return query_parts * live + queries / (2 * keys) + query_parts / key_parts


def cqs_candidate(problem: Problem, machine: Machine, group: tuple[int, int], on_disk: bool, chunks: int) -> Candidate:
    """CQS Divide with ``chunks`` chunks: the key chunks of a quorum stay, query chunks and their states pass."""
    heads, size = group[0] * group[1], set_size(chunks)
    queries, keys = (Cut(n, chunks, machine.tile_tokens) for n in (problem.query_tokens, problem.key_tokens))
    state_rows = queries.longest if on_disk else problem.query_tokens
    row_bytes = state_row_bytes(problem, in_result=problem.result.holds_states and not on_disk)
    key_slots, query_slots = size, 1
    if machine.gpu and (chunks > 1 or heads < problem.batch * problem.heads):
        # It copies what comes next while it computes: of the next task, two of which have one chunk in common.
        key_slots, query_slots = max(2, 2 * size - 1), 2
    residency = Residency(
        heads, queries.longest, keys.longest, key_slots, state_rows, row_bytes, chunks * CHUNK_TABLE_BYTES,
        machine.threads, query_slots,
    )  # fmt: skip
    groups = problem.batch * problem.heads / heads
    loads = 1.0 if chunks == 1 else float(size)
    moves = loads if on_disk else 0.0
    work = Work(loads, loads, moves, int(groups * chunks * size), queries.longest)
    return _priced("cqs", problem, machine, group, (chunks, chunks), on_disk, residency, work)


def rectangular_candidate(
    problem: Problem, machine: Machine, group: tuple[int, int], key_block: int, query_parts: int
) -> Candidate:
    """``query_parts`` query tiles stay, one after the other, with their states; blocks of ``key_block`` keys pass."""
    heads = group[0] * group[1]
    parts = (query_parts, -(-problem.key_tokens // key_block))
    queries, keys = (
        Cut(n, part, machine.tile_tokens)
        for n, part in zip((problem.query_tokens, problem.key_tokens), parts, strict=True)
    )
    row_bytes = state_row_bytes(problem)
    groups = problem.batch * problem.heads / heads
    # A GPU copies the next blocks while it computes.
    key_slots = min(3, int(parts[1] * groups)) if machine.gpu else 1
    query_slots = min(2, int(query_parts * groups)) if machine.gpu else 1
    residency = Residency(
        heads, queries.longest, keys.longest, key_slots, queries.longest, row_bytes, 0, machine.threads, query_slots
    )
    passes = min(query_parts, _key_passes(problem, *parts)) if parts[1] > 1 else 1.0
    work = Work(1.0, passes, 0.0, int(groups * parts[0] * parts[1]), queries.longest)
    return _priced("rectangular", problem, machine, group, parts, False, residency, work)


def _priced(
    cover: str,
    problem: Problem,
    machine: Machine,
    group: tuple[int, int],
    parts: tuple[int, int],
    on_disk: bool,
    residency: Residency,
    work: Work,
) -> Candidate:
    scratch = 2 * residency.heads * problem.query_tokens * state_row_bytes(problem) if on_disk else 0
    moved = traffic(problem, work)
    if machine.gpu:
        return Candidate(
            cover, *parts, *group, on_disk, residency, device_terms(problem, residency), moved, scratch,
            estimate_device_s(problem, residency, work, moved, machine.rates, machine.cache_bytes),
            machine.tile_tokens, host_terms(problem, residency),
        )  # fmt: skip
    return Candidate(
        cover, *parts, *group, on_disk, residency, memory_terms(problem, residency), moved, scratch,
        estimate_s(problem, residency, work, moved, machine.rates, machine.cache_bytes),
    )  # fmt: skip


def chunk_counts(problem: Problem, machine: Machine) -> list[int]:
    """The numbers of chunks with a perfect difference set, no more than there are tiles."""
    tiles = max(1, min(machine.tiles(problem.query_tokens), machine.tiles(problem.key_tokens)))
    return perfect_sizes(min(tiles, MOST_CHUNKS))


def cqs_candidates(problem: Problem, machine: Machine, budget_bytes: int, chunks: int | None) -> Iterator[Candidate]:
    """For each group and place of states the smallest number of chunks that fits, which moves least."""
    counts = chunk_counts(problem, machine) if chunks is None else [chunks]
    # States of a GPU's run stay on the device.
    for group, on_disk in product(head_groups(problem), (False,) if machine.gpu else (False, True)):
        # Not by bisection: where chunks are a few tiles long, more of them can need more memory.
        candidates = (cqs_candidate(problem, machine, group, on_disk, count) for count in counts)
        yield from islice(
            (c for c in candidates if c.memory_bytes <= budget_bytes), DEVICE_CHOICES if machine.gpu else 1
        )


def rectangular_candidates(problem: Problem, machine: Machine, budget_bytes: int) -> Iterator[Candidate]:
    """For each group the largest query tile that fits beside the longest key block that does."""
    parts = range(1, machine.tiles(problem.query_tokens) + 1)
    for group in head_groups(problem):
        builds = (
            partial(rectangular_candidate, problem, machine, group, block * machine.tile_tokens)
            for block in _key_blocks(problem, machine, budget_bytes)
        )
        found = (_first_fitting(parts, build, budget_bytes) for build in builds)
        yield from islice((c for c in found if c is not None), DEVICE_CHOICES if machine.gpu else 1)


def _key_blocks(problem: Problem, machine: Machine, budget_bytes: int) -> list[int]:
    """Lengths of key blocks to try, in tiles, longest first: from an eighth of the budget down to one tile.

    Each block rounds the states once, so they should be long: 2^20 tokens keep the error flat up to 2^30.
    """
    tiles = machine.tiles(problem.key_tokens)
    if problem.k.in_place and problem.v.in_place:
        return [tiles]
    itemsize = problem.k.itemsize if machine.gpu else problem.compute_itemsize
    tile_bytes = machine.tile_tokens * (problem.head_dim + problem.value_dim) * itemsize
    longest = min(tiles, KEY_BLOCK_TOKENS // machine.tile_tokens, max(1, budget_bytes // 8 // tile_bytes))
    return list(dict.fromkeys(max(1, longest >> shift) for shift in (0, 1, 2, 4, 8, 16)))


def _first_fitting(parts: Sequence[int], build: Callable[[int], Candidate], budget_bytes: int) -> Candidate | None:
    """The candidate of the first number of parts that fits; more parts need no more memory. None if none fits."""
    fewest = build(parts[0])
    if fewest.memory_bytes <= budget_bytes:
        return fewest
    if build(parts[-1]).memory_bytes > budget_bytes:
        return None
    low, high = 0, len(parts) - 1
    while low < high:
        middle = (low + high) // 2
        fits = build(parts[middle]).memory_bytes <= budget_bytes
        low, high = (low, middle) if fits else (middle + 1, high)
    return build(parts[low])
