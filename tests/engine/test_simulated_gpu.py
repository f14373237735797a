"""The engine on a simulated GPU whose streams work late and in any order that is allowed; see ``simulated_cuda``."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import threading
import time
import zlib
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import simulated_cuda
from our_threads import ours_alive, running
from simulated_cuda import lock, simulated_gpu

import cqsa_arrays as cqsa
from cqsa_arrays import Options, codefiles
from cqsa_arrays.job import Request, attend, prepared
from cqsa_arrays.planner.candidates import rectangular_candidate
from cqsa_arrays.storage import OutputFile

TOLERANCE = {"float16": 6e-4, "float32": 1e-6, "float64": 1e-13}
by_cover = pytest.mark.parametrize("cover", ["cqs", "rectangular"])


@pytest.fixture
def gpu(request):
    """Work comes in another order in every case, drawn by its name."""
    with simulated_gpu(zlib.crc32(request.node.name.encode())) as simulator:
        yield simulator
    assert not ours_alive()


def qkv(batch=1, heads=2, queries=900, keys=None, dim=16, value_dim=None, dtype="f2"):
    rng = np.random.default_rng(0)
    shapes = ((queries, dim), (keys or queries, dim), (keys or queries, value_dim or dim))
    return [rng.standard_normal((batch, heads, *shape)).astype(dtype) for shape in shapes]


def exact(q, k, v, offset=None):
    """The formula in float64; many cases have the same arrays."""
    return _exact(offset, *((x.tobytes(), x.dtype, x.shape) for x in (q, k, v)))


@lru_cache(maxsize=8)
def _exact(offset, *arrays):
    q, k, v = (np.frombuffer(content, dtype).reshape(shape).astype("f8") for content, dtype, shape in arrays)
    scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5
    if offset is not None:
        scores[..., np.arange(k.shape[2]) > np.arange(q.shape[2])[:, None] + offset] = -np.inf
    largest = scores.max(3, keepdims=True)
    weights = np.exp(scores - np.where(largest == -np.inf, 0, largest))
    total = weights.sum(3, keepdims=True)
    return weights @ v / np.where(total == 0, 1, total)


def close(found, expected) -> None:
    report = cqsa.compare(np.asarray(found), expected, tolerance=TOLERANCE[np.asarray(found).dtype.name])
    assert report.passed, report


def least(*operands, **call) -> int:
    with pytest.raises(cqsa.BudgetError) as caught:
        cqsa.plan(*operands, **{**call, "memory": 1})
    return int(re.search(r"Pass memory=(\d+)", str(caught.value))[1])


@by_cover
@pytest.mark.parametrize("offset", [None, 0, -500], ids=lambda offset: f"offset {offset}")
@pytest.mark.parametrize("room", [1.0, 1.7, 40])
def test_many_chunks_of_unequal_lengths(gpu, cover, offset, room) -> None:
    arrays = qkv(1, 3, 1000, 1400, value_dim=8, dtype="f4")
    mask = None if offset is None else cqsa.causal(offset)
    call = {"mask": mask, "device": "cuda", "options": Options(cover=cover)}
    memory = int(room * least(*arrays, **call))
    plan = cqsa.plan(*arrays, memory=memory, **call)
    before = gpu.used_bytes
    close(cqsa.attention(*arrays, memory=memory, **call), exact(*arrays, offset))
    assert gpu.peak_bytes - before == plan.memory_bytes
    assert gpu.used_bytes == before


@pytest.mark.parametrize("states", ["memory", "host", "disk"])
@pytest.mark.parametrize("offset", [None, 0, -700], ids=lambda offset: f"offset {offset}")
def test_states_wait_where_the_plan_says(gpu, states, offset, tmp_path) -> None:
    """On the host where the device has no room, on the disk where the host has none."""
    arrays = qkv(1, 2, 1700, dim=8, value_dim=32)
    options, mask = Options(cover="cqs", chunks=13, scratch=tmp_path), None if offset is None else cqsa.causal(offset)
    call = {"mask": mask, "device": "cuda", "options": options}
    memory = 64 << 20 if states == "memory" else least(*arrays, **call)
    plan = cqsa.plan(*arrays, memory=memory, **call)
    if states == "disk":
        call["options"] = replace(options, host_memory=plan.chosen.host_bytes - 1)
        plan = cqsa.plan(*arrays, memory=memory, **call)
    assert plan.chosen.states == states
    with prepared(Request(q=arrays[0], k=arrays[1], v=arrays[2], memory=memory, **call)) as job:
        out, report = attend(job)
    close(out, exact(*arrays, offset))
    assert (report.state_moved_bytes > 0) == (states != "memory")


@by_cover
def test_page_locked_arrays_are_copied_from_where_they_are(gpu, cover, monkeypatch) -> None:
    arrays = [lock(x) for x in qkv(2, 2, 900, 1100, dtype="f4")]
    token_major = [lock(np.ascontiguousarray(x.swapaxes(1, 2))) for x in arrays]
    monkeypatch.setattr("cqsa_arrays.storage.memory.HostSource.read", None)
    monkeypatch.setattr("cqsa_arrays.engine.cuda.resident.at_work", None)  # no thread is begun
    for layout, given in (("bhnd", arrays), ("bnhd", token_major)):
        call = {"device": "cuda", "layout": layout, "options": Options(cover=cover)}
        out = cqsa.attention(*given, memory=int(1.5 * least(*given, **call)), **call)
        close(out if layout == "bhnd" else out.swapaxes(1, 2), exact(*arrays))


def test_page_locked_heads_that_lie_together_are_one_copy(gpu) -> None:
    arrays = [lock(np.ascontiguousarray(x.swapaxes(1, 2))) for x in qkv(1, 3, 900)]
    out = cqsa.attention(*arrays, layout="bnhd", device="cuda")
    close(out.swapaxes(1, 2), exact(*(x.swapaxes(1, 2) for x in arrays)))
    assert gpu.copies_2d <= 3


def test_page_locked_arrays_of_other_strides(gpu) -> None:
    """One head of keys for all; every other head; rows that overlap, which the device could not copy."""
    q, k, v = (lock(np.ascontiguousarray(x.swapaxes(1, 2))) for x in qkv(1, 4, 700))
    shared = [np.broadcast_to(x[:, :, :1], x.shape) for x in (k, v)]
    for given in ([q, *shared], [x[:, :, ::2] for x in (q, k, v)], [x[:, ::2] for x in (q, k, v)]):
        out = cqsa.attention(*given, layout="bnhd", device="cuda")
        close(out.swapaxes(1, 2), exact(*(x.swapaxes(1, 2) for x in given)))
    windows = np.lib.stride_tricks.sliding_window_view(lock(qkv(1, 1, 600, dim=1)[0].ravel()), 16)
    close(cqsa.attention(windows, windows, windows, device="cuda"), exact(*(windows[None, None],) * 3)[0, 0])


def test_tokens_longer_than_a_piece(gpu) -> None:
    arrays = [x.swapaxes(1, 2) for x in qkv(1, 600, 3, 5, dim=1024, dtype="f8")]
    given = [np.ascontiguousarray(x) for x in arrays]
    out = cqsa.attention(*given, layout="bnhd", device="cuda")
    close(out.swapaxes(1, 2), exact(*(x.swapaxes(1, 2) for x in given)))


@by_cover
@pytest.mark.parametrize("dtype", ["f2", "f8"])
@pytest.mark.parametrize("offset", [None, -500], ids=lambda offset: f"offset {offset}")
def test_statistics_on_the_host(gpu, cover, dtype, offset) -> None:
    arrays = qkv(2, 2, 900, 700, value_dim=8, dtype=dtype)
    mask = None if offset is None else cqsa.causal(offset)
    call = {"mask": mask, "device": "cuda", "options": Options(cover=cover)}
    with prepared(Request(q=arrays[0], k=arrays[1], v=arrays[2], **call), as_statistics=True) as job:
        names = [term.name for term in (*job.plan.chosen.terms, *job.plan.chosen.host_terms)]
    assert not {"output pieces", "page-locked output"} & set(names)
    stats = cqsa.statistics(*arrays, **call)
    close(stats.output().astype(dtype), exact(*arrays, offset))


@by_cover
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("offset", [None, -500], ids=lambda offset: f"offset {offset}")
def test_arrays_on_the_device(gpu, cover, dtype, offset) -> None:
    arrays = qkv(2, 2, 900, 1100, dtype=dtype)
    there = [np.array(x).view(simulated_cuda.Array) for x in arrays]
    mask = None if offset is None else cqsa.causal(offset)
    call = {"mask": mask, "options": Options(cover=cover)}
    out = cqsa.attention(*there, **call)
    assert isinstance(out, simulated_cuda.Array)
    close(out.get(), exact(*arrays, offset))
    for chunks in (2, 3, 7) if cover == "cqs" else ():
        out = cqsa.attention(*there, mask=mask, options=Options(chunks=chunks))
        close(out.get(), exact(*arrays, offset))
    stats = cqsa.statistics(*there, **call)
    close(np.asarray(stats.output()).astype(arrays[0].dtype), exact(*arrays, offset))


def test_what_finishes_in_one_launch_takes_no_memory(gpu) -> None:
    there = [x.view(simulated_cuda.Array) for x in qkv()]
    plan = cqsa.plan(*there)
    assert plan.memory_bytes == 0
    assert "none: each launch finishes its rows" in str(plan)


@by_cover
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_files(gpu, cover, layout, tmp_path) -> None:
    arrays = qkv(1, 3, 900)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        for name, array in zip("qkv", arrays, strict=True):
            file[name] = array if layout == "bhnd" else array.swapaxes(1, 2)
            file[name].attrs["layout"] = layout
    names, out = [f"{tmp_path}/in.h5:/{name}" for name in "qkv"], tmp_path / "out.h5"
    call = {"causal": True, "device": "cuda", "out": out, "options": Options(cover=cover)}
    cqsa.attention(*names, memory=int(1.5 * least(*names, **call)), **call)
    report = cqsa.verify(out)
    assert report.passed, report
    assert sorted(os.listdir(tmp_path)) == ["in.h5", "out.h5"]


@pytest.fixture
def keys_stay(monkeypatch):
    """Plans of query tiles beside resident keys: a function of how many of both, and of the heads of a group."""
    choose = importlib.import_module("cqsa_arrays.planner.choose")

    def force(tiles, blocks, heads=1) -> Options:
        def only(problem, machine, budget_bytes):
            block = -(-problem.key_tokens // blocks)
            yield rectangular_candidate(problem, machine, (1, heads), block, tiles, keys_stay=True)

        choose.choose.cache_clear()
        monkeypatch.setattr(choose, "rectangular_candidates", only)
        return Options(cover="rectangular", overwrite=True)

    yield force
    choose.choose.cache_clear()


@pytest.mark.parametrize(("tiles", "blocks", "heads"), [(7, 7, 1), (3, 5, 2), (4, 2, 4), (1, 6, 1)])
@pytest.mark.parametrize("offset", [None, 0, -500, 300], ids=lambda offset: f"offset {offset}")
def test_keys_that_stay(gpu, keys_stay, tiles, blocks, heads, offset) -> None:
    arrays = qkv(2, 4, 900, 1100, value_dim=8, dtype="f4")
    mask = None if offset is None else cqsa.causal(offset)
    call = {"mask": mask, "device": "cuda", "memory": "64MiB", "options": keys_stay(tiles, blocks, heads)}
    plan = cqsa.plan(*arrays, **call)
    assert plan.chosen.keys_stay
    assert f"{blocks} key blocks, which stay" in str(plan)
    before = gpu.used_bytes
    close(cqsa.attention(*arrays, **call), exact(*arrays, offset))
    assert gpu.peak_bytes - before == plan.memory_bytes


@pytest.mark.parametrize(("layout", "heads"), [("bhnd", 1), ("bhnd", 3), ("bnhd", 3)])
@pytest.mark.parametrize("offset", [None, 0, -500], ids=lambda offset: f"offset {offset}")
@pytest.mark.parametrize("ours", [True, False], ids=["an array that takes bytes as they are", "another"])
def test_rows_that_one_launch_finishes_leave_for_the_host(gpu, keys_stay, layout, offset, heads, ours) -> None:
    arrays = qkv(2, 3, 900, 700, value_dim=8)
    call = {
        "mask": None if offset is None else cqsa.causal(offset), "device": "cuda", "memory": "64MiB", "layout": layout,
        "options": keys_stay(5, 4, heads),
    }  # fmt: skip
    swapped = [x.swapaxes(1, 2) if layout == "bnhd" else x for x in arrays]
    wide = np.full((*swapped[0].shape[:3], 8 if ours else 16), np.nan, "f2")
    out = wide if ours else wide[..., ::2]
    plan = cqsa.plan(*swapped, out=out, **call)
    assert "none: each launch finishes its rows" in str(plan)
    cqsa.attention(*swapped, out=out, **call)
    found = out.swapaxes(1, 2) if layout == "bnhd" else out
    close(found, exact(*arrays, offset))
    assert (found[:, :, : max(0, -(offset or 0))] == 0).all()  # rows that see no key, two whole tiles of them


@pytest.mark.parametrize("offset", [None, 0, -500], ids=lambda offset: f"offset {offset}")
@pytest.mark.parametrize("cover", ["cqs", "rectangular"])
@pytest.mark.parametrize("heads", [3, 5])
def test_the_first_and_the_last_heads_are_computed_in_two_launches(gpu, cover, offset, heads, monkeypatch) -> None:
    """Of the last the later rows first."""
    arrays = qkv(1, heads, 900, 700, value_dim=8)
    mask = None if offset is None else cqsa.causal(offset)
    call = {"mask": mask, "device": "cuda", "memory": "64MiB", "options": Options(cover=cover)}
    choose, candidates = (importlib.import_module(f"cqsa_arrays.planner.{name}") for name in ("choose", "candidates"))

    def single_heads(problem, machine, *given):
        if cover == "cqs":
            yield candidates.cqs_candidate(problem, machine, (1, 1), "memory", 1)
        else:
            yield candidates.rectangular_candidate(problem, machine, (1, 1), problem.key_tokens, 1)

    monkeypatch.setattr(choose, f"{cover}_candidates", single_heads)
    kernel, starts, found = importlib.import_module("cqsa_arrays.kernels.cuda.kernel").CudaKernel, [], []
    accumulate = kernel.accumulate

    def noted(self, queries, query_start, *given, **named):
        starts.append(query_start)
        return accumulate(self, queries, query_start, *given, **named)

    monkeypatch.setattr(kernel, "accumulate", noted)
    for tiles in (1, 2):
        choose.choose.cache_clear()
        assert ("the first and the last in 2 tiles" in str(cqsa.plan(*arrays, **call))) == (tiles == 2)
        before = gpu.launches
        found.append(cqsa.attention(*arrays, **call))
        assert gpu.launches - before == heads + 2 * (tiles - 1)
        monkeypatch.setattr(candidates, "edge_tiles", lambda *given: 2)
    choose.choose.cache_clear()
    assert starts == [0] * heads + [0, 512] + [0] * (heads - 2) + [512, 0]
    assert np.array_equal(found[0][:, 1:], found[1][:, 1:])  # keys of the first are two blocks
    close(found[1], exact(*arrays, offset))


def test_rows_that_are_written_do_not_keep_the_memory_of_their_state(gpu, keys_stay, tmp_path, monkeypatch) -> None:
    """Four states for eight tiles; the rows of the first four are not written before the fifth is launched."""
    arrays, kernel = qkv(1, 1, 8 * 128), importlib.import_module("cqsa_arrays.kernels.cuda.kernel").CudaKernel
    launched, fifth, accumulate, write = [], threading.Event(), kernel.accumulate, OutputFile.write_out

    def counted(*given, **named):
        launched.append(given[2])
        if len(launched) == 5:
            fifth.set()
        return accumulate(*given, **named)

    def late(*given) -> None:
        assert fifth.wait(20), "a state is kept until its rows are written"
        write(*given)

    monkeypatch.setattr(kernel, "accumulate", counted)
    monkeypatch.setattr(OutputFile, "write_out", late)
    call = {"causal": True, "device": "cuda", "memory": "64MiB", "options": keys_stay(8, 8)}
    assert cqsa.plan(*arrays, **call).chosen.residency.state_slots == 4
    close(cqsa.attention(*arrays, out=tmp_path / "out.h5", **call), exact(*arrays, 0))


@by_cover
@pytest.mark.parametrize("at", [1, 4, 9])
def test_an_error_of_the_device_ends_the_run_and_leaves_nothing(gpu, cover, at, tmp_path) -> None:
    arrays = qkv(1, 3, 900)
    call = {"causal": True, "device": "cuda", "out": tmp_path / "out.h5", "options": Options(cover=cover)}
    call["memory"] = least(*arrays, **call)
    gpu.fail_at = at
    with pytest.raises(cqsa.DeviceError, match=r"^cuda:0: an illegal memory access"):
        cqsa.attention(*arrays, **call)
    assert os.listdir(tmp_path) == []
    gpu.fail_at = None
    del call["out"]
    close(cqsa.attention(*arrays, **call), exact(*arrays, 0))


@by_cover
def test_an_error_of_the_result_is_raised(gpu, cover, monkeypatch) -> None:
    arrays = qkv(1, 3, 900)
    call = {"causal": True, "device": "cuda", "options": Options(cover=cover)}
    call["memory"] = least(*arrays, **call)

    def full(*given: object) -> None:
        raise cqsa.StorageError("the disk is full")

    transfer = importlib.import_module("cqsa_arrays.engine.cuda.transfer")
    monkeypatch.setattr(transfer.Transfers, "receive", full)
    with pytest.raises(cqsa.StorageError, match="the disk is full"):
        cqsa.attention(*arrays, **call)
    assert gpu.used_bytes == 0


@by_cover
def test_an_error_while_a_way_out_is_made_is_raised(gpu, cover, monkeypatch) -> None:
    """Not waited for: the rows that found no way out give their state back."""
    arrays = qkv(1, 3, 900)
    call = {"causal": True, "device": "cuda", "options": Options(cover=cover)}
    call["memory"] = least(*arrays, **call)
    departures = importlib.import_module("cqsa_arrays.engine.cuda.departures")

    def late(size_bytes: int) -> None:
        time.sleep(0.2)
        raise MemoryError("no page can be locked")

    monkeypatch.setattr(departures, "pinned_piece", late)
    with pytest.raises(MemoryError, match="no page can be locked"):
        cqsa.attention(*arrays, **call)
    assert gpu.used_bytes == 0


def test_an_interruption_begins_no_further_part_of_the_next_step(gpu, monkeypatch) -> None:
    link = importlib.import_module("cqsa_arrays.engine.cuda.link")
    resident = importlib.import_module("cqsa_arrays.engine.cuda.resident")
    transfer = importlib.import_module("cqsa_arrays.engine.cuda.transfer")
    shipments = []

    class Noted(transfer.Shipment):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            shipments.append(self)

    class Slow(simulated_cuda.Event):
        def synchronize(self) -> None:  # before each share of a piece
            time.sleep(0.02)
            super().synchronize()

    def interrupted(self, *given) -> None:
        raise KeyboardInterrupt

    def attend(self, *given) -> None:
        usual(self, *given)
        monkeypatch.setattr(resident.DeviceResident, "attend", interrupted)

    usual = resident.DeviceResident.attend
    monkeypatch.setattr(link, "Shipment", Noted)
    monkeypatch.setattr(importlib.import_module("cupy").cuda, "Event", Slow)
    monkeypatch.setattr(resident.DeviceResident, "attend", attend)
    monkeypatch.setattr("cqsa_arrays.planner.memory.PINNED_PIECE_BYTES", 1024)
    monkeypatch.setattr("cqsa_arrays.engine.cuda.memory.PINNED_PIECE_BYTES", 1024)
    with pytest.raises(KeyboardInterrupt):
        cqsa.attention(*qkv(1, 3, 900), causal=True, device="cuda", options=Options(chunks=2))
    shares, _, done = shipments[1]._bill[6:9].tolist()
    assert len(shipments) == 2
    assert done < shares / 2
    assert gpu.used_bytes == 0


@pytest.mark.parametrize("where", ["readers begin", "a sender begins", "rows leave", "a shipment is posted"])
def test_threads_end_before_the_memory_that_they_use_wherever_an_interruption_comes(
    gpu, where, monkeypatch, tmp_path
) -> None:
    """It may come when something was begun and nobody has noted it."""
    crew, memory, departures = (
        importlib.import_module(f"cqsa_arrays.engine.cuda.{name}") for name in ("crew", "memory", "departures")
    )
    workers, alive = importlib.import_module("cqsa_arrays.workers"), []

    class Slow(simulated_cuda.Event):
        def synchronize(self) -> None:
            time.sleep(0.01)
            super().synchronize()

    def interrupted(usual):
        def call(self, *given, **named):
            usual(self, *given, **named)
            monkeypatch.setattr(owner, name, usual)  # it comes once
            raise KeyboardInterrupt

        return call

    def close(self) -> None:
        alive.extend(running(threads))  # others may be kept from an earlier run
        usual_close(self)

    usual_close = memory.Arena.close
    threads = {"readers begin": ("cqsa-reader",), "rows leave": ("cqsa-output", "cqsa-sender")}.get(
        where, ("cqsa-sender",)
    )
    monkeypatch.setattr(importlib.import_module("cupy").cuda, "Event", Slow)
    monkeypatch.setattr(memory.Arena, "close", close)
    owner, name = {
        "readers begin": (workers.Workers, "start"), "a sender begins": (workers.Workers, "submit"),
        "rows leave": (departures.Departures, "submit"), "a shipment is posted": (crew.Crew, "send"),
    }[where]  # fmt: skip
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    arrays = qkv(1, 3, 900)
    if where == "readers begin":
        arrays = [np.memmap(tmp_path / n, x.dtype, "w+", shape=x.shape) for n, x in zip("qkv", arrays, strict=True)]
    with pytest.raises(KeyboardInterrupt):
        cqsa.attention(*arrays, causal=True, device="cuda")
    assert alive == []
    assert gpu.used_bytes == 0


def test_threads_that_wait_for_work_end_where_one_interruption_follows_another(gpu, monkeypatch) -> None:
    """Before anything of the usual end has been done."""
    link, resident = (importlib.import_module(f"cqsa_arrays.engine.cuda.{name}") for name in ("link", "resident"))

    def interrupted(*given) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cqsa_arrays.workers._KEPT", {})  # none of those that earlier runs have left
    before = running(("cqsa-sender",))
    monkeypatch.setattr(resident.DeviceResident, "attend", interrupted)
    monkeypatch.setattr(link.Link, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cqsa.attention(*qkv(1, 3, 900), causal=True, device="cuda")
    assert running(("cqsa-sender",)) == before
    assert gpu.used_bytes == 0


@pytest.mark.parametrize("chunks", [1, 7])
def test_memory_that_cannot_be_locked_is_an_error(gpu, chunks, monkeypatch) -> None:
    def refused(size_bytes: int) -> None:
        time.sleep(0.02)
        raise MemoryError("no page can be locked")

    monkeypatch.setattr(importlib.import_module("cqsa_arrays.engine.cuda.memory"), "pinned", refused)
    with pytest.raises(MemoryError, match="no page can be locked"):
        cqsa.attention(*qkv(1, 3, 900), causal=True, device="cuda", options=Options(cover="cqs", chunks=chunks))
    assert gpu.used_bytes == 0


def test_an_error_of_writing_is_raised_whenever_it_comes(gpu) -> None:
    departures = importlib.import_module("cqsa_arrays.engine.cuda.departures")

    class Late(Future):
        """Fails when it has been asked ``before`` times."""

        def __init__(self, before: int) -> None:
            super().__init__()
            self.left = before

        def done(self) -> bool:
            self.left -= 1
            if self.left == 0:
                self.set_exception(OSError("the disk is full"))
            return super().done()

    for before in (1, 2, 3):
        output = departures.Departures(None, None, None, None, 0)
        output._under_way = [late := Late(before)]
        raised = []
        while late.left > -3 and output._under_way:
            try:
                output.raise_errors()
            except OSError as error:
                raised.append(str(error))
        assert raised == ["the disk is full"]


@pytest.mark.parametrize("row_bytes", [1, 100, 132, 4 << 20])
def test_no_piece_has_more_rows_than_its_place(gpu, row_bytes) -> None:
    """One row more than a place has, where the bytes of the places hide it."""
    departures = importlib.import_module("cqsa_arrays.engine.cuda.departures")
    out = departures.Departures(None, None, None, None, 4 << 20)
    for rows, most in ((31775, 31774), (31774, 31774), (1, 1), (70000, 3), (100000, 100000), (131072, 32768)):
        cut = out.cut(rows, row_bytes, most)
        assert sum(len(cut[i]) for i in range(len(cut))) == rows
        assert cut.longest <= most


def test_the_simulator_notices_what_is_not_ordered(monkeypatch) -> None:
    """Without the events of its slots the engine reads blocks that have not arrived, in some run."""

    def passes(seed: int) -> bool:
        with simulated_gpu(seed):
            from cqsa_arrays.engine.cuda.pages import DevicePages

            monkeypatch.setattr(DevicePages, "await_loaded", lambda self, stream: None)
            arrays = qkv(1, 3, 900)
            call = {"causal": True, "device": "cuda", "options": Options(cover="cqs")}
            out = cqsa.attention(*arrays, memory=least(*arrays, **call), **call)
            return cqsa.compare(out, exact(*arrays, 0)).passed

    assert not all(passes(seed) for seed in range(20))


def test_machine_code_is_compiled_once_and_kept_whole() -> None:
    with simulated_gpu(0):
        from cupy.cuda import nvrtc

        from cqsa_arrays.kernels.cuda.cubin import compiled

        cache = Path(os.environ["CUPY_CACHE_DIR"]) / "not there yet"
        os.environ["CUPY_CACHE_DIR"] = str(cache)
        said = []

        def compiles(text: str, *options: str) -> bool:
            before = nvrtc.compiled
            assert compiled(text, options, lambda: said.append(text)) == "\n".join(options).encode()
            return nvrtc.compiled > before

        assert compiles("attend", "-arch=sm_90a")
        assert not compiles("attend", "-arch=sm_90a")
        assert compiles("attend()", "-arch=sm_90a")
        assert compiles("attend", "-arch=sm_90a", "-DSTAGES=3")
        assert said == ["attend", "attend()", "attend"]
        with pytest.raises(cqsa.DeviceError, match=r"compilation failed: no such architecture: -arch=sm_80$"):
            compiles("attend", "-arch=sm_80")
        assert len(list(cache.iterdir())) == 3
        for path in cache.iterdir():  # what is damaged is replaced
            path.write_bytes(path.read_bytes()[:-1])
        assert compiles("attend", "-arch=sm_90a")
        assert not compiles("attend", "-arch=sm_90a")
        # Where CuPy is told to keep nothing, nothing is kept.
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
        try:
            assert compiles("attend", "-arch=sm_90a")
        finally:
            del os.environ["CUPY_CACHE_IN_MEMORY"]
        assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("name", ["CUPY_CACHE_DIR", "HOME"])
def test_machine_code_that_cannot_be_kept_is_compiled_for_this_time(name, monkeypatch, tmp_path, caplog) -> None:
    """In a container without writable directories, or without a home."""
    codefiles._warn.cache_clear()
    with simulated_gpu(0):
        from cupy.cuda import nvrtc

        from cqsa_arrays.kernels.cuda.cubin import compiled

        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        monkeypatch.delenv("CUPY_CACHE_DIR")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where nobody knows of a home
        if name == "CUPY_CACHE_DIR":
            (tmp_path / "file").touch()
            monkeypatch.setenv(name, str(tmp_path / "file" / "below"))
        for _ in range(2):
            assert compiled("attend", ("-arch=sm_90a",), lambda: None) == b"-arch=sm_90a"
        assert nvrtc.compiled == 2
    (message,) = caplog.messages
    assert message.startswith("compiled code cannot be kept on disk")
    assert message.endswith("Set CUPY_CACHE_DIR to a directory that can be written.")


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100")]
)
def test_code_is_made_for_the_device_or_an_older_one_whose_code_it_runs(capability, expected) -> None:
    with simulated_gpu(0):
        from cqsa_arrays.kernels.cuda.cubin import architecture

        assert architecture(capability) == expected
        with pytest.raises(cqsa.DeviceError, match=r"NVRTC 13.0 cannot compile for compute capability 12.0. Install"):
            architecture((12, 0))
