"""Reading ahead: how far, how often, and that it is no burden however short the steps are."""

from __future__ import annotations

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
    """Steps of one size; notes what is asked for."""

    def __init__(self, step_bytes: int) -> None:
        self.step_bytes, self.asked, self.sized = step_bytes, [], 0

    def size_bytes(self, group, step) -> int:
        self.sized += 1
        return self.step_bytes

    def prefetch(self, group, step) -> None:
        self.asked.append(step.queries.start)


class Immediately:
    def __init__(self, *_arguments, **_options) -> None:
        pass

    def submit(self, work, *arguments) -> Future:
        future = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, **_options) -> None:
        """Nothing to stop."""


def works(length: int | None = None):
    numbers = count() if length is None else range(length)
    rows = ((i, Range(i, i + 1)) for i in numbers)
    return (Work(Position(0, 0, i), GROUP, Step(one, (Range(0, 1),)), one, None, False) for i, one in rows)


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "ThreadPoolExecutor", Immediately)


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
