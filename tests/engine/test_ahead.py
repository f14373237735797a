"""Reading ahead: how far, how often, and that it is no burden however short the steps are."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from itertools import count

import pytest

from cqsa_arrays.cover import Step
from cqsa_arrays.engine import ahead
from cqsa_arrays.engine.ahead import MOST_STEPS, ReadAhead
from cqsa_arrays.engine.schedule import Position, Work
from cqsa_arrays.planner import Group
from cqsa_arrays.ranges import Range

GROUP = Group(Range(0, 1), Range(0, 1))


class Operands:
    """One input, with blocks of one size and the queries as their tokens; notes what is asked for."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes, self.asked, self.sized = block_bytes, [], 0

    def of(self, step):
        yield self, step.queries

    def size_bytes(self, group, tokens) -> int:
        self.sized += 1
        return self.block_bytes

    def holds(self, group, tokens) -> bool:
        return False

    def prefetch(self, group, tokens):
        self.asked.append(tokens.start)
        return iter(())


class Immediately:
    def __init__(self, *_arguments, **_options) -> None:
        pass

    def submit(self, work, *arguments) -> Future:
        future = Future()
        future.set_result(work(*arguments))
        return future

    def close(self, **_options) -> None:
        """Nothing to stop."""


def works(length: int | None = None):
    numbers = count() if length is None else range(length)
    rows = ((i, Range(i, i + 1)) for i in numbers)
    return (Work(Position(0, 0, i), GROUP, Step(one, (Range(0, 1),)), one, None, False) for i, one in rows)


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "Pool", Immediately)


@pytest.mark.parametrize(("distance", "most"), [(0, 1), (1, 1), (35, 4), (40, 4)])
def test_steps_are_asked_for_once_and_as_far_as_the_distance(distance, most) -> None:
    operands = Operands(10)
    for number, (work, upcoming) in enumerate(reader := ReadAhead(works(12), operands, distance)):
        assert work.step.queries.start == number
        assert (upcoming is None) == (number == 11)
        reader.request()
        assert operands.asked == list(range(1, min(12, number + 1 + most)))


def test_without_a_distance_nothing_is_asked_for() -> None:
    operands = Operands(10)
    for _ in (reader := ReadAhead(works(3), operands, None)):
        reader.request()
    assert operands.asked == []


def test_short_steps_are_asked_for_in_bounded_number() -> None:
    operands = Operands(1)
    for number, _ in enumerate(reader := ReadAhead(works(), operands, 1 << 40)):
        reader.request()
        assert len(operands.asked) == MOST_STEPS + number
        assert operands.sized == len(operands.asked)
        if number == 1000:
            break


@pytest.mark.parametrize(("distance", "expected"), [(30, [0, 1, 2]), (25, [0, 1, 2, 0, 1, 2])])
def test_what_was_asked_for_lately_is_not_asked_for_again(distance, expected) -> None:
    """Steps over three blocks of 10 bytes, twice: a distance shorter than them has forgotten the first meanwhile."""
    rounds = [work for _ in range(2) for work in works(3)]
    reader = ReadAhead(iter(rounds), operands := Operands(10), distance)
    reader.request()
    for _ in reader:
        reader.request()
    assert operands.asked == expected


def test_reading_a_block_is_left_when_the_run_ends(monkeypatch) -> None:
    monkeypatch.undo()  # a thread of its own
    begun, go_on, turns = threading.Event(), threading.Event(), []

    class Slow(Operands):
        def prefetch(self, group, tokens):
            for turn in range(10):
                turns.append(turn)
                begun.set()
                assert go_on.wait(20)
                yield

    reader = ReadAhead(works(1), Slow(10), 0)
    reader.request()
    assert begun.wait(20)
    ending = threading.Thread(target=reader.close)
    ending.start()
    while not reader._closed:
        time.sleep(0.001)
    go_on.set()
    ending.join()
    assert turns == [0]


def test_what_is_here_is_not_asked_for_and_takes_nothing_of_the_distance() -> None:
    class Held(Operands):
        def holds(self, group, tokens) -> bool:
            return tokens.start < 5

    operands = Held(10)
    ReadAhead(works(12), operands, 30).request()
    assert operands.asked == [5, 6, 7]
