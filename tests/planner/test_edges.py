"""The first and the last group of heads on a GPU: when they are cut into tiles, and that nothing is lost by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import BRIEF, problem

from cqsa_arrays.cover.check import check_cover
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.planner import Machine, Plan, Rates
from cqsa_arrays.planner.candidates import cqs_candidate, rectangular_candidate
from cqsa_arrays.planner.edges import edge_covers
from cqsa_arrays.ranges import Range

GPU = Machine(2, 16 << 30, Rates(), gpu=True)
# As long as the GPU takes longer for one head than Python.
LONG = 1 << 17


def job(**changes):
    usual = {"heads": 8, "queries": LONG, "dtype": "float16", "mask": Causal(), "place": "new array"}
    return problem(**usual | changes)


def one_chunk(one, heads=1):
    return cqs_candidate(one, GPU, (1, heads), "memory", 1)


@pytest.mark.parametrize("make", [one_chunk, lambda one: rectangular_candidate(one, GPU, (1, 1), one.key_tokens, 1)])
def test_heads_of_one_launch_each_begin_and_end_in_two(make) -> None:
    one = job()
    chosen = make(one)
    assert chosen.edge_tiles == 2
    first, last = edge_covers(one, 2, chosen.tile_tokens)
    half = LONG // 2
    begin = next(first.task(0).steps())
    assert (begin.queries, begin.keys) == (Range(0, half), (Range(0, half),))  # half of the tokens will do
    assert [next(task.steps()).queries for task in last.tasks()] == [Range(half, LONG), Range(0, half)]
    assert [list(last.finished_by(i)) for i in range(2)] == [[Range(half, LONG)], [Range(0, half)]]
    size = chosen.residency  # two tiles, and the next head
    assert size.key_slots >= 3
    assert size.query_slots >= 2


@pytest.mark.parametrize(
    "candidate",
    [
        one_chunk(job(queries=1 << 15)),  # Python takes longer
        one_chunk(job(heads=2)),
        one_chunk(job(), heads=4),
        one_chunk(job(place="file")),  # rows leave through states
        one_chunk(replace(job(), result=replace(job().result, on_device=True))),
        cqs_candidate(job(queries=1 << 19), GPU, (1, 1), "memory", 2),
        rectangular_candidate(job(), GPU, (1, 1), LONG // 2, 2, keys_stay=True),
        cqs_candidate(job(), Machine(2, 16 << 30, Rates()), (1, 1), "memory", 1),
    ],
    ids=["short", "two", "groups of four", "file", "stays", "chunks", "keys stay", "on the CPU"],
)
def test_others_do_not(candidate) -> None:
    assert candidate.edge_tiles == 1
    assert Plan(job(), "cuda:0", None, candidate, None, "").build_edge_covers() is None


@given(st.integers(2, 2000), st.integers(2, 2000), st.sampled_from([Full(), Causal(), Causal(-300), Causal(300)]))
@BRIEF
def test_each_pair_is_in_one_tile(queries, keys, mask) -> None:
    one = job(queries=queries, keys=keys, mask=mask)
    for cover in edge_covers(one, 2, 128):
        assert check_cover(cover).counted_pairs * one.heads == one.pairs


def test_plans_with_such_tiles_have_a_name_of_their_own() -> None:
    """The keys of the first head are two blocks, which gives other bits."""
    one = job()
    plan = Plan(one, "cuda:0", None, one_chunk(one), None, "")
    assert replace(plan, chosen=replace(plan.chosen, edge_tiles=1)).identity != plan.identity
