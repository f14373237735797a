"""The memory table: every term against numbers worked out by hand, and their sum against the bound."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import BRIEF, MACHINE, every_candidate, key_blocks, problem, problems, tiles

from cqsa_arrays.kernels.cpu.tiles import tile_for
from cqsa_arrays.planner.candidates import (
    chunk_counts,
    cqs_candidate,
    cqs_candidates,
    head_groups,
    rectangular_candidate,
)


def scratch(dtype, *, rows, head_dim, value_dim) -> int:
    """What the kernels say that one thread takes, whichever processor it is; how much that is, is their business."""
    families = ("avx512", "avx2", "neon", "sse2")
    return max(tile_for(family, dtype).scratch_bytes(rows, head_dim, value_dim) for family in families)


SCRATCH_96 = scratch("float32", rows=96, head_dim=64, value_dim=32)
SCRATCH_384 = scratch("float64", rows=384, head_dim=8, value_dim=8)
THREADS = 5 * (256 << 10)

# fmt: off
CASES = {
    # 7 tiles of 96 tokens in 7 chunks: tasks hold 3 chunks of 96 keys of both heads.
    "cqs, states in memory": (
        problem(heads=2, queries=672, dim=64, value_dim=32, dtype="float16", staging=5000, held=20, touched=9,
                result_staging=700),
        lambda one: cqs_candidate(one, MACHINE, (1, 2), "memory", 7),
        {
            "key chunks": 2 * 3 * 96 * 64 * 4, "value chunks": 2 * 3 * 96 * 32 * 4, "query chunk": 2 * 96 * 64 * 4,
            "states": 2 * 672 * (32 + 2) * 4, "kernel scratch": 2 * SCRATCH_96,
            "output pieces": 2 * 2 * 96 * (32 + 2) * 4, "read and write staging": 5000 + 2 * 700, "threads": THREADS,
            "caches of the inputs": 60, "chunks touched by a read": 9, "cover": 7 * 32,
        },
    ),
    # The same with one head at a time and one chunk's states in memory.
    "cqs, states on disk": (
        problem(heads=2, queries=672, dim=64, value_dim=32, dtype="float16"),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "disk", 7),
        {
            "key chunks": 3 * 96 * 64 * 4, "value chunks": 3 * 96 * 32 * 4, "query chunk": 96 * 64 * 4,
            "states": 96 * (32 + 2) * 4, "kernel scratch": 2 * SCRATCH_96, "output pieces": 2 * 96 * (32 + 2) * 4,
            "threads": THREADS, "cover": 7 * 32,
        },
    ),
    # acc lies in the caller's array: only m and l are states. 1000 tokens are 11 tiles: 3 chunks of at most 4 tiles.
    "cqs in the result": (
        problem(queries=1000, keys=90, dim=8, dtype="float64", in_place=True, place="array", holds_states=True),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "memory", 3),
        {
            "states": 1000 * 2 * 8, "kernel scratch": 2 * SCRATCH_384, "output pieces": 2 * 384 * (8 + 2) * 8,
            "threads": THREADS, "cover": 3 * 32,
        },
    ),
    # On disk the states are whole again, result or not.
    "cqs beside the result": (
        problem(queries=1000, keys=90, dim=8, dtype="float64", in_place=True, place="array", holds_states=True),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "disk", 3),
        {
            "states": 384 * 10 * 8, "kernel scratch": 2 * SCRATCH_384, "output pieces": 2 * 384 * (8 + 2) * 8,
            "threads": THREADS, "cover": 3 * 32,
        },
    ),
    # 384 query rows stay with their whole states, 10 tiles of keys pass in blocks of 5 and 5.
    "rectangular": (
        problem(batch=3, queries=768, keys=950, dim=8, dtype="float64", place="new array"),
        lambda one: rectangular_candidate(one, MACHINE, (1, 1), 5 * 96, 2),
        {
            "key chunks": 480 * 8 * 8, "value chunks": 480 * 8 * 8, "query chunk": 384 * 8 * 8,
            "states": 384 * (8 + 2) * 8, "kernel scratch": 2 * SCRATCH_384,
            "output pieces": 2 * 384 * (8 + 2) * 8, "threads": THREADS, "result": 3 * 768 * 8 * 8,
        },
    ),
    # Statistics: the result is acc, m and l of every row.
    "statistics": (
        problem(batch=2, queries=384, dim=8, dtype="float64", in_place=True, place="new array", row_scalars=2,
                holds_states=True),
        lambda one: cqs_candidate(one, MACHINE, (2, 1), "memory", 1),
        {
            "states": 2 * 384 * 2 * 8, "kernel scratch": 2 * SCRATCH_384, "output pieces": 2 * 384 * (8 + 2) * 8,
            "threads": THREADS, "result": 2 * 384 * (8 + 2) * 8, "cover": 32,
        },
    ),
}
# fmt: on


@pytest.mark.parametrize(("one", "build", "expected"), CASES.values(), ids=CASES)
def test_terms_are_those_worked_out_by_hand(one, build, expected) -> None:
    candidate = build(one)
    assert {term.name: term.size_bytes for term in candidate.terms} == expected
    assert candidate.memory_bytes == sum(expected.values())


def test_long_rows_are_finished_in_pieces_of_half_a_mebibyte() -> None:
    one = problem(queries=100_000, dim=1, value_dim=128, dtype="float32")
    (piece,) = (t for t in cqs_candidate(one, MACHINE, (1, 1), "memory", 1).terms if t.name == "output pieces")
    assert piece.size_bytes == 2 * (1024 * 130 * 4)


@given(problems())
@BRIEF
def test_the_bound_is_the_sum_of_distinct_terms(one) -> None:
    for candidate in (
        cqs_candidate(one, MACHINE, head_groups(one)[0], "memory", 3),
        rectangular_candidate(one, MACHINE, head_groups(one)[-1], key_blocks(one)[0], 1),
    ):
        names = [term.name for term in candidate.terms]
        assert len(set(names)) == len(names)
        assert all(term.size_bytes > 0 for term in candidate.terms)
        assert candidate.memory_bytes == sum(term.size_bytes for term in candidate.terms)


@given(problems(), st.data())
@BRIEF
def test_more_query_parts_of_the_rectangle_never_need_more(one, data) -> None:
    group, block = data.draw(st.sampled_from(head_groups(one))), data.draw(st.sampled_from(key_blocks(one)))
    parts = data.draw(st.lists(st.integers(1, tiles(one.query_tokens)), min_size=2, max_size=8).map(sorted))
    needs = [rectangular_candidate(one, MACHINE, group, block, n).memory_bytes for n in parts]
    assert needs == sorted(needs, reverse=True)


@given(problems(), st.data())
@BRIEF
def test_fewer_heads_and_shorter_key_blocks_never_need_more(one, data) -> None:
    chunks = data.draw(st.integers(1, 2 * tiles(one.query_tokens)))
    groups = [cqs_candidate(one, MACHINE, group, "memory", chunks).memory_bytes for group in head_groups(one)]
    assert groups == sorted(groups, reverse=True)
    blocks = [rectangular_candidate(one, MACHINE, (1, 1), block, 1).memory_bytes for block in key_blocks(one)]
    assert blocks == sorted(blocks)


def chunk_violations(one) -> list[tuple[int, int, int, int]]:
    """(chunks, bytes, more chunks, more bytes) that a search by halves would be misled by."""
    found = []
    for group in head_groups(one)[-1:]:
        candidates = [c for c in every_candidate(one, "cqs") if (c.batches, c.heads) == group]
        for on_disk in (False, True):
            needs = [(c.query_parts, c.memory_bytes) for c in candidates if c.states_on_disk == on_disk]
            found += [(*a, *b) for a, b in pairwise(needs) if b[1] > a[1]]
    return found


@pytest.mark.parametrize("chunks", [1, 3, 7, 13, 21, 31, 57, 73, 91, 133], ids=str)
def test_chunks_of_whole_equal_tiles_need_less_the_more_there_are(chunks) -> None:
    one = problem(queries=1 * 3 * 7 * 13 * 21 * 31 * 57 * 73 * 96)
    least = cqs_candidate(one, MACHINE, (1, 1), "disk", chunks).memory_bytes
    assert all(
        cqs_candidate(one, MACHINE, (1, 1), "disk", fewer).memory_bytes > least
        for fewer in (1, 3, 7, 13, 21, 31, 57, 73, 91)
        if fewer < chunks
    )


@pytest.mark.parametrize("count", [14, 22, 32, 58], ids=lambda n: f"{n} tiles")
def test_the_first_number_of_chunks_that_fits_is_found_where_more_chunks_need_more(count) -> None:
    """7 chunks of 14 tiles hold 3 x 2 of them, 13 chunks 4 x 2: a search by halves would miss the 7."""
    one = problem(queries=count * 96)
    assert chunk_violations(one) != []
    group, counts = head_groups(one)[-1], chunk_counts(one, MACHINE)
    needs = [cqs_candidate(one, MACHINE, group, "memory", c).memory_bytes for c in counts]
    for budget in needs:
        found = [c.query_parts for c in cqs_candidates(one, MACHINE, budget, None) if not c.states_on_disk]
        assert counts[next(i for i, need in enumerate(needs) if need <= budget)] in found
