"""The ways to run a problem: a cover, its chunks, which heads go together and where states live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product

from ..cover import Cover, CqsCover, RectangularCover, perfect_sizes, set_size
from ..ranges import Cut
from .cost import Rates, Traffic, Work, estimate_device_s, estimate_s, traffic
from .edges import edge_tiles
from .memory import (
    DEVICE_TILE_TOKENS,
    DISK,
    HOST,
    MEMORY,
    TILE_TOKENS,
    MemoryTerm,
    Residency,
    device_terms,
    host_terms,
    memory_terms,
    needs_no_state,
    state_row_bytes,
    total_bytes,
)
from .problem import Problem

# More chunks than this never pay on one machine, and difference sets past it take longer to find than to use.
MOST_CHUNKS = 1 << 20
# What finding the difference set and the owners of its pairs takes for each chunk.
CHUNK_TABLE_BYTES = 32
# A GPU waits for its first blocks, so that smaller ones can pay: this many sizes that fit are priced.
DEVICE_CHOICES = 6
# States on a GPU while others wait elsewhere: one comes, one is continued, one leaves.
PASSING_STATES = 3
# Tiles under way on a GPU where all keys stay, as many as launches run ahead of it, and blocks of the next heads' keys.
TILES_UNDER_WAY = 4
MOST_BLOCKS_AT_ONCE = 64
# A step is run in parts of about so many seconds, between which a run may be saved or stopped: on a GPU once the parts
# that are under way are done, of which there are some. Parts of fewer rows would waste registers of a processor, or
# leave multiprocessors of a GPU idle; there they are whole blocks of rows of every kernel, which rescales 32 together.
HOST_PART_S, DEVICE_PART_S = 0.9, 0.3
HOST_PART_ROWS, DEVICE_PART_ROWS = 48, 384
# Longest key block of the rectangular cover.
KEY_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """What the planner knows of the computing machine; ``gpu``: a GPU computes, the host feeds it."""

    threads: int
    cache_bytes: int
    rates: Rates
    gpu: bool = False
    tile: int | None = None

    @property
    def tile_tokens(self) -> int:
        """Chunk borders are multiples of it: of ``tile`` where a plan of another machine is taken over."""
        return self.tile or (DEVICE_TILE_TOKENS if self.gpu else TILE_TOKENS)

    def tiles(self, tokens: int) -> int:
        return -(-tokens // self.tile_tokens)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a problem, with its price.

    ``query_parts`` and ``key_parts`` cut the tokens; ``batches`` x ``heads`` go through the cover together, the groups
    one after the other; ``states`` is where partial states wait between tasks: "memory" (of the computing device),
    "host" (of a GPU) or "disk".
    ``terms`` count against the budget of the computing device, ``host_terms`` against that of a GPU's host. A step is
    run in parts of at most ``part_rows`` query rows, each of which should take ``part_s`` seconds at most; a run that
    is slower than planned makes them shorter, in multiples of ``part_unit`` rows. ``keys_stay``: all key blocks of a
    group are resident together. The first and the last group are cut into ``edge_tiles`` query tiles; see ``edges``.
    """

    cover: str
    query_parts: int
    key_parts: int
    batches: int
    heads: int
    states: str
    residency: Residency
    terms: tuple[MemoryTerm, ...]
    traffic: Traffic
    scratch_bytes: int
    estimated_s: float
    tile_tokens: int = TILE_TOKENS
    host_terms: tuple[MemoryTerm, ...] = ()
    part_rows: int = 1 << 62
    part_s: float = 0.0
    part_unit: int = 1
    keys_stay: bool = False
    edge_tiles: int = 1

    @property
    def memory_bytes(self) -> int:
        return total_bytes(self.terms)

    @property
    def host_bytes(self) -> int:
        """What a run on a GPU takes of its host."""
        return total_bytes(self.host_terms)

    @property
    def states_on_disk(self) -> bool:
        return self.states == DISK

    def build_cover(self, problem: Problem) -> Cover:
        """The cover of one group of heads."""
        queries = Cut(problem.query_tokens, self.query_parts, self.tile_tokens)
        keys = Cut(problem.key_tokens, self.key_parts, self.tile_tokens)
        if self.cover == "cqs":
            return CqsCover(queries, keys, problem.mask)
        return RectangularCover(queries, keys, problem.mask, self.keys_stay)


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


def cqs_residency(problem: Problem, machine: Machine, heads: int, states: str, chunks: int) -> Residency:
    """What is resident with ``chunks`` chunks: the key chunks of a quorum; query chunks and their states pass."""
    size = set_size(chunks)
    queries, keys = (Cut(n, chunks, machine.tile_tokens) for n in (problem.query_tokens, problem.key_tokens))
    in_memory, on_disk = states == MEMORY, states == DISK and not machine.gpu
    row_bytes = state_row_bytes(problem, in_result=problem.result.holds_states and in_memory)
    several = heads < problem.batch * problem.heads
    key_slots, query_slots, state_slots = size, 1, chunks
    if machine.gpu:
        if chunks > 1 or several:
            # It copies what comes next while it computes: of the next task, two of which have one chunk in common.
            key_slots, query_slots = max(2, 2 * size - 1), 2
            key_slots = key_slots if several else min(key_slots, chunks)
        # Rows of one group of heads leave while the next is begun.
        state_slots = chunks + several if in_memory else min(PASSING_STATES, chunks)
        if chunks <= 2 and problem.batch * problem.heads > 2 * heads:
            # Groups of one launch or two are short: two are computed at a time, and the next is on its way.
            key_slots = query_slots = state_slots = chunks + 2
        row_bytes = 0 if needs_no_state(problem, chunks) else row_bytes
    return Residency(
        heads, queries.longest, keys.longest, key_slots, queries.longest if on_disk else problem.query_tokens,
        row_bytes, chunks * CHUNK_TABLE_BYTES, machine.threads, query_slots, state_slots,
    )  # fmt: skip


def cqs_candidate(problem: Problem, machine: Machine, group: tuple[int, int], states: str, chunks: int) -> Candidate:
    """CQS Divide with ``chunks`` chunks."""
    heads, size = group[0] * group[1], set_size(chunks)
    residency = cqs_residency(problem, machine, heads, states, chunks)
    loads = 1.0 if chunks == 1 else float(size)
    moves = 0.0 if states == MEMORY else loads
    groups = problem.batch * problem.heads / heads
    work = Work(loads, loads, moves, int(groups * chunks * size), residency.query_chunk, residency.key_chunk)
    return _priced("cqs", problem, machine, group, (chunks, chunks), states, residency, work)


def rectangular_residency(
    problem: Problem,
    machine: Machine,
    group: tuple[int, int],
    key_block: int,
    query_parts: int,
    *,
    keys_stay: bool = False,
) -> Residency:
    """What is resident: a query tile with its states, and a block of keys; more of them on a GPU."""
    heads = group[0] * group[1]
    key_parts = -(-problem.key_tokens // key_block)
    queries = Cut(problem.query_tokens, query_parts, machine.tile_tokens)
    keys = Cut(problem.key_tokens, key_parts, machine.tile_tokens)
    row_bytes = state_row_bytes(problem)
    groups = problem.batch * problem.heads / heads
    key_slots = query_slots = 1
    if machine.gpu:
        # It copies the next blocks while it computes, and rows leave while the next are begun.
        key_slots, query_slots = min(3, int(key_parts * groups)), min(2, int(query_parts * groups))
        row_bytes = 0 if needs_no_state(problem, 1 if keys_stay else key_parts) else row_bytes
    if keys_stay:
        key_slots = key_parts + (min(key_parts, TILES_UNDER_WAY) if machine.gpu and groups > 1 else 0)
        query_slots = min(TILES_UNDER_WAY, int(query_parts * groups)) if machine.gpu else 1
    return Residency(
        heads, queries.longest, keys.longest, key_slots, queries.longest, row_bytes, 0, machine.threads, query_slots,
        query_slots,
    )  # fmt: skip


def rectangular_candidate(
    problem: Problem,
    machine: Machine,
    group: tuple[int, int],
    key_block: int,
    query_parts: int,
    *,
    keys_stay: bool = False,
) -> Candidate:
    """``query_parts`` query tiles stay, one after the other, with their states; blocks of ``key_block`` keys pass.

    Where ``keys_stay`` the blocks of a group stay, too, and a tile meets all of them at once.
    """
    parts = (query_parts, -(-problem.key_tokens // key_block))
    residency = rectangular_residency(problem, machine, group, key_block, query_parts, keys_stay=keys_stay)
    groups = problem.batch * problem.heads / residency.heads
    passes, blocks, first = 1.0, 1.0, residency.key_chunk
    if keys_stay:
        seen = len(problem.mask.keys_of(residency.query_chunk - 1, problem.key_tokens))
        first = -(-max(seen, 1) // first) * first
    elif parts[1] > 1:
        passes = min(query_parts, _key_passes(problem, *parts))
        blocks = max(1.0, parts[1] * passes / query_parts)  # those that a tile sees of them, on average
    same_rows = parts[1] > 1 and not keys_stay
    steps = int(groups * query_parts * blocks)
    work = Work(1.0, passes, 0.0, steps, residency.query_chunk, first, same_rows=same_rows, keys_stay=keys_stay)
    return _priced("rectangular", problem, machine, group, parts, MEMORY, residency, work)


def _priced(
    cover: str,
    problem: Problem,
    machine: Machine,
    group: tuple[int, int],
    parts: tuple[int, int],
    states: str,
    residency: Residency,
    work: Work,
) -> Candidate:
    scratch = 2 * residency.heads * problem.query_tokens * state_row_bytes(problem) if states == DISK else 0
    moved = traffic(problem, work)
    chunks_at_once = set_size(parts[0]) if cover == "cqs" else parts[1] if work.keys_stay else 1
    keys_at_once = min(residency.key_chunk * chunks_at_once, problem.key_tokens)
    part_rows, part_s, part_unit = _parts(problem, machine, residency, keys_at_once)
    if machine.gpu:
        return Candidate(
            cover, *parts, *group, states, residency, device_terms(problem, residency), moved, scratch,
            estimate_device_s(problem, residency, work, moved, machine.rates, machine.cache_bytes, states),
            machine.tile_tokens, host_terms(problem, residency, states), part_rows, part_s, part_unit,
            work.keys_stay, edge_tiles(problem, residency, parts, machine.rates),
        )  # fmt: skip
    return Candidate(
        cover, *parts, *group, states, residency, memory_terms(problem, residency), moved, scratch,
        estimate_s(problem, residency, work, moved, machine.rates, machine.cache_bytes), machine.tile_tokens,
        part_rows=part_rows, part_s=part_s, part_unit=part_unit, keys_stay=work.keys_stay,
    )  # fmt: skip


def _parts(problem: Problem, machine: Machine, residency: Residency, keys: int) -> tuple[int, float, int]:
    """How many query rows go against ``keys`` keys at once, the seconds of that, and what parts are multiples of."""
    rates, per_pair, heads = machine.rates, 2 * (problem.head_dim + problem.value_dim), residency.heads
    if machine.gpu:
        pair_s, most_s = rates.device_s(problem.q.dtype, per_pair), DEVICE_PART_S
        unit = -(-rates.device_wave_rows // (heads * DEVICE_PART_ROWS)) * DEVICE_PART_ROWS
    else:
        pair_s, most_s = per_pair / rates.flops(problem.compute_dtype, machine.threads), HOST_PART_S
        unit = -(-machine.threads // heads) * HOST_PART_ROWS
    row_s = heads * keys * pair_s
    rows = min(max(unit, int(most_s / row_s) // unit * unit), residency.query_chunk)
    return rows, rows * row_s, unit


def chunk_counts(problem: Problem, machine: Machine) -> list[int]:
    """The numbers of chunks with a perfect difference set, no more than there are tiles.

    For a GPU 2 as well: it begins with half of what one chunk asks for, at hardly more launches.
    """
    tiles = max(1, min(machine.tiles(problem.query_tokens), machine.tiles(problem.key_tokens)))
    perfect = perfect_sizes(min(tiles, MOST_CHUNKS))
    return sorted({*perfect, 2}) if machine.gpu and tiles >= 2 else perfect


def cqs_candidates(problem: Problem, machine: Machine, budget_bytes: int, chunks: int | None) -> Iterator[Candidate]:
    """For each group and place of states the smallest number of chunks that fits, which moves least; more for a GPU.

    States of a GPU wait elsewhere only where it has no room for them.
    """
    counts = chunk_counts(problem, machine) if chunks is None else [chunks]
    if not machine.gpu:
        yield from _fitting_cqs(problem, machine, budget_bytes, counts, (MEMORY, DISK))
        return
    on_device = list(_fitting_cqs(problem, machine, budget_bytes, counts, (MEMORY,)))
    yield from on_device or _fitting_cqs(problem, machine, budget_bytes, counts, (HOST, DISK))


def _fitting_cqs(
    problem: Problem, machine: Machine, budget_bytes: int, counts: Sequence[int], places: Sequence[str]
) -> Iterator[Candidate]:
    terms = device_terms if machine.gpu else memory_terms
    for group, states in product(head_groups(problem), places):

        def fits(count: int, heads: int = group[0] * group[1], states: str = states) -> bool:
            return total_bytes(terms(problem, cqs_residency(problem, machine, heads, states, count))) <= budget_bytes

        # Not by bisection: where chunks are a few tiles long, more of them can need more memory.
        most = DEVICE_CHOICES if machine.gpu and states == MEMORY else 1
        for count in islice(filter(fits, counts), most):
            yield cqs_candidate(problem, machine, group, states, count)


def rectangular_candidates(problem: Problem, machine: Machine, budget_bytes: int) -> Iterator[Candidate]:
    """For each group the largest query tile that fits beside the longest key block that does.

    For a GPU also a tile as long as the block, which is there sooner, and such tiles beside all blocks.
    """
    parts = range(1, machine.tiles(problem.query_tokens) + 1)
    terms, groups = device_terms if machine.gpu else memory_terms, head_groups(problem)
    for group in groups:
        found, staying = [], []
        for block in _key_blocks(problem, machine, budget_bytes):
            build = partial(rectangular_candidate, problem, machine, group, block * machine.tile_tokens)
            resident = partial(rectangular_residency, problem, machine, group, block * machine.tile_tokens)

            def fits(count: int, resident: Callable[[int], Residency] = resident) -> bool:
                return total_bytes(terms(problem, resident(count))) <= budget_bytes

            fewest = _first_fitting(parts, fits)
            square = min(parts[-1], -(-machine.tiles(problem.query_tokens) // block))
            if fewest is not None:
                found.append(build(fewest))
                found += [build(square)] if machine.gpu and square > fewest else []
            key_parts = -(-machine.tiles(problem.key_tokens) // block)
            # Of several heads at once they take 5 to 10 % longer, measured.
            several = machine.gpu and group == groups[-1] and 1 < key_parts <= MOST_BLOCKS_AT_ONCE
            # Only where passing blocks fit, too: the smallest budget is one of theirs.
            if (
                several
                and fits(square)
                and total_bytes(terms(problem, resident(square, keys_stay=True))) <= budget_bytes
            ):
                staying.append(build(square, keys_stay=True))
        yield from islice(found, 2 * DEVICE_CHOICES if machine.gpu else 1)
        yield from staying


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
    lengths = [max(1, longest >> shift) for shift in (0, 1, 2, 3, 4, 6, 8, 16)]
    # A GPU has fewer slots for one block or two, and for one perhaps no states: where these are short, they need least.
    few = [tiles, -(-tiles // 2)] if machine.gpu and tiles * machine.tile_tokens <= KEY_BLOCK_TOKENS else []
    return list(dict.fromkeys(few + lengths))


def _first_fitting(parts: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first number of parts that fits; more parts need no more memory. None if none fits."""
    if fits(parts[0]):
        return parts[0]
    if not fits(parts[-1]):
        return None
    low, high = 0, len(parts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(parts[middle]) else (middle + 1, high)
    return parts[low]
