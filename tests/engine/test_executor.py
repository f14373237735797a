"""The executor with sources that count: what is read, in which order and how often, and what an error leaves behind."""

import os
import threading
from collections import Counter as Tally
from concurrent.futures import Future
from itertools import islice, pairwise

import numpy as np
import pytest
from engine_cases import TILE, Case, Counter, case, open_files_below
from hypothesis import given, settings
from hypothesis import strategies as st
from our_threads import ours_alive

from cqsa_arrays.cover import CqsCover, RectangularCover
from cqsa_arrays.cover.base import Step
from cqsa_arrays.engine import ahead
from cqsa_arrays.engine.schedule import Position, Schedule, Work
from cqsa_arrays.errors import StorageError
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.planner import Group
from cqsa_arrays.ranges import Cut, Range

MANY = settings(max_examples=300, deadline=None, derandomize=True, database=None)
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "shifted right": Causal(150),
    "shifted left": Causal(-250),
    "nothing seen": Causal(-5000),
}
PLANS = {
    "cqs 1": lambda one, scratch: one.cqs(1),
    "cqs 3": lambda one, scratch: one.cqs(3),
    "cqs 7, a head at a time": lambda one, scratch: one.cqs(7, group=(1, 1)),
    "cqs 7, on disk": lambda one, scratch: one.cqs(7, on_disk=True, scratch=scratch),
    "cqs 13, more chunks than tiles, on disk": lambda one, scratch: one.cqs(13, (1, 2), True, scratch),
    "cqs 5, relaxed": lambda one, scratch: one.cqs(5, group=(1, 2)),
    "rectangular 1 x 1": lambda one, scratch: one.rectangular(1, 4800),
    "rectangular 1 x 8": lambda one, scratch: one.rectangular(1, TILE),
    "rectangular 4 x 3": lambda one, scratch: one.rectangular(4, 3 * TILE, group=(1, 2)),
    "rectangular 8 x 8": lambda one, scratch: one.rectangular(8, TILE, group=(1, 1)),
}
by_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
by_plan = pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)


class Immediately:
    """A pool whose one thread is the caller: reading ahead happens at once, so that its order is known."""

    def __init__(self, *_arguments, **_options) -> None:
        pass

    def submit(self, work, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(work(*arguments))
        except OSError as error:
            future.set_exception(error)
        return future

    def close(self, **_options) -> None:
        """No thread, nothing to stop."""


# The results themselves.


@by_mask
@by_plan
def test_every_row_is_exact_and_written_once(make, mask, tmp_path) -> None:
    one = case(queries=700, keys=750, batch=2, heads=2, mask=mask)
    sink, report = one.run(make(one, tmp_path))
    one.check(sink)
    assert report.flops == one.problem.flops
    assert report.elapsed_s > 0
    assert not ours_alive()
    assert not open_files_below(tmp_path)


@by_plan
def test_rows_without_a_key_are_zero_and_minus_infinity(make, tmp_path) -> None:
    one = case(queries=700, keys=700, mask=Causal(-301))
    sink, _ = one.run(make(one, tmp_path))
    assert (sink.out[:, :, :301] == 0).all()
    assert not np.signbit(sink.out[:, :, :301]).any()
    assert (sink.lse[:, :, :301] == -np.inf).all()
    assert np.isfinite(sink.lse[:, :, 301:]).all()


@pytest.mark.parametrize("options", [{"in_place": True}, {"token_major": True}, {"holds_states": True}], ids=str)
@by_plan
def test_the_ways_of_inputs_and_states_agree(make, options, tmp_path) -> None:
    one = case(queries=500, keys=610, heads=3, mask=Causal(100), **options)
    sink, _ = one.run(make(one, tmp_path))
    one.check(sink)


def test_arrays_in_place_are_never_copied() -> None:
    one = case(in_place=True)
    _, report = one.run(one.cqs(7))
    assert not one.entries("read")
    assert not one.entries("prefetch")
    assert len(one.entries("view")) > 0
    assert report.input_read_bytes == 0


def test_token_major_inputs_are_read_into_token_major_memory() -> None:
    one = case(queries=300, heads=3, token_major=True)
    one.run(one.cqs(3))
    for source in one.sources.values():
        assert source.strides
        assert all(strides[1] < strides[2] for strides in source.strides)
    one = case(queries=300, heads=3)
    one.run(one.cqs(3))
    assert all(strides[1] > strides[2] for strides in one.sources["k"].strides)


# What is read.


def least_bytes(one: Case) -> int:
    return sum(array.nbytes for array in (one.q, one.k, one.v))


@pytest.mark.parametrize(
    "make",
    [
        lambda one: one.cqs(1),
        lambda one: one.cqs(1, group=(1, 1)),
        lambda one: one.rectangular(1, TILE),
        lambda one: one.rectangular(1, 5000, group=(1, 1)),
    ],
    ids=["cqs", "cqs by heads", "rectangular, many key blocks", "rectangular, one block, by heads"],
)
def test_one_query_chunk_reads_everything_once_as_planned(make) -> None:
    one = case(queries=700, keys=500, batch=2, heads=2)
    plan = make(one)
    _, report = one.run(plan)
    assert plan.chosen.traffic.input_read_bytes == report.input_read_bytes == least_bytes(one)
    assert max(Tally(one.entries("read")).values()) == 1


@by_mask
@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 7, 13, 21])
def test_cqs_reads_no_more_than_planned(chunks, mask) -> None:
    one = case(queries=13 * TILE, keys=13 * TILE - 50, heads=1, mask=mask)
    plan = one.cqs(chunks)
    _, report = one.run(plan)
    assert report.input_read_bytes <= plan.chosen.traffic.input_read_bytes


@pytest.mark.parametrize("chunks", [3, 7, 13])
def test_full_cqs_reads_as_planned_but_for_the_chunk_that_two_tasks_share(chunks) -> None:
    one = case(queries=13 * TILE, heads=1)
    plan = one.cqs(chunks)
    _, report = one.run(plan)
    # Any two tasks share one chunk of keys: at most one key chunk a task is resident already.
    key_bytes = one.k.nbytes + one.v.nbytes
    planned = plan.chosen.traffic.input_read_bytes
    assert planned - key_bytes - one.q.nbytes <= report.input_read_bytes <= planned


@pytest.mark.parametrize("parts", [2, 3, 7], ids=lambda n: f"{n} tiles")
def test_full_rectangle_reads_as_planned(parts) -> None:
    one = case(queries=7 * TILE, heads=1)
    plan = one.rectangular(parts, TILE)
    _, report = one.run(plan)
    assert report.input_read_bytes == plan.chosen.traffic.input_read_bytes


@pytest.mark.parametrize("parts", [4, 7], ids=lambda n: f"{n} tiles")
def test_causal_rectangle_reads_no_more_than_planned(parts) -> None:
    one = case(queries=7 * TILE, heads=1, mask=Causal())
    plan = one.rectangular(parts, TILE)
    _, report = one.run(plan)
    assert report.input_read_bytes <= plan.chosen.traffic.input_read_bytes


def test_a_rectangle_of_one_key_block_is_priced_as_it_reads() -> None:
    one = case(queries=7 * TILE, heads=1)
    plan = one.rectangular(7, 7 * TILE)
    _, report = one.run(plan)
    assert report.input_read_bytes == plan.chosen.traffic.input_read_bytes


def replay(plan) -> list[tuple[set, list]]:
    """For each step what is resident before it, and what it must read, as (name, batch, heads, tokens).

    Each input has its slots; the block used longest ago gives way; another group of heads starts with nothing.
    """
    steps = []
    for group in plan.groups:
        resident = {name: [] for name in "qkv"}
        for task in plan.build_cover().tasks():
            for step in task.steps():
                before = {block for blocks in resident.values() for block in blocks}
                reads = []
                for name, ranges in (("q", (step.queries,)), ("k", step.keys), ("v", step.keys)):
                    slots = 1 if name == "q" else plan.chosen.residency.key_slots
                    for tokens in ranges:
                        block = (name, group.batch, group.heads, tokens)
                        if block in resident[name]:
                            resident[name].remove(block)
                        else:
                            reads.append(block)
                        resident[name] = [*resident[name], block][-slots:]
                steps.append((before, reads))
    return steps


@by_mask
@by_plan
def test_blocks_that_are_resident_are_not_read_again(make, mask, tmp_path) -> None:
    one = case(queries=700, keys=750, batch=2, heads=2, mask=mask)
    plan = make(one, tmp_path)
    one.run(plan)
    expected = [block for _, reads in replay(plan) for block in reads]
    for name in "qkv":
        assert one.entries("read", name) == [block for block in expected if block[0] == name]


@by_plan
def test_no_task_reads_a_key_block_twice(make, tmp_path) -> None:
    one = case(queries=700, keys=750)
    plan = make(one, tmp_path)
    one.run(plan)
    tasks = sum(1 for _ in plan.build_cover().tasks()) * len(plan.groups)
    times = Tally(one.entries("read", "k"))
    assert max(times.values()) <= tasks
    if plan.cover_name == "cqs":
        assert max(times.values()) <= plan.chosen.residency.key_slots


def test_another_group_starts_with_nothing_resident() -> None:
    one = case(queries=90, keys=90, heads=2)
    one.run(one.cqs(1, group=(1, 1)))
    assert one.entries("read", "k") == [("k", Range(0, 1), Range(h, h + 1), Range(0, 90)) for h in (0, 1)]


# Reading ahead.


class Noting(Counter):
    """A Progress that notes in ``log`` when a step computes."""

    def __init__(self, log) -> None:
        super().__init__()
        self.log = log

    def advance(self, pairs: int) -> None:
        super().advance(pairs)
        self.log.append(("computed",))


def unasked(one: Case, plan) -> list[tuple[int, tuple]]:
    """(step, block) of each read, but for the first step's, that was not asked for before the last step computed."""
    one.run(plan, Noting(one.log))
    log, found, asked, asked_in_time = iter(one.log), [], set(), set()
    for number, (_, reads) in enumerate(replay(plan)):
        for _ in reads:
            for verb, *what in log:
                block = tuple(what)
                if verb == "read":
                    break
                if verb == "computed":
                    asked_in_time |= asked
                    asked = set()
                else:
                    asked.add(block)
            assert block in reads
            if block not in asked_in_time and number > 0:
                found.append((number, block))
            asked_in_time.discard(block)
    return found


@by_plan
def test_blocks_of_the_next_step_are_read_ahead_before_they_are_read(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ahead, "Pool", Immediately)
    one = case(queries=700, keys=750, batch=2, heads=2, mask=Causal(200))
    plan = make(one, tmp_path)
    steps = replay(plan)
    # Whatever was not resident one step earlier; see the next test for what was.
    assert [(number, block) for number, block in unasked(one, plan) if block not in steps[number - 1][0]] == []


@pytest.mark.parametrize("name", ["cqs 7, a head at a time", "rectangular 4 x 3"])
def test_so_are_blocks_that_the_step_before_drives_out(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ahead, "Pool", Immediately)
    one = case(queries=700, keys=570, batch=2, heads=2)
    assert unasked(one, PLANS[name](one, tmp_path)) == []


def test_what_is_resident_is_not_read_ahead(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "Pool", Immediately)
    one = case(queries=7 * TILE, keys=90, heads=1)
    one.run(one.rectangular(7, TILE))
    # Asked for while the first step's own blocks were not read yet; never again afterwards.
    assert len(one.entries("prefetch", "k")) <= 1
    assert len(one.entries("prefetch", "q")) == 6


def test_reading_ahead_is_never_waited_for() -> None:
    one = case(queries=7 * TILE, heads=1)
    plan, finished = one.cqs(7), threading.Event()
    steps = sum(work.step is not None for work in Schedule(plan.groups, plan.build_cover()).works())
    waited = []

    class Watch(Counter):
        def advance(self, pairs: int) -> None:
            super().advance(pairs)
            if self.pairs == plan.problem.pairs:
                finished.set()

    def slow(batch, heads, tokens):
        waited.append(finished.wait(timeout=30))
        return iter(())

    one.sources["q"].prefetch = slow
    sink, _ = one.run(plan, Watch())
    one.check(sink)
    assert waited[0]
    assert len(waited) < steps


def test_an_error_of_reading_ahead_ends_the_run(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "Pool", Immediately)
    one = case(queries=7 * TILE, heads=1)

    def broken(batch, heads, tokens) -> None:
        raise OSError("no such block")

    one.sources["v"].prefetch = broken
    with pytest.raises(OSError, match="no such block"):
        one.run(one.cqs(7))
    assert not ours_alive()


# Errors leave nothing behind.


@pytest.mark.parametrize("error", [OSError("gone"), StorageError("short"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("fail", [("q", 1), ("k", 1), ("v", 2), ("q", 9), ("v", 5)], ids=lambda f: f"{f[0]}{f[1]}")
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_a_read_error_reaches_the_caller_and_leaves_nothing(fail, on_disk, error, tmp_path) -> None:
    one = case(queries=7 * TILE, heads=1, fail=fail, error=error)
    with pytest.raises(type(error)) as raised:
        one.run(one.cqs(7, on_disk=on_disk, scratch=tmp_path))
    assert raised.value is error
    assert not ours_alive()
    assert os.listdir(tmp_path) == []
    assert open_files_below(tmp_path) == []


def test_an_error_of_the_sink_reaches_the_caller_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    from engine_cases import CountingSink

    def full(*_arguments) -> None:
        raise StorageError("no room")

    monkeypatch.setattr(CountingSink, "write_lse", full)
    one = case(queries=7 * TILE, heads=1)
    with pytest.raises(StorageError, match="no room"):
        one.run(one.cqs(7, on_disk=True, scratch=tmp_path))
    assert not ours_alive()
    assert open_files_below(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_broken_scratch_disk_reaches_the_caller_and_leaves_nothing(call, tmp_path, monkeypatch) -> None:
    def broken(*_arguments) -> int:
        raise OSError(5, "Input/output error")

    one = case(queries=7 * TILE, heads=1)
    plan = one.cqs(7, on_disk=True, scratch=tmp_path)
    monkeypatch.setattr(os, call, broken)
    with pytest.raises(OSError, match="Input/output error"):
        one.run(plan)
    monkeypatch.undo()
    assert not ours_alive()
    assert open_files_below(tmp_path) == []


def test_an_error_of_the_progress_reaches_the_caller() -> None:
    class Broken(Counter):
        def advance(self, pairs: int) -> None:
            raise ValueError("the bar broke")

    one = case(queries=200)
    with pytest.raises(ValueError, match="the bar broke"):
        one.run(one.cqs(1), Broken())
    assert not ours_alive()


# The order of the work.

GROUPS = (Group(Range(0, 1), Range(0, 2)), Group(Range(1, 2), Range(0, 2)))
lengths, tiles, parts = st.integers(0, 40), st.integers(1, 7), st.integers(1, 30)
masks = st.one_of(st.just(Full()), st.builds(Causal, st.integers(-45, 45)))


@st.composite
def covers(draw):
    mask, c = draw(masks), draw(parts)
    queries = Cut(draw(lengths), c, draw(tiles))
    if draw(st.booleans()):
        return CqsCover(queries, Cut(draw(lengths), c, draw(tiles)), mask)
    return RectangularCover(queries, Cut(draw(lengths), draw(parts), draw(tiles)), mask)


@given(covers())
@MANY
def test_each_step_comes_once_in_order_and_each_task_ends_once(cover) -> None:
    works = list(Schedule(GROUPS, cover).works())
    half = len(works) // 2
    assert [w.group for w in works] == [GROUPS[0]] * half + [GROUPS[1]] * half
    for one in (works[:half], works[half:]):
        ends = [work.ends_task for work in one if work.ends_task is not None]
        assert ends == list(range(cover.task_count))
        steps = [work.step for work in one if work.step is not None]
        assert steps == [step for task in cover.tasks() for step in task.steps()]
        ended = -1
        for work in one:
            if work.step is not None:
                assert work.step in list(cover.task(ended + 1).steps())
            else:
                assert list(cover.task(ended + 1).steps()) == []
            ended = ended if work.ends_task is None else work.ends_task


class Endless:
    """A cover of ever more tasks of three steps each, that counts what was made."""

    def __init__(self) -> None:
        self.tasks_made, self.steps_made = 0, 0

    task_count = 1 << 40

    def task(self, index: int):
        self.tasks_made += 1
        return EndlessTask(self, index)


class EndlessTask:
    def __init__(self, cover, index) -> None:
        self.cover, self.index = cover, index

    def steps(self):
        for i in range(3):
            self.cover.steps_made += 1
            yield Step(Range(i, i + 1), (Range(0, 1),))


def test_work_is_made_one_step_ahead_and_no_more() -> None:
    cover = Endless()
    for count, work in enumerate(islice(Schedule(GROUPS, cover).works(), 10), 1):
        task, i = divmod(count - 1, 3)
        rows = Range(i, i + 1)
        step = Step(rows, (Range(0, 1),))
        assert work == Work(Position(0, task, i), GROUPS[0], step, rows, work.ends_task, False)
        assert work.ends_task == (None if count % 3 else count // 3 - 1)
        assert count <= cover.steps_made <= count + 1
        assert cover.tasks_made <= count // 3 + 1


def test_a_million_tasks_begin_at_once() -> None:
    c = 1009**2 + 1009 + 1
    cover = CqsCover(Cut(1 << 30, c, 1), Cut(1 << 30, c, 1), Causal())
    works = list(islice(Schedule(GROUPS, cover).works(), 3))
    assert len(works) == 3
    assert all(work.step is not None and work.ends_task is None for work in works)
    for before, after in pairwise(works):
        assert before.step != after.step
    tiles_of = RectangularCover(Cut(1 << 30, 1 << 22, 96), Cut(1 << 30, 1 << 15, 96), Full())
    assert [w.step.queries.start for w in islice(Schedule(GROUPS, tiles_of).works(), 3)] == [0, 0, 0]
