"""Durable jobs on a GPU: stopped anywhere they end with the bytes of an unbroken run; moved to the CPU, as exact."""

from __future__ import annotations

import importlib
import os

import h5py
import pytest
from gpu_cases import least_bytes, qkv

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.durable import Stop
from cqsa_arrays.job import Request, prepared
from cqsa_arrays.partial import verify_partial
from cqsa_arrays.planner.candidates import rectangular_candidate
from cqsa_arrays.resumable import attend, resumed

pytestmark = pytest.mark.usefixtures("gpu", "no_thread_is_left")


class StopAt(Stop):
    """Stops a run at the ``at``-th place."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left_over = at

    def reason_within(self, ahead_s: float) -> str | None:
        self._left_over -= 1
        return None if self._left_over >= 0 else "enough"


def run(call: dict, stop: Stop) -> None:
    with prepared(Request(**call)) as job:
        attend(job, stop)


def data() -> tuple[bytes, bytes]:
    with h5py.File("out.h5") as file:
        return file["out"][...].tobytes(), file["lse"][...].tobytes()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("kind", ["cqs", "tiles", "states elsewhere", "lanes"])
def test_stopped_at_any_place(folder, kind, dtype) -> None:
    cover = "rectangular" if kind == "tiles" else "cqs"
    chunks = {"cqs": 7, "tiles": None, "states elsewhere": 13, "lanes": 7}[kind]
    q, k, v = qkv(1, 3, 5000, 64, dtype=dtype)
    options = Options(cover=cover, chunks=chunks, durable=True, checkpoint_s=0.0, lanes=2 if kind == "lanes" else 1)
    call = {"q": q, "k": k, "v": v, "causal": True, "device": "cuda", "out": "out.h5", "options": options}
    if kind in ("tiles", "states elsewhere"):
        arguments = {"causal": True, "device": "cuda", "out": "out.h5", "options": options}
        call["memory"] = int(1.01 * least_bytes(q, k, v, **arguments))
    run(call, Stop())
    expected = data()
    os.remove("out.h5")
    stops = 0
    while not os.path.exists("out.h5"):
        try:
            run(call, StopAt(4 + stops % 7))
        except cqsa.JobStopped:
            stops += 1
    assert stops > 2
    assert data() == expected


@pytest.fixture(params=["chunks", "keys that stay"])
def moving(request, monkeypatch):
    """Options of a job that is begun on a GPU."""
    if request.param == "chunks":
        return Options(cover="cqs", chunks=7, durable=True, checkpoint_s=0.0)
    choose = importlib.import_module("cqsa_arrays.planner.choose")

    def only(problem, machine, budget_bytes):
        yield rectangular_candidate(problem, machine, (1, 1), 1600, 4, keys_stay=True)

    monkeypatch.setattr(choose, "rectangular_candidates", only)
    return Options(cover="rectangular", durable=True, checkpoint_s=0.0)


def test_a_job_of_files_goes_on_on_the_cpu(folder, moving) -> None:
    arrays = qkv(1, 2, 6000, 64, dtype="f2")
    with h5py.File("qkv.h5", "w") as file:
        for name, array in zip("qkv", arrays, strict=True):
            file[name] = array
    files = {name: f"qkv.h5:/{name}" for name in "qkv"}
    with pytest.raises(cqsa.JobStopped):
        run({**files, "device": "cuda", "out": "out.h5", "options": moving}, StopAt(4))
    assert verify_partial("out.h5", rows=64).passed
    with prepared(resumed("out.h5", device="cpu", memory=None, options=Options())) as job:
        attend(job)
    assert cqsa.verify("out.h5", rows=64).passed
