"""Plans for a GPU: both memory tables, the bound, refusals and the work of planning. No GPU is needed."""

from __future__ import annotations

import re
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import BRIEF, budget, problem, problems

from cqsa_arrays.cover import check_cover
from cqsa_arrays.errors import BudgetError
from cqsa_arrays.masks import Causal
from cqsa_arrays.planner import Budget, Machine, Plan, Rates, choose, take_over
from cqsa_arrays.planner.candidates import cqs_candidate, rectangular_candidate
from cqsa_arrays.planner.memory import (
    DEVICE_ALIGNMENT,
    DEVICE_TILE_TOKENS,
    OUTPUT_SLOTS,
    PINNED_PIECE_BYTES,
    PINNED_PIECES,
    READER_THREADS,
    THREAD_BYTES,
    output_slot,
)

MACHINE = Machine(2, 16 << 30, Rates(), gpu=True)
PINNED, THREADS = PINNED_PIECES * PINNED_PIECE_BYTES, (READER_THREADS + OUTPUT_SLOTS + 1) * THREAD_BYTES


def plan_for(one, size_bytes: int, *, cover="auto", chunks=None) -> Plan:
    return choose(one, budget(size_bytes), MACHINE, cover=cover, chunks=chunks, device="cuda:0")


def on_device(one):
    """The same with the result on the device."""
    return replace(one, result=replace(one.result, on_device=True, place="array", row_scalars=0))


def whole(size_bytes: int) -> int:
    return -(-size_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT


# fmt: off
CASES = {
    # 7 tiles of 128 tokens in 7 chunks: of two tasks that share a chunk, 2 * 3 - 1 chunks are there at once.
    "cqs": (
        problem(heads=2, queries=896, dim=64, value_dim=32, dtype="float16", staging=5000, held=20, touched=9,
                result_staging=700),
        lambda one: cqs_candidate(one, MACHINE, (1, 2), "memory", 7),
        {
            "key chunks": 2 * 5 * 128 * 64 * 2, "value chunks": 2 * 5 * 128 * 32 * 2,
            "query chunks": 2 * 2 * 128 * 64 * 2, "states": 2 * 896 * (32 + 2) * 4,
            "output pieces": OUTPUT_SLOTS * whole(2 * 128 * (32 * 2 + 4) + 8),
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "read and write staging": READER_THREADS * 5000 + OUTPUT_SLOTS * 700, "threads": THREADS,
            "caches of the inputs": 60, "chunks touched by a read": 9, "cover": 7 * 32,
        },
    ),
    # One head after the other: a chunk of the next has a place for its states while those of the last one leave.
    "cqs, heads by themselves": (
        problem(heads=2, queries=384, dim=64, dtype="float32"),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "memory", 3),
        {
            "key chunks": 3 * 128 * 64 * 4, "value chunks": 3 * 128 * 64 * 4, "query chunks": 2 * 128 * 64 * 4,
            "states": (3 + 1) * 128 * 66 * 4, "output pieces": OUTPUT_SLOTS * whole(128 * (64 * 4 + 4) + 8),
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "threads": THREADS, "cover": 3 * 32,
        },
    ),
    # Groups of two chunks are short: two of them at a time.
    "cqs, two chunks a head": (
        problem(heads=4, queries=256, dim=64, dtype="float16"),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "memory", 2),
        {
            "key chunks": 4 * 128 * 64 * 2, "value chunks": 4 * 128 * 64 * 2, "query chunks": 4 * 128 * 64 * 2,
            "states": 4 * 128 * 66 * 4, "output pieces": OUTPUT_SLOTS * whole(128 * (64 * 2 + 4) + 8),
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "threads": THREADS, "cover": 2 * 32,
        },
    ),
    # Three of 7 states are on the device, all of them on the host.
    "cqs, states on the host": (
        problem(queries=896, dim=64, value_dim=32, dtype="float16"),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "host", 7),
        {
            "key chunks": 5 * 128 * 64 * 2, "value chunks": 5 * 128 * 32 * 2, "query chunks": 2 * 128 * 64 * 2,
            "states": 3 * 128 * 34 * 4, "output pieces": OUTPUT_SLOTS * whole(128 * (32 * 2 + 4) + 8),
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "page-locked states": 896 * 34 * 4, "threads": THREADS, "cover": 7 * 32,
        },
    ),
    # The same in a file: one chunk at a time passes through the host.
    "cqs, states on the disk": (
        problem(queries=896, dim=64, value_dim=32, dtype="float16"),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "disk", 7),
        {
            "key chunks": 5 * 128 * 64 * 2, "value chunks": 5 * 128 * 32 * 2, "query chunks": 2 * 128 * 64 * 2,
            "states": 3 * 128 * 34 * 4, "output pieces": OUTPUT_SLOTS * whole(128 * (32 * 2 + 4) + 8),
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "page-locked states": 128 * 34 * 4, "threads": THREADS, "cover": 7 * 32,
        },
    ),
    # One task, once: nothing comes next.
    "cqs, one chunk of everything": (
        problem(queries=1000, keys=600, dim=8, dtype="float64"),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "memory", 1),
        {
            "key chunks": whole(600 * 8 * 8), "value chunks": whole(600 * 8 * 8), "query chunks": whole(1000 * 8 * 8),
            "states": whole(1000 * 10 * 8), "output pieces": OUTPUT_SLOTS * whole(1000 * (8 * 8 + 8) + 8),
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "threads": THREADS, "cover": 32,
        },
    ),
    # Two query tiles of 4 tiles each, blocks of 3 tiles of keys; the states of two tiles, one of which leaves.
    "rectangular": (
        problem(batch=2, queries=1024, keys=900, dim=16, dtype="float32", place="new array"),
        lambda one: rectangular_candidate(one, MACHINE, (1, 1), 3 * 128, 2),
        {
            "key chunks": 3 * 384 * 16 * 4, "value chunks": 3 * 384 * 16 * 4, "query chunks": 2 * 512 * 16 * 4,
            "states": 2 * 512 * 18 * 4, "output pieces": OUTPUT_SLOTS * 512 * 16 * 4,
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "threads": THREADS,
            "result": 2 * 1024 * 16 * 4,
        },
    ),
    # Three query tiles against three key blocks of 128 tokens: the keys of a head, and as many of the next.
    "rectangular, keys stay": (
        problem(heads=2, queries=384, dim=64, dtype="float16"),
        lambda one: rectangular_candidate(one, MACHINE, (1, 1), 128, 3, keys_stay=True),
        {
            "key chunks": 6 * 128 * 64 * 2, "value chunks": 6 * 128 * 64 * 2, "query chunks": 4 * 128 * 64 * 2,
            "states": 4 * 128 * 66 * 4, "output pieces": OUTPUT_SLOTS * whole(128 * (64 * 2 + 4) + 8),
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "threads": THREADS,
        },
    ),
    # The same into an array: a launch finishes its rows, and four tiles of output are under way.
    "rectangular, keys stay, no states": (
        problem(heads=2, queries=384, dim=64, dtype="float16", place="array"),
        lambda one: rectangular_candidate(one, MACHINE, (1, 1), 128, 3, keys_stay=True),
        {
            "key chunks": 6 * 128 * 64 * 2, "value chunks": 6 * 128 * 64 * 2, "query chunks": 4 * 128 * 64 * 2,
            "output tiles": 4 * 128 * 64 * 2,
        },
        {
            "page-locked pieces": PINNED, "page-locked output": OUTPUT_SLOTS * PINNED_PIECE_BYTES,
            "threads": THREADS,
        },
    ),
    # What lies on the device is the caller's, and rows of one launch have no state between launches.
    "in place": (
        on_device(problem(queries=1000, dim=8, dtype="float16", in_place=True)),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "memory", 1),
        {},
        {"threads": THREADS, "cover": 32},
    ),
    "in place, however many keys in one launch": (
        on_device(problem(queries=1000, keys=(1 << 24) + 1, dim=8, dtype="float32", in_place=True)),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "memory", 1),
        {},
        {"threads": THREADS, "cover": 32},
    ),
    "in place, several launches": (
        on_device(problem(queries=1000, dim=8, dtype="float16", in_place=True)),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "memory", 3),
        {"states": 3 * whole(384 * 10 * 4)},
        {"threads": THREADS, "cover": 96},
    ),
    "in place, states in the result": (
        on_device(problem(queries=1000, dim=8, in_place=True, holds_states=True)),
        lambda one: cqs_candidate(one, MACHINE, (1, 1), "memory", 3),
        {"states": 3 * whole(384 * 2 * 4)},
        {"threads": THREADS, "cover": 96},
    ),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_both_tables_by_hand(name) -> None:
    one, make, device, machine = CASES[name]
    candidate = make(one)
    assert {term.name: term.size_bytes for term in candidate.terms} == device
    assert {term.name: term.size_bytes for term in candidate.host_terms} == machine
    assert candidate.memory_bytes == sum(device.values())
    assert candidate.tile_tokens == DEVICE_TILE_TOKENS


@pytest.mark.parametrize("place", ["file", "array"])
@pytest.mark.parametrize("dim", [8, 64, 100, 128, 1 << 20, (1 << 20) + 1])
def test_rows_leave_through_pieces_that_are_kept_unless_one_row_is_more(dim, place) -> None:
    """A piece that is a little larger would be locked and unlocked by every run, a millisecond each."""
    one = problem(queries=1 << 20, dim=8, value_dim=dim, dtype="float32", place=place)
    slot = output_slot(one, cqs_candidate(one, MACHINE, (1, 1), "memory", 1).residency)
    lse_bytes = 4 if place == "file" else 0
    assert slot.lse_itemsize == lse_bytes
    assert slot.size_bytes == whole(slot.rows * (4 * dim + lse_bytes) + 2 * lse_bytes)
    assert slot.size_bytes <= PINNED_PIECE_BYTES or slot.rows == 1
    assert (slot.rows + 1) * (4 * dim + lse_bytes) > PINNED_PIECE_BYTES - 2 * lse_bytes


@st.composite
def device_problems(draw):
    """Inputs on the host and on the device, in any mixture, the result on either; something takes memory there."""
    one = draw(problems())
    stays = one.result.place != "file" and draw(st.booleans())
    result = replace(
        one.result, on_device=stays, holds_states=stays and one.result.holds_states,
        row_scalars=0 if stays else one.result.row_scalars,
    )  # fmt: skip
    places = {name: draw(st.booleans()) for name in "qkv"}
    places["q"] &= not (stays and all(places.values()))
    return replace(
        one, result=result, **{name: replace(getattr(one, name), in_place=there) for name, there in places.items()}
    )


@given(device_problems(), st.sampled_from(["auto", "cqs", "rectangular"]), st.floats(1, 50))
@BRIEF
def test_the_budget_is_kept_and_a_refusal_names_one_that_works(one, cover, factor) -> None:
    with pytest.raises(BudgetError) as caught:
        plan_for(one, 1, cover=cover)
    least = int(re.search(r"Pass memory=(\d+) or more", str(caught.value))[1])
    for size_bytes in (least, int(factor * least)):
        plan = plan_for(one, size_bytes, cover=cover)
        assert plan.memory_bytes <= size_bytes
        assert cover in ("auto", plan.cover_name)
        assert all(term.size_bytes % DEVICE_ALIGNMENT == 0 for term in plan.chosen.terms)


@given(device_problems())
@BRIEF
def test_no_smaller_budget_than_the_one_that_is_named_works(one) -> None:
    with pytest.raises(BudgetError) as caught:
        plan_for(one, 1)
    least = int(re.search(r"Pass memory=(\d+) or more", str(caught.value))[1])
    with pytest.raises(BudgetError):
        plan_for(one, least - 1)


@given(device_problems().filter(lambda one: max(one.query_tokens, one.key_tokens) < 5000), st.floats(1, 9))
@BRIEF
def test_chunks_fit_their_slots_and_hold_each_pair_once(one, factor) -> None:
    with pytest.raises(BudgetError) as caught:
        plan_for(one, 1)
    least = int(re.search(r"Pass memory=(\d+) or more", str(caught.value))[1])
    plan = plan_for(one, int(factor * least))
    size, cover = plan.chosen.residency, plan.build_cover()
    assert check_cover(cover).counted_pairs * one.batch * one.heads == one.pairs
    for task in cover.tasks():
        for step in task.steps():
            assert len(step.queries) <= size.query_chunk
            assert all(len(tokens) <= size.key_chunk for tokens in step.keys)
            assert len(step.keys) <= size.key_slots or one.k.in_place


def test_a_cold_file_whose_keys_fit_the_device_is_taken_in_the_order_in_which_it_comes() -> None:
    """Measured on one H100: 2.46 s, CQS Divide 2.8 and passing blocks 2.9; tiles of 16384 tokens 3.6."""
    one = problem(heads=8, queries=1 << 20, dim=64, dtype="float16", mask=Causal(), place="file")
    chosen = plan_for(one, 4 << 30).chosen
    assert chosen.keys_stay
    assert (chosen.query_parts, chosen.key_parts, chosen.heads) in {(8, 8, 1), (16, 16, 1)}


@pytest.mark.parametrize(("key_parts", "groups"), [(1, 3), (2, 2), (7, 1), (7, 3)])
def test_keys_that_stay_fit_their_slots(key_parts, groups) -> None:
    """And a group of heads is begun while the keys of the one before are there: of which at least one more."""
    one = problem(heads=groups, queries=7 * 128, dim=8, dtype="float16", mask=Causal())
    chosen = rectangular_candidate(one, MACHINE, (1, 1), -(-7 // key_parts) * 128, 7, keys_stay=True)
    cover = chosen.build_cover(one)
    assert all(len(list(task.steps())) == 1 for task in cover.tasks())
    most = max(len(step.keys) for task in cover.tasks() for step in task.steps())
    assert most == chosen.key_parts
    assert chosen.residency.key_slots >= most + (groups > 1)


def test_another_machine_goes_on_with_keys_that_stay() -> None:
    one = problem(heads=2, queries=384, dim=64, dtype="float16")
    chosen = rectangular_candidate(one, MACHINE, (1, 1), 128, 3, keys_stay=True)
    plan = Plan(one, "cuda:0", budget(1 << 30), chosen, None, "")
    other = take_over(one, budget(1 << 30), Machine(2, 16 << 30, Rates()), "cpu", plan.to_dict()["chosen"])
    assert other.build_cover() == plan.build_cover()
    assert other.chosen.residency.key_slots == 3
    passing = replace(plan, chosen=rectangular_candidate(one, MACHINE, (1, 1), 128, 3))
    assert passing.identity != plan.identity  # other bits


def test_a_host_that_has_too_little_to_feed_the_device_is_refused() -> None:
    one = problem(queries=5000, dtype="float16")
    limit = Budget(1 << 30, "memory='1GiB'", "/scratch", host_bytes=1 << 20)
    with pytest.raises(
        BudgetError, match=r'^host_memory: .* budget is 1 MiB; largest term "page-locked pieces" 32 MiB'
    ):
        choose(one, limit, MACHINE, cover="auto", chunks=None, device="cuda:0")


def test_the_text_shows_both_tables() -> None:
    text = str(plan_for(problem(queries=5000, dtype="float16"), 64 << 20))
    assert re.search(r"^plan \w+ on cuda:0", text)
    for name in ("memory", "host memory", "query chunks", "page-locked pieces", "page-locked output"):
        assert re.search(rf"^ +{name}\b", text, re.M)


BILLION = {
    "file": problem(heads=2, queries=1 << 30, dim=128, dtype="float16", mask=Causal()),
    "many heads": problem(batch=8, heads=64, queries=1 << 30, dtype="bfloat16"),
    "on the device": on_device(problem(queries=1 << 30, dtype="float16", in_place=True)),
    "few queries": problem(queries=7, keys=1 << 30, mask=Causal((1 << 30) - 7)),
}


@pytest.mark.parametrize("name", BILLION)
@pytest.mark.parametrize("cover", ["auto", "rectangular"])
def test_planning_a_billion_tokens_takes_little_memory(name, cover) -> None:
    # States of CQS Divide are on the device: 512 GiB hold those of any of these heads.
    size_bytes = 512 << 30 if cover == "auto" else 1 << 30
    if cover == "rectangular" and name == "on the device":
        size_bytes = 64 << 30
    tracemalloc.start()
    try:
        plan = plan_for(BILLION[name], size_bytes, cover=cover)
        assert "1,073,741,824" in str(plan)
        assert plan.identity in plan.to_json()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.memory_bytes <= size_bytes
    assert peak_bytes < 50e6


def test_states_wait_on_the_host_where_the_device_has_no_room_and_on_the_disk_where_the_host_has_none() -> None:
    one = problem(queries=1 << 20, dtype="float16")
    roomy, tight, tighter = (
        choose(one, Budget(*sizes), MACHINE, cover="cqs", chunks=None, device="cuda:0")
        for sizes in (
            (1 << 30, "memory", "/scratch"),
            (128 << 20, "memory", "/scratch", 1 << 30),
            (128 << 20, "memory", "/scratch", 200 << 20),
        )
    )
    assert (roomy.chosen.states, tight.chosen.states, tighter.chosen.states) == ("memory", "host", "disk")
    assert tight.chosen.host_bytes > (1 << 20) * 66 * 4
    assert tight.chosen.scratch_bytes == 0
    assert tighter.chosen.scratch_bytes == 2 * (1 << 20) * 66 * 4
    assert "in page-locked memory of the host" in str(tight)
    assert "in a scratch file" in str(tighter)


def test_parts_of_a_step_begin_at_whole_warps_of_rows() -> None:
    """A kernel rescales 32 rows together: parts that cut such rows would give other bits than whole steps."""
    parts = set()
    for tokens in (1 << 22, 1 << 26, 1 << 30):
        for dim in (8, 64, 128):
            plan = plan_for(problem(heads=1, queries=tokens, dim=dim, dtype="float16"), 4 << 30)
            if plan.part_rows < plan.chosen.residency.query_chunk:
                parts.add(plan.part_rows)
    assert len(parts) > 1
    assert all(rows % 32 == 0 for rows in parts)
