"""Choosing: every plan fits, refusals name the smallest budget, and the design's rule decides between the covers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import BRIEF, MACHINE, THOROUGH, budget, covers, every_candidate, plan_for, problem, problems

from cqsa_arrays.errors import ArgumentError, BudgetError
from cqsa_arrays.masks import Causal
from cqsa_arrays.planner import Machine, Rates, choose
from cqsa_arrays.units import format_bytes

TB = 10**12


def named_budget(one, cover, chunks=None) -> int:
    """The budget that the refusal of one byte names."""
    with pytest.raises(BudgetError) as refused:
        plan_for(one, 1, cover=cover, chunks=chunks)
    return int(re.search(r"Pass memory=(\d+) or more", str(refused.value))[1])


def expected_cover(cqs, rectangular) -> str:
    moved = cqs.traffic
    writes_too_much = cqs.states_on_disk and moved.state_written_bytes > 2 * moved.output_written_bytes
    return "rectangular" if writes_too_much or cqs.estimated_s > 1.05 * rectangular.estimated_s else "cqs"


@given(problems(), covers, st.integers(18, 40))
@THOROUGH
def test_every_plan_fits_its_budget_and_follows_the_rule(one, cover, exponent) -> None:
    limit = 3 << exponent
    try:
        plan = plan_for(one, limit, cover=cover)
    except BudgetError:
        return
    priced = {c.cover: c for c in (plan.chosen, plan.alternative) if c is not None}
    assert all(candidate.memory_bytes <= limit for candidate in priced.values())
    assert plan.memory_bytes == plan.chosen.memory_bytes
    assert plan.alternative is None or plan.alternative.cover != plan.cover_name
    if cover != "auto":
        assert (plan.cover_name, plan.reason) == (cover, "asked for")
    elif len(priced) == 2:
        assert plan.cover_name == expected_cover(priced["cqs"], priced["rectangular"])
    else:
        assert plan.reason == "the only cover that fits the budget"
        with pytest.raises(BudgetError):
            plan_for(one, limit, cover="cqs" if plan.cover_name == "rectangular" else "rectangular")


@given(problems(), covers)
@BRIEF
def test_the_budget_that_a_refusal_names_works_and_one_byte_less_does_not(one, cover) -> None:
    named = named_budget(one, cover)
    assert plan_for(one, named, cover=cover).memory_bytes <= named
    with pytest.raises(BudgetError):
        plan_for(one, named - 1, cover=cover)


@given(problems(), st.integers(1, 200))
@BRIEF
def test_so_does_the_one_for_a_number_of_chunks(one, chunks) -> None:
    named = named_budget(one, "cqs", chunks)
    plan = plan_for(one, named, cover="cqs", chunks=chunks)
    assert (plan.memory_bytes, plan.chosen.query_parts, plan.chosen.key_parts) == (named, chunks, chunks)
    with pytest.raises(BudgetError):
        plan_for(one, named - 1, cover="cqs", chunks=chunks)


@given(problems())
@BRIEF
def test_no_rectangle_needs_less_than_the_named_budget(one) -> None:
    assert named_budget(one, "rectangular") == min(c.memory_bytes for c in every_candidate(one, "rectangular"))


@pytest.mark.parametrize("count", [14, 22, 32, 58], ids=lambda n: f"{n} tiles")
def test_no_number_of_chunks_needs_less_than_the_named_budget(count) -> None:
    one = problem(queries=count * 96)
    assert named_budget(one, "cqs") == min(c.memory_bytes for c in every_candidate(one, "cqs"))


def test_a_refusal_names_the_smallest_plan_and_its_largest_term() -> None:
    one = problem(heads=4, queries=100_000, place="new array")
    with pytest.raises(BudgetError) as refused:
        plan_for(one, 1 << 20)
    text, result = str(refused.value), format_bytes(4 * 100_000 * 64 * 4)
    assert text.startswith("memory: this problem does not fit 1 MiB (memory=1048576); its smallest plan (rectangular)")
    assert f'"result" {result}' in text
    assert isinstance(refused.value, MemoryError)


# The rule of choice.


@pytest.mark.parametrize(
    ("one", "limit", "machine", "cover", "reason"),
    [
        (problem(heads=4, queries=8192), 1 << 30, MACHINE, "cqs", "the default"),
        (problem(heads=4, queries=8192, in_place=True, place="array"), 1 << 30, MACHINE, "cqs", "the default"),
        (problem(queries=1 << 24, dtype="float16"), 1 << 28, MACHINE, "rectangular", "cqs would write"),
        (problem(queries=99_840, result_dtype="float64"), 23_000_000, MACHINE, "rectangular", "cqs would write"),
        (problem(queries=1 << 16), 44 << 20, Machine(2, 1 << 40, Rates(cached_bytes=1e7)), "rectangular", "slower"),
    ],
    ids=["in memory", "in place", "cqs writes 76 times the output", "2.6 times", "cqs copies too much"],
)
def test_what_is_chosen_and_why(one, limit, machine, cover, reason) -> None:
    plan = plan_for(one, limit, machine=machine)
    assert plan.cover_name == cover
    assert reason in plan.reason
    assert plan.alternative is not None
    assert plan.alternative.cover != cover


def test_a_forced_cover_that_does_not_fit_is_refused_and_not_replaced() -> None:
    one = problem(queries=1 << 20, in_place=True, place="array")
    least = {cover: named_budget(one, cover) for cover in ("cqs", "rectangular")}
    smaller, larger = sorted(least, key=least.get)
    with pytest.raises(BudgetError, match=f"smallest plan \\({larger}\\)"):
        plan_for(one, least[smaller], cover=larger)
    assert plan_for(one, least[smaller]).cover_name == smaller


def test_a_billion_tokens_in_4_gib_write_what_the_design_says() -> None:
    one = problem(queries=1 << 30, dim=64, dtype="float16")
    quorums, rectangle = plan_for(one, 4 << 30, cover="cqs"), plan_for(one, 4 << 30)
    assert rectangle.cover_name == "rectangular"
    assert round(quorums.chosen.traffic.state_written_bytes / TB) == 37
    assert round(rectangle.chosen.traffic.output_written_bytes / TB, 2) == 0.14


@pytest.mark.parametrize(
    ("cover", "chunks", "argument"),
    [("auto", 0, "chunks"), ("cqs", -3, "chunks"), ("rectangular", 3, "chunks")],
    ids=str,
)
def test_unknown_choices_are_refused_by_name(cover, chunks, argument) -> None:
    with pytest.raises(ArgumentError) as refused:
        choose(problem(), budget(1 << 30), MACHINE, cover=cover, chunks=chunks, device="cpu")
    assert refused.value.argument == argument


# The same call, the same plan.


@given(problems(), covers, st.integers(20, 36))
@BRIEF
def test_the_same_call_gives_the_same_plan(one, cover, exponent) -> None:
    def attempt():
        try:
            return plan_for(one, 1 << exponent, cover=cover)
        except BudgetError as error:
            return str(error)

    first, second = attempt(), attempt()
    assert first == second
    assert str(first) == str(second)


def test_with_room_to_spare_another_number_of_threads_gives_a_plan_of_the_same_identity() -> None:
    """Under a tight budget the memory of the threads counts, and more of them may need other chunks."""
    one = problem(queries=1 << 18, dtype="float16", mask=Causal())
    identities = {plan_for(one, 2 << 30, machine=Machine(n, 16 << 30, Rates())).identity for n in (1, 2, 4, 8)}
    assert len(identities) == 1
