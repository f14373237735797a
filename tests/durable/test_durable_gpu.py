"""Durable jobs on a simulated GPU: saved and resumed anywhere, moved to the CPU, stopped by errors of the device."""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from simulated_cuda import simulated_gpu

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.durable import Stop
from cqsa_arrays.errors import DeviceMemoryError
from cqsa_arrays.job import Request, prepared
from cqsa_arrays.partial import verify_partial
from cqsa_arrays.planner.candidates import rectangular_candidate
from cqsa_arrays.resumable import attend, resumed
from cqsa_arrays.storage import InputSpec, make_inputs

PLANS = {
    "cqs": Options(cover="cqs", chunks=7),
    "tiles": Options(cover="rectangular"),
    "keys that stay": Options(cover="rectangular"),
    "states on the host": Options(cover="cqs", chunks=13),
    "states on the disk": Options(cover="cqs", chunks=13),
    "lanes": Options(cover="cqs", chunks=7, lanes=2),
}


@pytest.fixture(params=[0, 1], ids=lambda seed: f"seed {seed}")
def gpu(request):
    with simulated_gpu(request.param) as simulator:
        yield simulator


def keys_stay(problem, machine, budget_bytes):
    """Four tiles beside five blocks; what ``choose`` has to choose from."""
    yield rectangular_candidate(problem, machine, (1, 1), 340, 4, keys_stay=True)


@pytest.fixture(params=PLANS, ids=str)
def call(request, here, monkeypatch):
    """Arguments of a durable call that commits at every place, and of one that is not durable with the same plan."""
    make_inputs("qkv.h5", InputSpec(tokens=1700, heads=3, head_dim=16, dtype="float16", seed=2))
    options, files = PLANS[request.param], {name: f"qkv.h5:/{name}" for name in "qkv"}
    common = {**files, "causal": True, "device": "cuda", "out": "out.h5"}
    if request.param == "tiles":
        common["memory"] = 2 * least(common, options)
    if request.param == "keys that stay":
        choose = importlib.import_module("cqsa_arrays.planner.choose")
        choose.choose.cache_clear()
        monkeypatch.setattr(choose, "rectangular_candidates", keys_stay)
        assert plan_of(common, options).chosen.keys_stay
    if request.param.startswith("states"):
        common["memory"] = least(common, options)
        plan = plan_of(common, options)
        assert plan.chosen.states == "host"
        if request.param.endswith("disk"):
            options = replace(options, host_memory=plan.chosen.host_bytes - 1)
            assert plan_of(common, options).chosen.states == "disk"
    yield common, options
    importlib.import_module("cqsa_arrays.planner.choose").choose.cache_clear()


def plan_of(common: dict, options: Options) -> cqsa.Plan:
    with prepared(Request(**common, options=durable(options))) as job:
        return job.plan


def least(common: dict, options: Options) -> int:
    with pytest.raises(cqsa.BudgetError) as caught:
        plan_of({**common, "memory": 1}, options)
    return int(re.search(r"Pass memory=(\d+)", str(caught.value))[1])


def data(path: str = "out.h5") -> tuple[bytes, bytes]:
    with h5py.File(path) as file:
        return file["out"][...].tobytes(), file["lse"][...].tobytes()


def durable(options: Options, **changes) -> Options:
    return replace(options, durable=True, checkpoint_s=0.0, **changes)


class StopAt(Stop):
    """Stops a run at the ``at``-th place."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def reason_within(self, ahead_s: float) -> str | None:
        self._left -= 1
        return None if self._left >= 0 else "enough"


def run(common: dict, options: Options, stop: object | None = None) -> None:
    with prepared(Request(**common, options=options)) as job:
        attend(job, Stop() if stop is None else stop)


def test_stopped_at_any_place_the_bytes_are_the_same(gpu, call, monkeypatch) -> None:
    common, options = call
    monkeypatch.setattr("cqsa_arrays.planner.plan.Plan.part_rows", 128)
    run(common, durable(options))
    expected = data()
    os.remove("out.h5")
    stops = 0
    while not os.path.exists("out.h5"):
        assert stops < 400
        try:
            run(common, durable(options), StopAt(3 + stops % 5))
        except cqsa.JobStopped:
            stops += 1
            if stops % 6 == 0:
                assert verify_partial("out.h5", rows=32).passed
    assert stops > 3
    assert data() == expected


def test_an_error_of_the_device_stops_it_and_it_goes_on(gpu, call, monkeypatch) -> None:
    """On the device the same bytes; on the CPU, if asked, the rest is as exact: also of a tile that was half done."""
    common, options = call
    monkeypatch.setattr("cqsa_arrays.planner.plan.Plan.part_rows", 128)
    run(common, durable(options))
    expected = data()
    os.remove("out.h5")
    cupy = sys.modules["cupy"]
    from cqsa_arrays.kernels.cuda.kernel import CudaKernel

    usual, calls = CudaKernel.accumulate, []

    def lost(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 6:
            raise cupy.cuda.runtime.CUDARuntimeError(719)
        return usual(self, *arguments, **named)

    for device in ("cuda", "cpu"):
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(CudaKernel, "accumulate", lost)
            with pytest.raises(cqsa.DeviceError, match="cuda:0"):
                run(common, durable(options))
        assert os.path.isdir("out.h5.job")
        if device == "cuda":
            run(common, durable(options))
            assert data() == expected
            os.remove("out.h5")
            continue
        with pytest.raises(cqsa.ArgumentError, match=r"device: found cpu; expected cuda:0.*device='cpu'"):
            run({**common, "device": "cpu", "memory": None}, durable(options))
        request = resumed("out.h5", device="cpu", memory=None, options=Options())
        with prepared(request) as job:
            attend(job)
        assert cqsa.verify("out.h5", rows=64).passed


def test_a_commit_that_does_not_wait_for_the_device_would_be_seen(here, monkeypatch) -> None:
    """Saving states while launches are under way gives wrong ones."""
    make_inputs("qkv.h5", InputSpec(tokens=1700, heads=3, head_dim=16, dtype="float16", seed=2))
    common = {**{name: f"qkv.h5:/{name}" for name in "qkv"}, "causal": True, "device": "cuda", "out": "out.h5"}
    options = Options(cover="cqs", chunks=7, restart=True, durable=True, checkpoint_s=1e9)
    for waits in (True, False):
        right = set()
        for places in range(3, 9):
            with simulated_gpu(0) as simulator:
                from cqsa_arrays.engine.cuda.resident import DeviceResident

                # Copies come first, launches as late as they may.
                simulator.pick = lambda ready: max(ready, key=lambda stream: stream.ptr)
                simulator.now_and_then = lambda: None
                if not waits:
                    monkeypatch.setattr(DeviceResident, "settle", lambda self: None)
                with pytest.raises(cqsa.JobStopped):
                    run(common, options, StopAt(places))
                right.add(verify_partial("out.h5", rows=64).passed)
        assert (right == {True}) == waits


def test_less_memory_than_planned_is_a_new_plan_at_the_begin_only(gpu, here, monkeypatch) -> None:
    make_inputs("qkv.h5", InputSpec(tokens=1700, heads=3, head_dim=16, dtype="float16", seed=2))
    common = {**{name: f"qkv.h5:/{name}" for name in "qkv"}, "causal": True, "device": "cuda", "out": "out.h5"}
    from cqsa_arrays.engine.cuda import resident

    usual, refusals = resident.Arena.allocate, []

    def small(self, size_bytes):
        if not refusals or size_bytes > refusals[0]:
            refusals.append(size_bytes // 2 if not refusals else refusals[0])
            raise DeviceMemoryError("less than planned", refusals[0])
        usual(self, size_bytes)

    monkeypatch.setattr(resident.Arena, "allocate", small)
    run(common, durable(Options()))
    assert refusals
    assert cqsa.verify("out.h5", rows=32).passed
    assert sorted(os.listdir()) == ["out.h5", "qkv.h5"]
