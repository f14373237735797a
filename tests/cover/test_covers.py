"""Both covers against brute force: every visible pair once, over ragged, empty, unequal and shifted cuts."""

import doctest
import importlib
import pickle
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cqsa_arrays.cover import CqsCover, RectangularCover, Step, check_cover, set_size
from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.ranges import Cut, Range

THOROUGH = settings(max_examples=300, deadline=None, derandomize=True, database=None)

tokens, tiles, parts = st.integers(0, 40), st.integers(1, 7), st.integers(1, 45)
masks = st.one_of(
    st.just(Full()), st.builds(Causal, st.integers(-45, 45)), st.sampled_from([Causal(1 << 61), Causal(-(1 << 61))])
)


@st.composite
def cqs_covers(draw) -> CqsCover:
    c = draw(parts)
    return CqsCover(Cut(draw(tokens), c, draw(tiles)), Cut(draw(tokens), c, draw(tiles)), draw(masks))


rectangular_covers = st.builds(
    RectangularCover, st.builds(Cut, tokens, parts, tiles), st.builds(Cut, tokens, parts, tiles), masks
)
covers = st.one_of(cqs_covers(), rectangular_covers)


def visible_pairs(cover) -> np.ndarray:
    """(Nq, Nk), row by row from the meaning of the mask."""
    reach = getattr(cover.mask, "offset", cover.keys.tokens)
    keys = np.arange(cover.keys.tokens)
    rows = [keys <= (row if isinstance(cover.mask, Causal) else 0) + reach for row in range(cover.queries.tokens)]
    return np.array(rows, dtype=bool).reshape(cover.queries.tokens, cover.keys.tokens)


@given(covers)
@THOROUGH
def test_each_visible_pair_is_held_once(cover) -> None:
    visible = visible_pairs(cover)
    times = np.zeros(visible.shape, dtype=int)
    for task in cover.tasks():
        queries, keys = [], set()
        for step in task.steps():
            assert step.keys
            for block in step.keys:
                assert visible[step.queries.slice, block.slice].any()
                times[step.queries.slice, block.slice] += 1
            queries.append(step.queries)
            keys |= set(step.keys)
        assert task.query_ranges() == tuple(dict.fromkeys(queries))
        assert len(task.key_ranges()) == len(keys)
        assert set(task.key_ranges()) == keys
    assert (times[visible] == 1).all()
    assert (times <= 1).all()
    report = check_cover(cover)
    assert report.visible_pairs == report.counted_pairs == visible.sum()


@given(covers)
@THOROUGH
def test_rows_are_finished_once_and_not_used_after(cover) -> None:
    finished = np.zeros(cover.queries.tokens, dtype=int)
    for index, task in enumerate(cover.tasks()):
        assert task.index == index
        for step in task.steps():
            assert len(step.queries) <= cover.longest_query_range
            assert all(len(keys) <= cover.longest_key_range for keys in step.keys)
            assert (finished[step.queries.slice] == 0).all()
        for rows in cover.finished_by(index):
            assert len(rows) > 0
            finished[rows.slice] += 1
    assert (finished == 1).all()


@pytest.mark.parametrize("c", [*range(1, 40), 57, 73, 100, 133, 200, 307])
def test_cqs_work_is_even(c: int) -> None:
    tile = 3
    cut = Cut(c * tile, c, tile)
    full, causal = CqsCover(cut, cut, Full()), CqsCover(cut, cut, Causal())
    triangle, square = tile * (tile + 1) // 2, tile * tile
    for index in range(c):
        steps = list(full.task(index).steps())
        assert sum(len(step.keys) for step in steps) == c
        chunks = {step.queries for step in steps}.union(*(step.keys for step in steps))
        assert len(chunks) == full.quorum_size == set_size(c)
        pairs = {(step.queries, keys) for step in steps for keys in step.keys}
        alone = [(a, b) for a, b in pairs if (b, a) not in pairs]
        assert len(alone) == (1 if c % 2 == 0 else 0)  # c/2 is its own opposite
        work = sum(causal.mask.pairs(step.queries, keys) for step in causal.task(index).steps() for keys in step.keys)
        assert work - triangle in ({(c - 1) // 2 * square} if c % 2 else {(c // 2 - 1) * square, c // 2 * square})


def test_square_causal_task_of_a_perfect_cover() -> None:
    cut = Cut(31 * 8, 31, 8)
    task = CqsCover(cut, cut, Causal()).task(5)
    pairs = [(step.queries, keys) for step in task.steps() for keys in step.keys]
    assert sum(queries == keys for queries, keys in pairs) == 1
    assert sum(queries.start > keys.start for queries, keys in pairs) == 6 * 5 // 2
    assert len(pairs) == 1 + 6 * 5 // 2


@pytest.mark.parametrize("c", [7, 31, 133])
def test_two_tasks_of_a_perfect_cover_share_one_chunk(c: int) -> None:
    cover = CqsCover(Cut(c, c, 1), Cut(c, c, 1), Full())
    held = [set(task.key_ranges()) for task in cover.tasks()]
    assert all(len(held[a] & held[b]) == 1 for a in range(0, c, 5) for b in range(a))


def test_rectangular_steps_are_the_visible_blocks_in_order() -> None:
    cover = RectangularCover(Cut(20, 4, 1), Cut(20, 10, 1), Causal())
    for index, task in enumerate(cover.tasks()):
        steps = list(task.steps())
        assert {step.queries for step in steps} == {cover.queries[index]}
        assert all(len(step.keys) == 1 for step in steps)
        assert all(a.keys[0].stop == b.keys[0].start for a, b in pairwise(steps))
        assert steps[-1].keys[0].stop >= cover.queries[index].stop > steps[-1].keys[0].start


@pytest.mark.parametrize("mask", [Causal(), Causal(-9), Causal(13), Full()], ids=repr)
def test_a_tile_meets_all_of_its_blocks_at_once_where_they_are_resident(mask) -> None:
    apart, together = (RectangularCover(Cut(20, 4, 1), Cut(23, 10, 1), mask, at_once) for at_once in (False, True))
    check_cover(together)
    for one_by_one, at_once in zip(apart.tasks(), together.tasks(), strict=True):
        keys = tuple(step.keys[0] for step in one_by_one.steps())
        assert list(at_once.steps()) == ([Step(at_once.queries, keys)] if keys else [])
        assert at_once.query_ranges() == one_by_one.query_ranges()
        assert at_once.key_ranges() == one_by_one.key_ranges()


class CountingMask(Full):
    """Full, and counts how often it is asked."""

    calls: list[int] = []  # noqa: RUF012

    def live(self, queries: Range, keys: Range) -> bool:
        self.calls.append(1)
        return True


def test_a_million_tasks_are_computed_from_their_index() -> None:
    c = 1009**2 + 1009 + 1
    cover = CqsCover(Cut(1 << 40, c, 128), Cut(1 << 41, c, 256), CountingMask())
    assert cover.quorum_size == 1010
    assert "owned" not in vars(cover)
    assert "marks" not in vars(cover)
    task = next(islice(cover.tasks(), 3, None))
    CountingMask.calls.clear()
    step = next(task.steps())
    assert len(CountingMask.calls) == len(step.keys) == 1010
    assert cover.owned is cover.task(c - 1).owned
    assert next(cover.finished_by(c - 1)) == cover.queries[0]
    assert next(cover.finished_by(c - 2), None) is None


@pytest.mark.parametrize("kind", [CqsCover, RectangularCover])
def test_covers_and_tasks_travel_to_workers(kind) -> None:
    cover = kind(Cut(100, 13, 4), Cut(90, 13, 4), Causal(3))
    copy = pickle.loads(pickle.dumps(cover))
    assert copy == cover
    assert list(pickle.loads(pickle.dumps(cover.task(4))).steps()) == list(copy.task(4).steps())


@pytest.mark.parametrize("kind", [CqsCover, RectangularCover])
@pytest.mark.parametrize("index", [-1, 5])
def test_there_is_no_such_task(kind, index: int) -> None:
    cover = kind(Cut(10, 5, 1), Cut(10, 5, 1), Full())
    with pytest.raises(IndexError, match="5 tasks"):
        cover.task(index)
    with pytest.raises(IndexError, match="5 tasks"):
        cover.finished_by(index)


@pytest.mark.parametrize("bad", [Cut(10, 0, 1), Cut(10, 5, 0), Cut(-1, 5, 1)])
@pytest.mark.parametrize("kind", [CqsCover, RectangularCover])
def test_cuts_without_chunks_are_refused(kind, bad: Cut) -> None:
    good = Cut(10, bad.parts, 1) if bad.parts else Cut(10, 5, 1)
    with pytest.raises(ArgumentError, match="queries: found"):
        kind(bad, good, Full())
    with pytest.raises(ArgumentError, match="keys: found"):
        kind(good, bad, Full())


def test_cqs_needs_as_many_key_chunks_as_query_chunks() -> None:
    with pytest.raises(ArgumentError, match=r"keys: found 6 chunks; expected as many key chunks as query chunks \(5\)"):
        CqsCover(Cut(10, 5, 1), Cut(10, 6, 1), Full())


@pytest.mark.parametrize("module", ["galois", "difference", "cqs", "rectangular", "check"])
def test_the_examples_of_the_docstrings_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"cqsa_arrays.cover.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
