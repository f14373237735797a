"""What runs on a GPU take of its memory by the driver's count, where other processes count too: run these alone."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import numpy as np
import pytest
from gpu_cases import (
    GRANULARITY,
    Midway,
    assert_close,
    by_dtype,
    device_free,
    device_peak,
    exact,
    least_bytes,
    normal,
    qkv,
)

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.errors import DeviceMemoryError

# What a small budget's prediction may be off by.
SMALL = 12 << 20
pytestmark = pytest.mark.usefixtures("gpu", "no_thread_is_left")


# ---- the bound

BOUNDS = [
    ("cqs", "f2", "48MiB"),
    ("cqs", "f4", "96MiB"),
    ("rectangular", "f2", "24MiB"),
    ("rectangular", "f4", "64MiB"),
    ("auto", "f2", None),
]
LONG = [("cqs", "f2", None), ("rectangular", "f4", None)]


@pytest.mark.parametrize(("cover", "dtype", "memory"), BOUNDS, ids=str)
@pytest.mark.parametrize("to", ["array", "file", "statistics"])
def test_device_memory_stays_within_the_plan_and_the_plan_is_near_it(folder, cover, dtype, memory, to):
    operands = [normal(1, 4, 32768, 64, dtype=dtype, seed=seed) for seed in range(3)]
    call = {"causal": True, "device": "cuda", "memory": memory, "options": Options(cover=cover, overwrite=True)}
    check_bound(operands, {**call, "out": "out.h5"} if to == "file" else call, to == "statistics")


@pytest.mark.parametrize(("cover", "dtype", "memory"), LONG, ids=str)
def test_the_prediction_of_a_large_plan_is_within_5_percent(cover, dtype, memory):
    operands = [normal(1, 2, 1 << 18, 64, dtype=dtype, seed=seed) for seed in range(3)]
    call = {"causal": True, "device": "cuda", "memory": memory, "options": Options(cover=cover)}
    assert check_bound(operands, call, False) > 1.05 * SMALL


def check_bound(operands, call, as_statistics: bool) -> int:
    """Runs a call several times; what the driver counts is within the plan and near it. The plan's bytes."""
    plan = statistics_plan(operands, call) if as_statistics else cqsa.plan(*operands, **call)
    run = cqsa.statistics if as_statistics else cqsa.attention
    run(*operands, **call)  # context, kernels
    before = device_free()
    with device_peak() as peak:
        for _ in range(3):
            run(*operands, **call)
    assert peak() <= plan.memory_bytes + GRANULARITY
    assert plan.memory_bytes <= max(1.05 * peak(), peak() + SMALL)
    assert device_free() >= before  # nothing is kept
    return plan.memory_bytes


def statistics_plan(operands, call) -> cqsa.Plan:
    from cqsa_arrays.job import Request, prepared

    q, k, v = operands
    with prepared(Request(q=q, k=k, v=v, **call), as_statistics=True) as job:
        return job.plan


@pytest.mark.parametrize(
    ("options", "dtype", "out_dtype"),
    [(Options(), "f2", "f2"), (Options(cover="rectangular"), "f4", "f4"), (Options(chunks=3), "f2", "f2"),
     (Options(chunks=3), "f4", "f4")],
    ids=str,
)  # fmt: skip
def test_arrays_on_the_gpu_take_no_more_than_states(options, dtype, out_dtype):
    import cupy

    operands = [cupy.asarray(normal(1, 4, 32768, 64, dtype=dtype, seed=seed)) for seed in range(3)]
    out = cupy.empty_like(operands[0], dtype=out_dtype)
    call = {"causal": True, "out": out, "options": options}
    plan = cqsa.plan(*operands, **call)
    assert {term.name for term in plan.chosen.terms} <= {"states"}
    assert (plan.memory_bytes == 0) == (options.chunks is None)  # rows of one launch have none
    cqsa.attention(*operands, **call)
    with device_peak() as peak:
        cqsa.attention(*operands, **call)
    assert peak() <= plan.memory_bytes + GRANULARITY


def test_a_budget_that_is_too_small_is_refused_before_anything_is_taken():
    operands = qkv(1, 2, 3000, 64, dtype="f2")
    least = least_bytes(*operands, device="cuda")
    with device_peak() as peak, pytest.raises(cqsa.BudgetError, match=f"Pass memory={least} or more"):
        cqsa.attention(*operands, device="cuda", memory=least // 2)
    assert peak() <= 0


def test_an_error_midway_gives_the_memory_back(monkeypatch):
    from cqsa_arrays.engine.cuda.transfer import Transfers

    arrays = qkv(1, 3, 2000, 64, dtype="f2")
    call = {"causal": True, "device": "cuda", "memory": least_bytes(*qkv(1, 3, 2000, 64, dtype="f2"), device="cuda")}
    cqsa.attention(*arrays, **call)
    before = device_free()
    with monkeypatch.context() as patched:
        Midway(patched, Transfers, "receive", OSError(5, "gone"))
        with pytest.raises(OSError, match="gone"):
            cqsa.attention(*arrays, **call)
    gc.collect()
    assert device_free() >= before - GRANULARITY


@by_dtype
@pytest.mark.parametrize("states", ["host", "disk"])
def test_states_that_wait_elsewhere(folder, dtype, states):
    """In page-locked memory of the host where the device has no room, in a file where the host has none."""
    arrays = qkv(1, 2, 5000, 64, dtype=dtype)
    options = Options(chunks=13, scratch=folder)
    call = {"causal": True, "device": "cuda", "options": options}
    call["memory"] = least_bytes(*arrays, **call)
    plan = cqsa.plan(*arrays, **call)
    if states == "disk":
        call["options"] = replace(options, host_memory=plan.chosen.host_bytes - 1)
        plan = cqsa.plan(*arrays, **call)
    assert plan.chosen.states == states
    first = cqsa.attention(*arrays, **call)
    with device_peak() as peak:
        out = cqsa.attention(*arrays, **call)
    assert_close(out, exact(*arrays, offset=0)[0])
    assert np.array_equal(out, first)
    assert peak() <= plan.memory_bytes + GRANULARITY
    assert list(folder.iterdir()) == []


# ---- memory that somebody else has taken


def test_a_device_that_has_less_than_planned_leads_to_a_smaller_plan(monkeypatch, caplog):
    from cqsa_arrays.engine.cuda import resident

    arrays, taken = qkv(1, 4, 6000, 64, dtype="f2"), []
    planned = cqsa.plan(*arrays, device="cuda").memory_bytes
    allocate = resident.Arena.allocate

    def once_full(self, size_bytes):
        taken.append(size_bytes)
        if len(taken) == 1:
            raise DeviceMemoryError("memory: somebody was quicker.", planned // 2)
        allocate(self, size_bytes)

    monkeypatch.setattr(resident.Arena, "allocate", once_full)
    with caplog.at_level(logging.INFO, "cqsa_arrays"):
        out = cqsa.attention(*arrays, device="cuda")
    assert_close(out, exact(*arrays)[0])
    assert taken[0] == planned
    assert taken[1:] == [size for size in taken[1:] if size <= 0.9 * (planned // 2)]
    assert len(taken) == 2
    assert "somebody was quicker. Going on with a smaller plan" in caplog.text


def test_a_device_that_has_too_little_for_any_plan_says_so(monkeypatch):
    from cqsa_arrays.engine.cuda import resident

    def full(self, size_bytes):
        raise DeviceMemoryError("memory: somebody was quicker.", 1000)

    monkeypatch.setattr(resident.Arena, "allocate", full)
    with pytest.raises(cqsa.BudgetError, match="what cuda:0 had left"):
        cqsa.attention(*qkv(1, 2, 3000, 64, dtype="f2"), device="cuda")


def test_most_of_the_device_is_really_taken(caplog):
    import cupy

    arrays = [normal(1, 2, 1 << 18, 64, dtype="f2", seed=seed) for seed in range(3)]
    call = {"causal": True, "device": "cuda"}
    before = cqsa.attention(*arrays, **call)
    left = 64 << 20
    assert cqsa.plan(*arrays, **call).memory_bytes > 2 * left
    others = cupy.cuda.Memory(device_free() - left)
    try:
        with caplog.at_level(logging.INFO, "cqsa_arrays"):
            out = cqsa.attention(*arrays, **call)
    finally:
        del others
    assert "Going on with a smaller plan" in caplog.text
    assert_close(out[:, 0], before[:, 0].astype("f8"))
