"""Resident blocks: read once, evicted by age, never served half read."""

from itertools import pairwise

import numpy as np
import pytest
from engine_cases import FakeSource, group, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from cqsa_arrays.engine.pages import Pages
from cqsa_arrays.ranges import Range

TOKENS = 10
BLOCKS = [Range(start, min(start + TOKENS, 58)) for start in range(0, 60, TOKENS)]


def pages_of(slots, *, heads=2, **options) -> tuple[Pages, FakeSource]:
    source = FakeSource("k", normal(2, 3, 58, 4), [], **options)
    return Pages(source, slots=slots, tokens=TOKENS, heads=heads, dtype="float32"), source


def wanted(source, of, tokens) -> np.ndarray:
    return source.array[of.batch.slice, of.heads.slice, tokens.slice]


@given(st.integers(1, 4), st.booleans(), st.lists(st.sampled_from([*range(5), *range(5), "begin"]), max_size=40))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_loads_against_a_plain_list(slots, token_major, moves) -> None:
    pages, source = pages_of(slots, token_major=token_major)
    groups = [group(2), group(1, first_head=2)]
    pages.begin(groups[0])
    resident, reads, which = [], 0, 0
    for move in moves:
        if move == "begin":
            which = 1 - which
            pages.begin(groups[which])
            resident = []
            continue
        block = pages.load(BLOCKS[move])
        assert (block == wanted(source, groups[which], BLOCKS[move])).all()
        if move in resident:
            resident.remove(move)
        else:
            reads += 1
        resident = [*resident, move][-slots:]
        assert source.reads == reads


def test_blocks_stay_whole_until_as_many_others_were_loaded() -> None:
    pages, source = pages_of(3)
    pages.begin(group(2))
    held = [(tokens, pages.load(tokens)) for tokens in BLOCKS[:3]]
    for tokens, block in held:
        assert (block == wanted(source, group(2), tokens)).all()
    assert not any(np.shares_memory(a, b) for (_, a), (_, b) in pairwise(held))


def test_another_group_of_the_same_heads_reads_again() -> None:
    pages, source = pages_of(3)
    for _ in range(2):
        pages.begin(group(2))
        pages.load(BLOCKS[0])
    assert source.reads == 2


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_block_that_was_half_read_is_never_served(slots, fail_at) -> None:
    pages, source = pages_of(slots, fail_at=fail_at)
    pages.begin(group(2))
    for tokens in BLOCKS[: fail_at - 1]:
        pages.load(tokens)
    with pytest.raises(OSError, match="k is gone"):
        pages.load(BLOCKS[fail_at - 1])
    assert source.reads == fail_at
    for tokens in (BLOCKS[fail_at - 1], BLOCKS[4], *BLOCKS[:3], BLOCKS[fail_at - 1]):
        assert (pages.load(tokens) == wanted(source, group(2), tokens)).all()


def test_a_block_that_gave_way_to_a_half_read_one_is_read_again() -> None:
    pages, source = pages_of(1, fail_at=2)
    pages.begin(group(2))
    pages.load(BLOCKS[0])
    with pytest.raises(OSError, match="k is gone"):
        pages.load(BLOCKS[1])
    assert (pages.load(BLOCKS[0]) == wanted(source, group(2), BLOCKS[0])).all()
    assert source.reads == 3


def test_failures_lose_no_slot() -> None:
    pages, source = pages_of(2)
    pages.begin(group(2))
    for number in range(1, 6):
        source.fail_at = source.reads + 1
        with pytest.raises(OSError, match="k is gone"):
            pages.load(BLOCKS[number])
    source.fail_at = None
    first, second = pages.load(BLOCKS[0]), pages.load(BLOCKS[1])
    assert not np.shares_memory(first, second)
    reads = source.reads
    pages.load(BLOCKS[0])
    pages.load(BLOCKS[1])
    assert source.reads == reads


def test_an_array_in_place_is_shown_itself() -> None:
    pages, source = pages_of(3, in_place=True)
    pages.begin(group(2))
    block = pages.load(BLOCKS[2])
    assert np.shares_memory(block, source.array)
    assert (block == wanted(source, group(2), BLOCKS[2])).all()
    assert pages.holds(group(2), BLOCKS[2])
    assert [entry[0] for entry in source.log] == ["view"]


def test_narrower_elements_are_widened() -> None:
    source = FakeSource("k", normal(1, 1, 10, 4, dtype="float16"), [])
    pages = Pages(source, slots=1, tokens=TOKENS, heads=1, dtype="float32")
    pages.begin(group())
    block = pages.load(BLOCKS[0])
    assert block.dtype == np.float32
    assert (block == source.array).all()


def test_reading_ahead_is_for_what_is_not_resident() -> None:
    pages, source = pages_of(2)
    here, there = group(2), group(1, first_head=2)
    pages.begin(here)
    pages.load(BLOCKS[0])
    assert pages.holds(here, BLOCKS[0])
    assert not pages.holds(here, BLOCKS[1])
    assert not pages.holds(there, BLOCKS[0])
    pages.prefetch(there, BLOCKS[0])
    assert source.log[1:] == [("prefetch", "k", there.batch, there.heads, BLOCKS[0])]


def test_begin_comes_first() -> None:
    with pytest.raises(AssertionError, match="begin"):
        pages_of(1)[0].load(BLOCKS[0])
