"""A plan gives the same bytes for any number of threads, processes and interruptions; lanes are part of the plan."""

from __future__ import annotations

import os
import random

import h5py
import numpy as np
import pytest
from durable_cases import CASES, Case, _spec, command, digest, kill_after, log, make, run, start, unbroken, wait

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.cover import CqsCover, RectangularCover
from cqsa_arrays.engine.pace import parts
from cqsa_arrays.engine.schedule import BEGIN, Position, Schedule
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.planner.groups import Group, Groups
from cqsa_arrays.ranges import Cut, Range
from cqsa_arrays.resumable import resumed

GROUPS = tuple(Group(Range(0, 1), Range(h, h + 1), h) for h in range(3))
COVERS = {
    "cqs": CqsCover(Cut(100, 7, 4), Cut(90, 7, 4), Causal()),
    "tiles": RectangularCover(Cut(100, 5, 4), Cut(90, 3, 4), Causal(-30)),
    "one": CqsCover(Cut(100, 1, 4), Cut(90, 1, 4), Full()),
}
LANES = [CASES[4], CASES[5], Case("lanes of heads", _spec(700, 5, 8), ("--chunks", "1", "--lanes", "2"))]


@pytest.mark.parametrize("cover", COVERS.values(), ids=COVERS)
@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("part", [None, 1, 7, 16])
def test_lanes_share_the_work_and_any_place_of_it_is_a_beginning(cover, lanes, part) -> None:
    """Each piece of every step comes once, in the plan's order within a lane, from wherever a run begins."""
    found = []
    for lane in range(lanes):
        order = Schedule(GROUPS, cover, lanes, lane)

        def cut(start=BEGIN, order=order) -> list:
            whole = ((work, None) for work in order.works(start))
            return [work for work, _ in parts(whole, lambda work: part or len(work.rows))]

        works = cut()
        assert [work.position for work in works] == sorted(work.position for work in works)
        assert all(work.position < order.end for work in works)
        for i in {0, len(works) // 3, len(works) - 1} if works else ():
            assert cut(works[i].position) == works[i:]
        assert cut(order.end) == []
        found += works
    whole = list(Schedule(GROUPS, cover).works())

    def pieces(works) -> list:
        rows = [(w.group.index, w.step, row) for w in works if w.step for row in range(w.rows.start, w.rows.stop)]
        return sorted(rows, key=str)

    assert pieces(found) == pieces(whole)
    assert sorted(w.ends_task for w in found if w.ends_task is not None) == sorted(
        w.ends_task for w in whole if w.ends_task is not None
    )


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("cover", COVERS.values(), ids=COVERS)
def test_lanes_have_equal_numbers_of_tasks(cover, lanes) -> None:
    """Groups of a single task are shared as well."""
    ends = [sum(w.ends_task is not None for w in Schedule(GROUPS, cover, lanes, i).works()) for i in range(lanes)]
    assert max(ends) - min(ends) <= (1 if cover.task_count == 1 else len(GROUPS))


@pytest.mark.parametrize("lanes", [1, 3, 8, 64, 200])
@pytest.mark.parametrize("edges", [None, (COVERS["tiles"], COVERS["cqs"])], ids=["one cover", "edges of their own"])
def test_many_groups_are_shared_as_few_are(lanes, edges) -> None:
    groups = Groups(3, 1, 40, 1)
    whole = {(w.position, w.ends_task) for w in Schedule(groups, COVERS["one"], edges=edges).works()}
    found = [list(Schedule(groups, COVERS["one"], lanes, lane, edges).works()) for lane in range(lanes)]
    assert sorted((w.position, w.ends_task) for works in found for w in works) == sorted(whole)
    for works in found:
        assert [w.position for w in works] == sorted(w.position for w in works)
        ends = [w.group.index for w in works if w.ends_group]
        assert ends == sorted({w.group.index for w in works})


def test_what_a_lane_has_to_do_is_found_without_a_look_at_every_group(monkeypatch) -> None:
    """Else ten thousand lanes of as many groups would take hours."""
    looked, usual = [], Schedule.tasks
    monkeypatch.setattr(Schedule, "tasks", lambda order, group: looked.append(group) or usual(order, group))
    works = list(Schedule(Groups(1, 1, 10**9, 1), COVERS["one"], 10**8, 7).works())
    assert [work.group.index for work in works] == looked == [7 + 10**8 * i for i in range(10)]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 5, 2), (4, 4, 7, 3), (2, 1, 6, 6)])
def test_groups_of_heads_cover_all_of_them_in_order(sizes) -> None:
    groups = Groups(*sizes)
    heads = [
        (b, h) for g in groups for b in range(g.batch.start, g.batch.stop) for h in range(g.heads.start, g.heads.stop)
    ]
    assert sorted(heads) == [(b, h) for b in range(sizes[0]) for h in range(sizes[2])]
    assert [group.index for group in groups] == list(range(len(groups)))
    assert groups[1:3] == tuple(groups)[1:3]
    with pytest.raises(IndexError):
        groups[len(groups)]


def test_a_run_begins_at_the_beginning() -> None:
    assert Position() == BEGIN
    assert Schedule(GROUPS, COVERS["cqs"]).end == Position(3)


@pytest.mark.parametrize("rows", [1, 96, 500])
@pytest.mark.parametrize("cover", ["cqs", "rectangular"])
def test_parts_of_steps_change_no_bit(rows, cover, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 1500, 16)).astype("f4")
    call = {"causal": True, "device": "cpu", "options": Options(cover=cover), "memory": "2MiB"}
    expected = cqsa.attention(q, k, v, **call)
    monkeypatch.setattr("cqsa_arrays.planner.plan.Plan.part_rows", rows)
    assert cqsa.attention(q, k, v, **call).tobytes() == expected.tobytes()


@pytest.mark.parametrize("case", [LANES[0], LANES[2], CASES[0], CASES[3]], ids=lambda case: case.name)
def test_any_number_of_threads(here, case) -> None:
    """The plan in the file says how many there were; data are the same."""
    make(case)
    found = set()
    for threads in ("1", "2", "5"):
        assert run(command(case, "--threads", threads)) == 0, log()
        with h5py.File("out.h5") as file:
            found.add((file["out"][...].tobytes(), file["lse"][...].tobytes()))
        os.remove("out.h5")
    assert len(found) == 1


@pytest.mark.parametrize("case", LANES, ids=lambda case: case.name)
def test_two_processes_of_one_job(here, case) -> None:
    """Each takes lanes that are free; whoever completes the last one finishes the file."""
    make(case)
    expected = unbroken(case)
    for _ in range(3):
        codes = [wait(process) for process in [start(command(case)) for _ in range(2)]]
        # Done, or the other one computes what is left; or it was done before this one began.
        assert set(codes) <= {0, 2}, log()
        assert os.path.exists("out.h5") or run(command(case)) == 0, log()
        assert digest() == expected
        os.remove("out.h5")
        assert sorted(set(os.listdir()) - {"run.log"}) == ["qkv.h5"]


@pytest.mark.parametrize("case", LANES[:2], ids=lambda case: case.name)
def test_processes_that_are_killed_while_others_go_on(here, case) -> None:
    make(case)
    expected, rng = unbroken(case), random.Random(case.name)
    for _ in range(4):
        one, other = start(command(case)), start(command(case))
        kill_after(one, rng.uniform(0.02, 0.2))
        kill_after(other, rng.uniform(0, 0.2))
        if os.path.exists("out.h5"):
            break
    assert os.path.exists("out.h5") or run(command(case)) == 0, log()
    assert digest() == expected


def test_lanes_need_a_job() -> None:
    x = np.ones((1, 50, 8), "f4")
    with pytest.raises(cqsa.ArgumentError, match="lanes: found 2; expected 1, or a durable job"):
        cqsa.attention(x, x, x, options=Options(lanes=2), device="cpu")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"durable": True}, "durable: found no out=; expected the path of a new file"),
        ({"lanes": 0}, "lanes: found 0; expected a whole number, at least 1"),
        ({"checkpoint_s": -1.0}, "checkpoint_s: found -1.0"),
        ({"max_time_s": 3.0}, "max_time_s: found 3.0; expected None, or a durable job"),
    ],
)
def test_options_of_jobs_that_cannot_be(options, says) -> None:
    x = np.ones((1, 50, 8), "f4")
    with pytest.raises(cqsa.ArgumentError) as caught:
        cqsa.attention(x, x, x, options=Options(**options), device="cpu")
    assert says in str(caught.value)


def test_a_durable_call_on_arrays_in_memory(here) -> None:
    """Interrupted in Python, the same call goes on; other arrays are refused."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 1500, 16)).astype("f4")
    call = {"causal": True, "device": "cpu", "out": "out.h5"}
    expected = cqsa.attention(q, k, v, causal=True, device="cpu", options=Options(chunks=7))
    with pytest.raises(cqsa.JobStopped, match="the time is over"):
        cqsa.attention(q, k, v, **call, options=Options(chunks=7, durable=True, max_time_s=0.0))
    assert os.path.isdir("out.h5.job")
    with pytest.raises(cqsa.StorageError, match=r"v: the array is not the input .*different: sample.*Pass that again"):
        cqsa.attention(q, k, v + 1, **call, options=Options(chunks=7, durable=True))
    with pytest.raises(cqsa.ArgumentError, match="a job of arrays in memory"):
        resumed("out.h5", device=None, memory=None, options=Options())
    found = cqsa.attention(q, k, v, **call, options=Options(chunks=7, durable=True))
    assert np.array_equal(found[...], expected)
    assert sorted(os.listdir()) == ["out.h5"]
