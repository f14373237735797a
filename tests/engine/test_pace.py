"""How a step is cut into parts: by what the run measures, so that each takes little time; the cut changes no bit."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_cases import TILE, Counter, case
from simulated_cuda import simulated_gpu

import cqsa_arrays as cqsa
from cqsa_arrays.engine.pace import Pace, parts
from cqsa_arrays.engine.schedule import Schedule
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.planner import DEVICE_PART_S, HOST_PART_S, Plan, Problem
from cqsa_arrays.planner.durability import durability
from cqsa_arrays.planner.memory import DEVICE_TILE_TOKENS, TILE_TOKENS

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))
from planner_cases import MACHINE, plan_for, problem


class Machine:
    """A computer of a simulated speed: ``rate(seconds)`` pairs a second; a GPU has more parts under way at a time."""

    def __init__(self, plan: Plan, rate, gpu: bool = False) -> None:
        self.plan, self.rate, self.gpu, self.now = plan, rate, gpu, 0.0
        self.pace = Pace(plan, lambda: self.now)

    def run(self, most_s: float) -> list[tuple[float, int, float]]:
        """Every part until then: when it began, its rows, and the seconds until it was done."""
        order = Schedule(self.plan.groups, self.plan.build_cover())
        found, under_way = [], []
        ahead = 4 if self.gpu else 0
        free = 0.0  # when everything under way is done
        for work, _ in parts(((work, None) for work in order.works()), self.pace.rows):
            if self.now > most_s:
                break
            pairs = work.pairs(self.plan.problem.mask)
            self.pace.begun(pairs)
            free = max(free, self.now) + pairs / self.rate(self.now)
            under_way.append((pairs, free))
            found.append((self.now, len(work.rows), free - self.now))
            while len(under_way) > ahead or (under_way and self.pace.is_ahead):
                done, at = under_way.pop(0)
                self.now = max(self.now, at)
                self.pace.done(done)
        return found


def job_for(one: Problem, size_bytes: int) -> Plan:
    """The plan of a job, which can be stopped."""
    plan = plan_for(one, size_bytes)
    return replace(plan, durability=durability(one, plan.chosen, MACHINE.rates, 1, None))


SIZES = [(64, "float32"), (64, "float64"), (256, "float16"), (8, "float32"), (1024, "bfloat16"), (1, "float64")]


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("mask", [Full(), Causal()], ids=["full", "causal"])
@pytest.mark.parametrize(("dim", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize("share", [1.5, 0.5, 0.1])
def test_parts_take_their_time_on_machines_of_any_speed(dim, dtype, share, mask, heads) -> None:
    """``share`` of the planned rate: slow machines, and those that others use, too."""
    plan = job_for(problem(heads=heads, queries=600_000, dim=dim, dtype=dtype, mask=mask), 1 << 30)
    rates, per_pair = MACHINE.rates, 4 * dim
    rate = share * rates.flops(plan.problem.compute_dtype, MACHINE.threads) / per_pair
    machine = Machine(plan, lambda _: rate)
    found = machine.run(60.0)
    assert len(found) > 8
    chosen = plan.chosen
    shortest_s = chosen.part_unit * chosen.heads * chosen.batches * plan.problem.key_tokens / rate
    longest_s = max(seconds for _, _, seconds in found)
    assert longest_s <= 1.1 * max(HOST_PART_S * max(1, 1 / (8 * share)), shortest_s)
    assert longest_s <= 1.2, "with what a commit takes, about a second"


def test_a_call_that_cannot_be_stopped_begins_with_a_whole_part() -> None:
    plan = plan_for(problem(queries=400_000), 1 << 30)
    rate = MACHINE.rates.flops("float32", MACHINE.threads) / 256
    (_, first, _), *_ = Machine(plan, lambda _: rate).run(1.0)
    (_, short, _), *_ = Machine(job_for(plan.problem, 1 << 30), lambda _: rate).run(1.0)
    assert first > 6 * short


def test_a_machine_that_becomes_busy_is_noticed_by_the_next_part() -> None:
    plan = plan_for(problem(queries=400_000), 1 << 30)
    usual = MACHINE.rates.flops("float32", MACHINE.threads) / 256
    machine = Machine(plan, lambda now: usual if now < 5 or now > 20 else usual / 10)
    found = machine.run(30.0)
    busy = [(rows, seconds) for at, rows, seconds in found if 10 < at < 20]
    quiet = [(rows, seconds) for at, rows, seconds in found if at < 5 or at > 25]
    assert max(seconds for _, seconds in busy) <= 1.1 * HOST_PART_S
    assert max(rows for rows, _ in busy) < max(rows for rows, _ in quiet)
    assert quiet[-1][1] >= 0.5 * HOST_PART_S, "and that it is not busy any more"


def device_plan(queries: int, dtype: str, heads: int = 1) -> Plan:
    machine = replace(MACHINE, gpu=True, tile=None)
    return replace(
        plan_for(problem(heads=heads, queries=queries, dtype=dtype), 4 << 30, machine=machine), device="cuda:0"
    )


@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.1])
def test_parts_under_way_on_a_gpu_take_a_second_together(dtype, share, heads) -> None:
    plan = device_plan(1 << 22, dtype, heads)
    rate = share / MACHINE.rates.device_s(dtype, 256)
    found = Machine(plan, lambda _: rate, gpu=True).run(100.0)
    later = [seconds for at, _, seconds in found if at > 10]
    assert len(found) > 20
    chosen = plan.chosen
    wave_s = chosen.part_unit * chosen.heads * plan.problem.key_tokens / rate  # which keeps every multiprocessor busy
    assert max(later, default=0) <= max(2 * DEVICE_PART_S * 1.1, 2 * wave_s)
    assert max(seconds for _, _, seconds in found) <= 1.1 / share + 2 * wave_s


@pytest.mark.parametrize("heads", [1, 3, 16, 1000])
def test_parts_on_a_gpu_are_whole_blocks_of_rows_of_every_kernel(heads) -> None:
    unit = device_plan(1 << 20, "float16", heads).chosen.part_unit
    assert unit % 128 == unit % 192 == 0
    assert DEVICE_TILE_TOKENS % 32 == TILE_TOKENS % 48 == 0  # where chunks begin


def test_time_in_which_nothing_is_under_way_does_not_count() -> None:
    plan = plan_for(problem(queries=400_000), 1 << 30)
    now = [0.0]
    pace = Pace(plan, lambda: now[0])
    work = next(Schedule(plan.groups, plan.build_cover()).works())
    rate = plan.problem.pairs / 200
    for _ in range(3):
        pairs = work.pairs(plan.problem.mask, pace.rows(work))
        pace.begun(pairs)
        now[0] += pairs / rate
        pace.done(pairs)
        now[0] += 100.0  # a slow disk
    assert work.pairs(plan.problem.mask, pace.rows(work)) == pytest.approx(rate * HOST_PART_S, rel=0.2)


class Random(Pace):
    """Cuts anywhere, in multiples of ``unit``."""

    unit, seed = 1, 0

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._draw = random.Random(self.seed)

    def rows(self, work) -> int:
        super().rows(work)
        return min(len(work.rows), self.unit * self._draw.randint(1, 400 // self.unit))


PLANS = {
    "cqs 1": lambda one: one.cqs(1),
    "cqs 7": lambda one: one.cqs(7),
    "cqs 3, a head at a time": lambda one: one.cqs(3, group=(1, 1)),
    "rectangular": lambda one: one.rectangular(3, 3 * TILE),
}


@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("mask", [Full(), Causal(), Causal(-300)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_cut_changes_a_bit(make, mask, dtype, monkeypatch) -> None:
    """By any number of threads, too: parts and threads are those of the moment, the plan is the same."""
    one = case(queries=900, keys=1100, dtype=dtype, dim=16, value_dim=9, mask=mask)
    expected, _ = one.run(make(one))
    monkeypatch.setattr("cqsa_arrays.engine.executor.Pace", Random)
    for seed in range(3):
        monkeypatch.setattr(Random, "seed", seed)
        counted = Counter()
        found, _ = one.run(make(one), counted)
        assert found.out.tobytes() == expected.out.tobytes()
        assert found.lse.tobytes() == expected.lse.tobytes()
        assert counted.pairs == one.problem.pairs


@pytest.mark.parametrize("cover", ["cqs", "rectangular"])
def test_any_cut_on_a_simulated_gpu(cover, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 1700, 8)).astype("float16")
    call = {"causal": True, "device": "cuda", "options": cqsa.Options(cover=cover)}
    with simulated_gpu(0):
        expected = cqsa.attention(q, k, v, **call)
    monkeypatch.setattr("cqsa_arrays.engine.executor.Pace", Random)
    monkeypatch.setattr(Random, "unit", 32)
    for seed in range(3):
        monkeypatch.setattr(Random, "seed", seed)
        with simulated_gpu(seed):
            assert np.array_equal(cqsa.attention(q, k, v, **call), expected)
