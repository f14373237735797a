"""The plan itself: groups, text, JSON, identity, floating-point operations, and what it costs to make one."""

import json
import re
import sys
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import BRIEF, MACHINE, THOROUGH, budget, plan_for, problem

from cqsa_arrays.cover import CqsCover, RectangularCover, check_cover, set_size
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.planner import Machine, Plan, Rates, choose, mask_from_dict, mask_to_dict
from cqsa_arrays.planner.candidates import cqs_candidate, head_groups, rectangular_candidate
from cqsa_arrays.units import format_bytes, format_seconds


def plan_of(one, candidate, alternative=None) -> Plan:
    return Plan(one, "cpu", budget(1 << 40), candidate, alternative, "asked for")


# Groups of heads.


@given(st.integers(1, 6), st.integers(1, 20), st.booleans())
@BRIEF
def test_groups_share_out_all_heads_of_all_batches_once(batch, heads, token_major) -> None:
    one = problem(batch=batch, heads=heads, token_major=token_major)
    ways = head_groups(one)
    assert ways[0] == (batch, heads)
    assert len(set(ways)) == len(ways)
    assert ways[-1] == (1, heads if token_major else 1)
    for batches, together in ways:
        plan = plan_of(one, cqs_candidate(one, MACHINE, (batches, together), "memory", 1))
        times = np.zeros((batch, heads), int)
        for group in plan.groups:
            assert len(group.batch) <= batches
            assert len(group.heads) <= together
            times[group.batch.slice, group.heads.slice] += 1
        assert (times == 1).all()


# Text.

SHOWN = problem(
    batch=2, heads=4, queries=10_000, keys=9_000, value_dim=32, dtype="float16", mask=Causal(-7), staging=1 << 20
)


def test_one_thing_is_not_called_several() -> None:
    one, several = (
        str(plan_for(problem(queries=500), 64 << 20, cover="cqs")),
        str(plan_for(SHOWN, 4 << 20, cover="cqs")),
    )
    assert "1 task of 1 chunk (" in one
    assert ", 1 group\n" in one
    assert re.search(r"\d+ tasks of \d+ chunks \(", several)
    assert re.search(r", \d+ groups\n", several)


@pytest.mark.parametrize("cover", ["cqs", "rectangular"])
def test_the_text_shows_everything_that_a_reader_asks(cover) -> None:
    plan = plan_for(SHOWN, 12 << 20, cover=cover)
    text, chosen = str(plan), plan.chosen
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert plan.identity in text
    assert "batch 2, heads 4, queries 10,000, keys 9,000, D 64, Dv 32, causal, offset -7" in text
    assert f"float16 -> float32, {SHOWN.flops:.3g} floating-point operations" in text
    assert f"output       out.h5:/out, float16, {format_bytes(SHOWN.output_bytes)}" in text
    if cover == "cqs":
        size = set_size(chosen.query_parts)
        assert re.search(rf"cqs: {chosen.query_parts:,} tasks? of {size} chunks? ", text)
    else:
        assert re.search(
            rf"rectangular: {chosen.query_parts:,} query tiles?, each against {chosen.key_parts:,} key blocks?$",
            text,
            re.M,
        )
    size = chosen.residency
    assert f"{size.query_chunk:,} query and {size.key_chunk:,} key tokens" in text
    assert f"{chosen.batches * chosen.heads} of 8 heads together, {len(plan.groups)} groups" in text
    assert "asked for" in rows["why"]
    for term in chosen.terms:
        (line,) = (line for line in text.splitlines() if line.startswith(f"    {term.name} "))
        assert line.split(term.name)[1].strip() == format_bytes(term.size_bytes)
    assert f"{format_bytes(plan.memory_bytes)}  of 12 MiB (memory={12 << 20})" in rows["total"]
    header, *priced = text.splitlines()[-3:]
    assert header.split("  ")[1].strip() == "price"
    for candidate, remark, line in zip((chosen, plan.alternative), ("chosen", "not chosen"), priced, strict=True):
        moved = candidate.traffic
        disk = candidate.scratch_bytes + moved.output_written_bytes
        cells = [moved.input_read_bytes, moved.state_read_bytes + moved.state_written_bytes]
        cells += [moved.output_written_bytes, disk]
        expected = [candidate.cover, format_seconds(candidate.estimated_s), *map(format_bytes, cells), remark]
        assert " ".join(line.split()) == " ".join(expected)


def test_states_on_disk_are_shown_with_their_room() -> None:
    one = problem(queries=1_000_000)
    candidate = cqs_candidate(one, MACHINE, (1, 1), "disk", 57)
    assert candidate.scratch_bytes == 2 * 1_000_000 * 66 * 4
    text = str(plan_of(one, candidate))
    assert "in a scratch file, two slots each" in text
    assert format_bytes(candidate.scratch_bytes + one.output_bytes) in text.splitlines()[-1]
    assert "in memory" in str(plan_of(one, cqs_candidate(one, MACHINE, (1, 1), "memory", 57)))


# JSON.


@pytest.mark.parametrize("cover", ["auto", "cqs", "rectangular"])
@pytest.mark.parametrize("one", [SHOWN, problem(queries=1 << 30, mask=Causal((1 << 62) - 1))], ids=["short", "long"])
def test_json_keeps_every_number(one, cover) -> None:
    plan = plan_for(one, 5 << 30, cover=cover)
    found = json.loads(plan.to_json())
    assert found == json.loads(json.dumps(plan.to_dict()))
    assert found["identity"] == plan.identity
    assert found["memory_bytes"] == plan.memory_bytes == sum(t["size_bytes"] for t in found["chosen"]["terms"])
    assert found["flops"] == one.flops
    assert found["budget"] == {
        "memory_bytes": 5 << 30,
        "origin": f"memory={5 << 30}",
        "scratch": "/scratch",
        "host_bytes": None,
    }
    assert found["problem"]["scale"] == one.scale
    assert found["problem"]["q"]["shape"] == list(one.q.shape)
    assert mask_from_dict(found["problem"]["mask"]) == one.mask
    for name, candidate in (("chosen", plan.chosen), ("alternative", plan.alternative)):
        assert found[name]["estimated_s"] == candidate.estimated_s
        assert found[name]["traffic"] == asdict(candidate.traffic)
        assert found[name]["residency"] == asdict(candidate.residency)


@given(st.one_of(st.just(Full()), st.builds(Causal, st.integers(-(1 << 62), 1 << 62))))
@BRIEF
def test_masks_survive_json(mask) -> None:
    assert mask_from_dict(json.loads(json.dumps(mask_to_dict(mask)))) == mask


@pytest.mark.parametrize(
    "stored", [{}, {"kind": "window"}, {"kind": "causal"}, {"kind": "causal", "offset": 0.5}], ids=str
)
def test_other_dictionaries_are_no_masks(stored) -> None:
    with pytest.raises(ValueError, match="not a mask"):
        mask_from_dict(stored)


# Identity.

SQUARE = problem(batch=2, heads=4, queries=2000, keys=3000, mask=Causal(0))
PLAIN = plan_of(SQUARE, cqs_candidate(SQUARE, MACHINE, (1, 4), "memory", 7))


def with_problem(**changes) -> Plan:
    return replace(PLAIN, problem=replace(SQUARE, **changes))


def with_chosen(**changes) -> Plan:
    return replace(PLAIN, chosen=replace(PLAIN.chosen, **changes))


DECIDES_BITS = {
    "shape of q": with_problem(q=replace(SQUARE.q, shape=(2, 4, 2001, 64))),
    "shape of k": with_problem(k=replace(SQUARE.k, shape=(2, 4, 3001, 64))),
    "shape of v": with_problem(v=replace(SQUARE.v, shape=(2, 4, 3000, 65))),
    "another input": with_problem(v=replace(SQUARE.v, description="other.h5:/v")),
    "type of the inputs": with_problem(q=replace(SQUARE.q, dtype="float16")),
    "arithmetic": with_problem(compute_dtype="float64"),
    "type of the result": with_problem(result=replace(SQUARE.result, dtype="float16")),
    "scale": with_problem(scale=np.nextafter(SQUARE.scale, 1)),
    "offset": with_problem(mask=Causal(1)),
    "mask": with_problem(mask=Full()),
    "cover": with_chosen(cover="rectangular"),
    "query chunks": with_chosen(query_parts=13),
    "key chunks": with_chosen(key_parts=13),
    "heads together": with_chosen(heads=2),
    "batches together": with_chosen(batches=2),
    "device": replace(PLAIN, device="cuda:0"),
}


@pytest.mark.parametrize("other", DECIDES_BITS.values(), ids=DECIDES_BITS)
def test_what_decides_the_bits_changes_the_identity(other) -> None:
    assert other.identity != PLAIN.identity


def test_no_two_of_them_share_an_identity() -> None:
    assert len({plan.identity for plan in DECIDES_BITS.values()}) == len(DECIDES_BITS)


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAIN, budget=budget(1)),
        replace(PLAIN, budget=replace(PLAIN.budget, scratch="/elsewhere")),
        plan_of(SQUARE, cqs_candidate(SQUARE, Machine(64, 1, Rates(disk_read_bytes=1)), (1, 4), "memory", 7)),
        plan_of(SQUARE, cqs_candidate(SQUARE, MACHINE, (1, 4), "disk", 7)),
        replace(PLAIN, reason="priced"),
        replace(PLAIN, alternative=PLAIN.chosen),
    ],
    ids=["budget", "scratch", "threads and prices", "place of states", "reason", "alternative"],
)
def test_what_decides_no_bits_does_not(other) -> None:
    assert other != PLAIN
    assert other.identity == PLAIN.identity


def test_two_budgets_that_lead_to_the_same_chunks_are_one_plan() -> None:
    first, second = (plan_for(SQUARE, limit) for limit in (1 << 30, 1 << 31))
    assert first != second
    assert first.identity == second.identity


# Floating-point operations.


@given(
    st.integers(1, 30), st.integers(1, 30), st.one_of(st.just(None), st.integers(-35, 35)), st.integers(1, 3),
    st.integers(1, 3),
)  # fmt: skip
@THOROUGH
def test_flops_count_every_visible_pair(queries, keys, offset, batch, heads) -> None:
    mask = Full() if offset is None else Causal(offset)
    one = problem(batch=batch, heads=heads, queries=queries, keys=keys, dim=3, value_dim=5, mask=mask)
    seen = sum(offset is None or j <= i + offset for i in range(queries) for j in range(keys))
    assert one.pairs == batch * heads * seen
    # A multiplication and an addition for each of D elements of the score and Dv of the output.
    assert one.flops == 2 * (3 + 5) * batch * heads * seen


# The cover of a plan.


@pytest.mark.parametrize("count", [1, 5, 7, 16], ids=lambda n: f"{n} parts")
@pytest.mark.parametrize("kind", [CqsCover, RectangularCover])
def test_the_cover_holds_each_pair_once_in_chunks_that_fit_the_residency(count, kind) -> None:
    one = problem(queries=1000, keys=700, mask=Causal(-200))
    if kind is CqsCover:
        candidate = cqs_candidate(one, MACHINE, (1, 1), "memory", count)
    else:
        candidate = rectangular_candidate(one, MACHINE, (1, 1), 192, count)
    cover = plan_of(one, candidate).build_cover()
    assert isinstance(cover, kind)
    assert check_cover(cover).counted_pairs == one.pairs
    size = candidate.residency
    for task in cover.tasks():
        assert len(task.key_ranges()) <= size.key_slots or kind is RectangularCover
        assert all(len(step.keys) <= size.key_slots for step in task.steps())
        assert all(len(tokens) <= size.query_chunk for tokens in task.query_ranges())
        assert all(len(tokens) <= size.key_chunk for tokens in task.key_ranges())


# What planning costs.


def calls_of(work) -> int:
    """Function calls, Python's and C's, while ``work`` runs."""
    calls = 0

    def count(_frame, event, _argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(previous)
    return calls


BILLION = {
    "file, causal": problem(heads=2, queries=1 << 30, dim=128, dtype="float16", mask=Causal()),
    "file, full, many heads": problem(batch=8, heads=64, queries=1 << 30, dtype="bfloat16"),
    "in place": problem(queries=1 << 30, in_place=True, place="array", holds_states=True),
    "few queries": problem(queries=7, keys=1 << 30, mask=Causal((1 << 30) - 7)),
}


@pytest.mark.parametrize("name", BILLION)
def test_planning_a_billion_tokens_is_little_work_in_little_memory(name) -> None:
    one = BILLION[name]

    def work() -> str:
        plan = choose(one, budget(64 << 30), MACHINE, cover="auto", chunks=None, device="cpu")
        return str(plan) + plan.to_json()

    assert "1,073,741,824" in work()
    assert calls_of(work) < (500_000 if name == "file, full, many heads" else 200_000)
    tracemalloc.start()
    try:
        work()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 50e6


def test_a_step_of_a_billion_tokens_is_made_without_listing_the_others() -> None:
    one = BILLION["file, causal"]
    plan = plan_for(one, 64 << 30, cover="cqs")
    tracemalloc.start()
    try:
        step = next(plan.build_cover().task(0).steps())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(step.queries) <= plan.chosen.residency.query_chunk
    assert peak_bytes < 50e6
