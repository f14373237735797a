"""Memory as a table: every allocation of a run is a term, and the bound is their sum."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.cpu.tiles import BLOCK_KEYS, largest_scratch_bytes
from .problem import Problem

# Chunk borders are multiples of this many tokens: whole query panels and key blocks of every CPU kernel,
TILE_TOKENS = BLOCK_KEYS
# and whole row blocks and key tiles of every CUDA kernel.
DEVICE_TILE_TOKENS = 128
# Arrays on the device begin at multiples of this many bytes.
DEVICE_ALIGNMENT = 512
# Between files or arrays on the host and the device: page-locked pieces, and how many of them are under way. Smaller
# ones take more of Python's time than it takes to fill them, where Python does that.
PINNED_PIECE_BYTES = 4 << 20
PINNED_PIECES = 8
# Finished rows leave the device in as large ones, each by a thread of its own.
OUTPUT_SLOTS = 4
READER_THREADS = 6
# Where partial states wait between tasks: with the device or process that computes, on a GPU's host, in a file.
MEMORY, HOST, DISK = "memory", "host", "disk"
# Rows are finalised (divided and narrowed) in pieces whose float arrays are about this large.
OUTPUT_PIECE_BYTES = 1 << 19
# What a thread of our own touches of its stack and heap: those of the kernel, those of the output, one reads ahead.
THREAD_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One allocation, or several alike."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Residency:
    """How much of what is resident at once, in tokens of ``heads`` (batch, head) pairs; slots hold a chunk each."""

    heads: int
    query_chunk: int
    key_chunk: int
    key_slots: int
    state_rows: int
    state_row_bytes: int
    cover_bytes: int
    threads: int
    query_slots: int = 1
    state_slots: int = 1


def state_row_bytes(problem: Problem, *, in_result: bool = False) -> int:
    """One row's ``acc``, ``m`` and ``l``; without ``acc`` where that lies in the result."""
    return (2 if in_result else problem.value_dim + 2) * problem.compute_itemsize


def needs_no_state(problem: Problem, key_parts: int) -> bool:
    """Whether a GPU finishes rows of an array by the one launch that computes them, from registers.

    Not those of a file: a job that is saved in the middle of a chunk keeps a state of its rows.
    """
    return problem.result.row_scalars == 0 and key_parts == 1


def output_piece_rows(problem: Problem, heads: int) -> int:
    """Rows of ``heads`` heads of one batch entry that are finalised at once."""
    return max(1, OUTPUT_PIECE_BYTES // (heads * problem.value_dim * problem.compute_itemsize))


def memory_terms(problem: Problem, residency: Residency) -> tuple[MemoryTerm, ...]:
    """The table of a run on the CPU; terms of nothing are left out."""
    r, size = residency, problem.compute_itemsize
    key_rows = r.heads * r.key_chunk * r.key_slots
    piece_heads = min(r.heads, problem.heads)
    piece = piece_heads * min(output_piece_rows(problem, piece_heads), r.query_chunk)
    scratch = largest_scratch_bytes(problem.compute_dtype, r.query_chunk, problem.head_dim, problem.value_dim)
    staging = max(operand.staging_bytes for operand in (problem.q, problem.k, problem.v))
    terms = (
        MemoryTerm("key chunks", 0 if problem.k.in_place else key_rows * problem.head_dim * size),
        MemoryTerm("value chunks", 0 if problem.v.in_place else key_rows * problem.value_dim * size),
        MemoryTerm("query chunk", 0 if problem.q.in_place else r.heads * r.query_chunk * problem.head_dim * size),
        MemoryTerm("states", r.heads * r.state_rows * r.state_row_bytes),
        MemoryTerm("kernel scratch", r.threads * scratch),
        MemoryTerm("output pieces", r.threads * piece * (problem.value_dim + 2) * size),
        MemoryTerm("read and write staging", staging + r.threads * problem.result.staging_bytes),
        MemoryTerm("threads", (2 * r.threads + 1) * THREAD_BYTES),
        MemoryTerm("caches of the inputs", sum(operand.held_bytes for operand in (problem.q, problem.k, problem.v))),
        MemoryTerm("chunks touched by a read", _touched_bytes(problem)),
        MemoryTerm("cover", r.cover_bytes),
        MemoryTerm("result", problem.output_bytes if problem.result.place == "new array" else 0),
    )
    return tuple(term for term in terms if term.size_bytes)


@dataclass(frozen=True, slots=True)
class OutputSlot:
    """One of the places through which finished rows leave the device: ``rows`` of all heads of a group, of one batch.

    ``lse_itemsize`` is 0 where their log-sum-exp stays behind.
    """

    rows: int
    size_bytes: int
    lse_itemsize: int

    @property
    def locked_bytes(self) -> int:
        """As much on the host: pieces like those of the inputs, or larger where a single row is."""
        return max(PINNED_PIECE_BYTES, self.size_bytes)


@dataclass(frozen=True, slots=True)
class OutputTile:
    """The places in which launches finish rows that leave the device afterwards: ``count`` of them, each for a chunk.

    ``token_major``: heads lie inside tokens.
    """

    count: int
    size_bytes: int
    dim: int
    token_major: bool


def output_tile(problem: Problem, residency: Residency) -> OutputTile:
    """As many as there are query chunks: one is written, others leave."""
    size_bytes = residency.heads * residency.query_chunk * problem.value_dim * problem.result.itemsize
    return OutputTile(residency.query_slots, _whole(size_bytes), problem.value_dim, problem.token_major)


def output_slot(problem: Problem, residency: Residency) -> OutputSlot:
    """Large enough for the link, no larger than a chunk, nor than a page-locked piece unless a single row is."""
    heads = min(residency.heads, problem.heads)
    lse_itemsize = problem.compute_itemsize if problem.result.row_scalars else 0
    row_bytes = heads * (problem.value_dim * problem.result.itemsize + lse_itemsize)
    border = 8 if lse_itemsize else 0  # on which the log-sum-exp begins
    rows = min(max(1, (PINNED_PIECE_BYTES - border) // row_bytes), residency.query_chunk)
    return OutputSlot(rows, _whole(rows * row_bytes + border), lse_itemsize)


def device_terms(problem: Problem, residency: Residency) -> tuple[MemoryTerm, ...]:
    """The table of a run on a GPU: what is allocated there. Inputs and results that live there are the caller's."""
    r = residency
    key_rows, query_rows = r.heads * r.key_chunk * r.key_slots, r.heads * r.query_chunk * r.query_slots
    terms = (
        MemoryTerm("key chunks", 0 if problem.k.in_place else key_rows * problem.head_dim * problem.k.itemsize),
        MemoryTerm("value chunks", 0 if problem.v.in_place else key_rows * problem.value_dim * problem.v.itemsize),
        MemoryTerm("query chunks", 0 if problem.q.in_place else query_rows * problem.head_dim * problem.q.itemsize),
        MemoryTerm("states", r.state_slots * _whole(r.heads * r.query_chunk * r.state_row_bytes)),
        MemoryTerm("output tiles" if _leaves_in_tiles(problem, r) else "output pieces", _outgoing_bytes(problem, r)),
    )
    return tuple(MemoryTerm(t.name, _whole(t.size_bytes)) for t in terms if t.size_bytes)


def host_terms(problem: Problem, residency: Residency, states: str) -> tuple[MemoryTerm, ...]:
    """What a run on a GPU allocates on the host; ``states`` is where they wait."""
    r, operands = residency, (problem.q, problem.k, problem.v)
    streamed = [operand for operand in operands if not operand.in_place]
    terms = (
        MemoryTerm("page-locked pieces", PINNED_PIECES * PINNED_PIECE_BYTES if streamed else 0),
        MemoryTerm("page-locked output", _locked_output_bytes(problem, r) if _leaves_in_pieces(problem) else 0),
        MemoryTerm("page-locked states", _waiting_bytes(problem, r, states)),
        MemoryTerm("read and write staging", _staging_bytes(problem)),
        MemoryTerm("threads", (READER_THREADS + OUTPUT_SLOTS + 1) * THREAD_BYTES),
        MemoryTerm("caches of the inputs", sum(operand.held_bytes for operand in operands)),
        MemoryTerm("chunks touched by a read", _touched_bytes(problem)),
        MemoryTerm("cover", r.cover_bytes),
        MemoryTerm(
            "result", 0 if problem.result.on_device or problem.result.place != "new array" else problem.output_bytes
        ),
    )
    return tuple(term for term in terms if term.size_bytes)


def _waiting_bytes(problem: Problem, r: Residency, states: str) -> int:
    """All rows of a group of heads, or one chunk on its way between device and file."""
    rows = {MEMORY: 0, HOST: problem.query_tokens, DISK: r.query_chunk}[states]
    return r.heads * rows * r.state_row_bytes


def _staging_bytes(problem: Problem) -> int:
    inputs = max(operand.staging_bytes for operand in (problem.q, problem.k, problem.v))
    return READER_THREADS * inputs + OUTPUT_SLOTS * problem.result.staging_bytes


def _touched_bytes(problem: Problem) -> int:
    """HDF5 lets one thread in at a time, whichever file it reads, and uses the memory again."""
    return max(operand.touched_bytes for operand in (problem.q, problem.k, problem.v))


def _outgoing_bytes(problem: Problem, residency: Residency) -> int:
    if not _leaves_in_pieces(problem):
        return 0
    if _leaves_in_tiles(problem, residency):
        tile = output_tile(problem, residency)
        return tile.count * tile.size_bytes
    return OUTPUT_SLOTS * output_slot(problem, residency).size_bytes


def _leaves_in_tiles(problem: Problem, residency: Residency) -> bool:
    """Whether launches finish rows that leave the device."""
    return residency.state_row_bytes == 0 and not problem.result.on_device


def _leaves_in_pieces(problem: Problem) -> bool:
    """Not what stays on the device, and not statistics, which are copied as they are."""
    return not problem.result.on_device and problem.result.row_scalars < 2


def _locked_output_bytes(problem: Problem, residency: Residency) -> int:
    return OUTPUT_SLOTS * output_slot(problem, residency).locked_bytes


def _whole(size_bytes: int) -> int:
    """Room for an array of this size and for the padding of its parts; see ``engine.cuda.memory.Arena``."""
    return -(-size_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT


def total_bytes(terms: tuple[MemoryTerm, ...]) -> int:
    """The bound."""
    return sum(term.size_bytes for term in terms)
