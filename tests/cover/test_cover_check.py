"""The checker must fail on covers that are wrong, and name the first wrong pair."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cqsa_arrays.cover import CoverError, CqsCover, RectangularCover, Step, check_cover
from cqsa_arrays.cover.residues import check_residues
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.ranges import Cut, Range

check_module = importlib.import_module("cqsa_arrays.cover.check")


@dataclass
class FakeTask:
    """A list of steps that is honest about what it touches."""

    index: int
    listed: list[Step]

    def steps(self) -> Iterator[Step]:
        return iter(self.listed)

    def query_ranges(self) -> tuple[Range, ...]:
        return tuple(dict.fromkeys(step.queries for step in self.listed))

    def key_ranges(self) -> tuple[Range, ...]:
        return tuple(dict.fromkeys(keys for step in self.listed for keys in step.keys))


class FakeCover:
    """A cover of which some tasks are replaced."""

    def __init__(self, cover, replaced: dict[int, FakeTask]) -> None:
        self.cover, self.replaced = cover, replaced

    def __getattr__(self, name: str):
        return getattr(self.cover, name)

    def task(self, index: int):
        return self.replaced.get(index, self.cover.task(index))


def altered(cover, index: int, alter: Callable[[list[Step]], list[Step]]) -> FakeCover:
    """``cover`` with the steps of one task altered."""
    return FakeCover(cover, {index: FakeTask(index, alter(list(cover.task(index).steps())))})


def all_pairs(cover) -> list[tuple[int, Range, Range]]:
    return [(task.index, step.queries, keys) for task in cover.tasks() for step in task.steps() for keys in step.keys]


def without(queries: Range, keys: Range) -> Callable[[list[Step]], list[Step]]:
    def alter(steps: list[Step]) -> list[Step]:
        kept = [Step(s.queries, tuple(k for k in s.keys if s.queries != queries or k != keys)) for s in steps]
        return [step for step in kept if step.keys]

    return alter


def doubled(queries: Range, keys: Range) -> Callable[[list[Step]], list[Step]]:
    return lambda steps: [*steps, Step(queries, (keys,))]


def first_visible(cover, queries: Range, keys: Range) -> tuple[int, int]:
    rows = range(queries.start, queries.stop)
    offset = cover.mask.offset if isinstance(cover.mask, Causal) else 10**9
    return next((row, keys.start) for row in rows if row + offset >= keys.start)


tokens, tiles, masks = st.integers(1, 60), st.integers(1, 6), st.builds(Causal, st.integers(-20, 40)) | st.just(Full())


@st.composite
def covers(draw):
    c = draw(st.integers(1, 20))
    kind = draw(st.sampled_from([CqsCover, RectangularCover]))
    keys = c if kind is CqsCover else draw(st.integers(1, 20))
    cover = kind(Cut(draw(tokens), c, draw(tiles)), Cut(draw(tokens), keys, draw(tiles)), draw(masks))
    assume(all_pairs(cover))
    return cover


@given(covers(), st.sampled_from([without, doubled]), st.data())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_one_wrong_pair_is_found_and_named(cover, change, data) -> None:
    check_cover(cover)
    index, queries, keys = data.draw(st.sampled_from(all_pairs(cover)))
    with pytest.raises(CoverError, match=f"{0 if change is without else 2} times") as error:
        check_cover(altered(cover, index, change(queries, keys)))
    assert error.value.pair == first_visible(cover, queries, keys)


@given(covers(), st.data())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_double_cannot_hide_a_hole(cover, data) -> None:
    """Of one task's pairs of a query range, one is dropped and another held twice: the counts may well agree."""
    index, queries, keys = data.draw(st.sampled_from(all_pairs(cover)))
    others = [k for i, q, k in all_pairs(cover) if (i, q) == (index, queries) and k != keys]
    assume(others)
    other = data.draw(st.sampled_from(others))
    with pytest.raises(CoverError, match="times, expected once"):
        check_cover(altered(cover, index, lambda steps: doubled(queries, other)(without(queries, keys)(steps))))


def test_a_pair_after_its_rows_are_finished_is_refused() -> None:
    cover = RectangularCover(Cut(40, 5, 4), Cut(40, 10, 4), Full())
    moved = Step(cover.queries[1], (cover.keys[3],))
    late = FakeTask(4, [*cover.task(4).steps(), moved])
    shorter = FakeTask(1, without(moved.queries, moved.keys[0])(list(cover.task(1).steps())))
    with pytest.raises(CoverError, match=r"task 4 uses rows .* that are finished before"):
        check_cover(FakeCover(cover, {1: shorter, 4: late}))


def test_a_pair_in_another_task_must_be_owned_up_to() -> None:
    """The count still holds; what the task says it needs does not."""
    cover = CqsCover(Cut(26, 13, 2), Cut(26, 13, 2), Full())
    index, queries, keys = all_pairs(cover)[1]

    class Silent(FakeTask):
        def query_ranges(self) -> tuple[Range, ...]:
            return cover.task(self.index).query_ranges()

        def key_ranges(self) -> tuple[Range, ...]:
            return cover.task(self.index).key_ranges()

    giver = FakeTask(index, without(queries, keys)(list(cover.task(index).steps())))
    taker = Silent(9, doubled(queries, keys)(list(cover.task(9).steps())))
    assert check_cover(FakeCover(cover, {index: giver, 9: FakeTask(9, taker.listed)}))
    with pytest.raises(CoverError, match="task 9 names"):
        check_cover(FakeCover(cover, {index: giver, 9: taker}))


def test_a_step_that_sees_nothing_is_refused() -> None:
    cover = CqsCover(Cut(26, 13, 2), Cut(26, 13, 2), Causal())
    with pytest.raises(CoverError, match="see none of the keys"):
        check_cover(altered(cover, 2, doubled(cover.queries[0], cover.keys[12])))


def test_foreign_query_ranges_are_refused() -> None:
    cover = CqsCover(Cut(26, 13, 2), Cut(26, 13, 2), Full())
    with pytest.raises(CoverError, match="finished before or never"):
        check_cover(altered(cover, 2, doubled(Range(1, 3), cover.keys[0])))


@pytest.mark.parametrize("fate", ["twice", "never", "ragged"])
def test_rows_not_finished_once_are_refused(fate: str) -> None:
    class Careless(RectangularCover):
        def finished_by(self, index: int) -> Iterator[Range]:
            tile = self.queries[index]
            cases = {"twice": [tile, tile], "never": [], "ragged": [Range(tile.start, tile.stop - 1)]}
            return iter(cases[fate] if index == 2 else [tile])

    with pytest.raises(CoverError, match="do not come exactly once"):
        check_cover(Careless(Cut(40, 5, 4), Cut(40, 5, 4), Causal(-100)))


def test_a_task_must_know_its_index() -> None:
    cover = RectangularCover(Cut(40, 5, 4), Cut(40, 5, 4), Full())
    with pytest.raises(CoverError, match="task 1 calls itself 3"):
        check_cover(FakeCover(cover, {1: FakeTask(3, list(cover.task(1).steps()))}))


def test_rows_limit_what_is_counted() -> None:
    cover = CqsCover(Cut(26, 13, 2), Cut(26, 13, 2), Full())
    wrong = altered(cover, 0, without(cover.queries[1], cover.keys[0]))
    assert check_cover(wrong, rows=Range(4, 26)).counted_pairs == 22 * 26
    with pytest.raises(CoverError, match="query 2 and key 0 meet 0 times"):
        check_cover(wrong, rows=Range(3, 4))


@dataclass(frozen=True)
class Comb:
    """Even rows see the first four keys, odd rows the last four: between them is a gap that no row sees."""

    key_tokens: int
    diagonal: int = 1 << 62

    def keys_of(self, row: int, key_tokens: int) -> Range:
        seen = Range(self.key_tokens - 4, self.key_tokens) if row % 2 else Range(0, 4)
        return seen & Range(0, key_tokens)

    def pairs(self, queries: Range, keys: Range) -> int:
        return sum(len(self.keys_of(row, self.key_tokens) & keys) for row in range(queries.start, queries.stop))

    def live(self, queries: Range, keys: Range) -> bool:
        return self.pairs(queries, keys) > 0


@pytest.mark.parametrize("kind", [CqsCover, RectangularCover])
def test_masks_with_gaps_are_checked_too(kind) -> None:
    cover = kind(Cut(30, 7, 2), Cut(40, 7, 2), Comb(40))
    assert check_cover(cover).counted_pairs == 30 * 4
    for index, queries, keys in all_pairs(cover):
        for change in (without, doubled):
            with pytest.raises(CoverError, match="times, expected once"):
                check_cover(altered(cover, index, change(queries, keys)))


def test_a_mask_that_contradicts_itself_is_reported() -> None:
    class Crooked(Full):
        def pairs(self, queries: Range, keys: Range) -> int:
            return len(queries) * len(keys) + 1

    with pytest.raises(CoverError, match="the mask contradicts itself"):
        check_cover(RectangularCover(Cut(8, 2, 2), Cut(8, 4, 2), Crooked()))


# By residues: the same answer, and red for every way to break a CQS cover.


@given(st.integers(1, 40), tokens, tokens, tiles, masks)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_residues_agree_with_counting(c, query_tokens, key_tokens, tile, mask) -> None:
    cover = CqsCover(Cut(query_tokens, c, tile), Cut(key_tokens, c, tile), mask)
    assert check_residues(cover).visible_pairs == check_cover(cover).counted_pairs


@pytest.mark.parametrize("c", [5001, 5113, 20_000])
def test_many_chunks_are_checked_by_residues(c: int) -> None:
    report = check_cover(CqsCover(Cut(1 << 30, c, 128), Cut(1 << 29, c, 128), Causal(-1000)))
    assert report.counted_tasks == 3
    assert report.tasks == c
    assert report.visible_pairs > report.counted_pairs > 0


class BrokenCover(CqsCover):
    """A CQS cover whose base pattern or tasks a test replaces."""

    def __init__(self, cover: CqsCover, *, owned=None, task=None) -> None:
        super().__init__(cover.queries, cover.keys, cover.mask)
        vars(self)["owned"] = cover.owned if owned is None else owned
        vars(self)["maker"] = cover.task if task is None else task

    def task(self, index: int):
        return vars(self)["maker"](index)


@pytest.fixture(params=[21, 26, 57])
def cover(request, monkeypatch) -> CqsCover:
    monkeypatch.setattr(check_module, "COUNTED_CHUNKS", 0)
    return CqsCover(Cut(200, request.param, 2), Cut(180, request.param, 2), Causal(150))


def test_residues_notice_a_changed_pattern(cover: CqsCover) -> None:
    check_cover(BrokenCover(cover))
    for x, y in np.ndindex(cover.owned.shape):
        owned = cover.owned.copy()
        owned[x, y] ^= True
        with pytest.raises(CoverError, match=r"meet in [02] tasks, expected one"):
            check_cover(BrokenCover(cover, owned=owned))


@pytest.mark.parametrize("change", [without, doubled])
def test_residues_notice_a_wrong_pair_in_the_steps(cover: CqsCover, change) -> None:
    for step in cover.task(0).steps():
        for keys in step.keys:
            wrong = altered(cover, 0, change(step.queries, keys))
            with pytest.raises(CoverError, match="times, expected once") as error:
                check_cover(BrokenCover(cover, task=wrong.task))
            assert error.value.pair == first_visible(cover, step.queries, keys)


def test_residues_notice_steps_of_another_task(cover: CqsCover) -> None:
    with pytest.raises(CoverError, match=r"another task owns|not of its quorum|times, expected once"):
        check_cover(BrokenCover(cover, task=lambda index: cover.task((index + 1) % cover.task_count)))


def test_residues_notice_a_pair_moved_inside_a_task() -> None:
    """Of the diagonal a task owns (0, 0) only; another of its chunks has the same residue in the wrong place."""
    cover = CqsCover(Cut(42, 21, 2), Cut(42, 21, 2), Full())
    first, second = list(cover.task(0).steps())[:2]
    start = without(first.queries, cover.keys[0])(list(cover.task(0).steps()))
    moved = FakeTask(0, [*start, Step(second.queries, (Range(second.queries.start, second.queries.stop),))])
    with pytest.raises(CoverError, match="that another task owns"):
        check_residues(BrokenCover(cover, task=lambda index: cover.task(index) if index else moved))


@dataclass(frozen=True)
class LeakyCut(Cut):
    """Leaves out the last token of chunk 3, or of the sequence."""

    leak: int = 3

    def __getitem__(self, index: int) -> Range:
        chunk = super().__getitem__(index)
        return Range(chunk.start, chunk.stop - (index == self.leak))


@pytest.mark.parametrize("leak", [3, 20])
def test_residues_notice_chunks_that_do_not_share_out_the_tokens(leak: int) -> None:
    with pytest.raises(CoverError, match=r"chunk 4 is|the chunks end at"):
        check_residues(CqsCover(Cut(100, 21, 1), LeakyCut(100, 21, 1, leak), Full()))
