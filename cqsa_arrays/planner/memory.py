"""Memory as a table: every allocation of a run is a term, and the bound is their sum."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.cpu.tiles import BLOCK_KEYS, largest_scratch_bytes
from .problem import Problem

# Chunk borders are multiples of this many tokens: whole query panels and key blocks of every CPU kernel.
TILE_TOKENS = BLOCK_KEYS
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
    """How much of what is resident at once, in tokens of ``heads`` (batch, head) pairs."""

    heads: int
    query_chunk: int
    key_chunk: int
    key_slots: int
    state_rows: int
    state_row_bytes: int
    cover_bytes: int
    threads: int


def state_row_bytes(problem: Problem, *, in_result: bool = False) -> int:
    """One row's ``acc``, ``m`` and ``l``; without ``acc`` where that lies in the result."""
    return (2 if in_result else problem.value_dim + 2) * problem.compute_itemsize


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
        MemoryTerm("cover", r.cover_bytes),
        MemoryTerm("result", problem.output_bytes if problem.result.place == "new array" else 0),
    )
    return tuple(term for term in terms if term.size_bytes)


def total_bytes(terms: tuple[MemoryTerm, ...]) -> int:
    """The bound."""
    return sum(term.size_bytes for term in terms)
