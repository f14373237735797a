"""Arrays on the host and files through a small part of a GPU: results, bits, and what errors leave behind."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import h5py
import ml_dtypes
import numpy as np
import pytest
from gpu_cases import (
    BFLOAT16,
    Midway,
    as_map,
    assert_close,
    assert_lse_close,
    by_cover,
    by_dtype,
    exact,
    host,
    least_bytes,
    qkv,
)
from our_threads import ours_alive

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.storage import ArraySink, OutputFile
from cqsa_arrays.storage.memory import MemmapSource

pytestmark = pytest.mark.usefixtures("gpu", "no_thread_is_left")


def store(arrays, storage: str, layout: str = "bhnd") -> tuple[str, str, str]:
    """The data sets of in.h5 that hold the arrays."""
    options = {
        "contiguous": {},
        "chunked": {"chunks": True},
        "compressed": {"chunks": (1, 1, 300, arrays[0].shape[3]), "compression": "gzip", "compression_opts": 1},
    }[storage]
    with h5py.File("in.h5", "w") as file:
        for name, array in zip("qkv", arrays, strict=True):
            bits = array.view("u2") if array.dtype == BFLOAT16 else array
            dataset = file.create_dataset(name, data=bits, **options)
            dataset.attrs["layout"] = layout
            if array.dtype == BFLOAT16:
                dataset.attrs["dtype"] = "bfloat16"
    return "in.h5:/q", "in.h5:/k", "in.h5:/v"


def parts(plan: cqsa.Plan) -> int:
    return plan.chosen.query_parts * plan.chosen.key_parts * len(plan.groups)


# ---- many chunks


@by_dtype
@by_cover
@pytest.mark.parametrize("offset", [None, 0, 900], ids=lambda offset: f"offset {offset}")
@pytest.mark.parametrize("room", [1.0, 1.6], ids=["least", "more"])
def test_arrays_on_the_host_in_many_chunks(dtype, cover, offset, room):
    arrays = qkv(2, 3, 1500, 64, keys=2411, value_dim=48, dtype=dtype)
    call = {
        "mask": None if offset is None else cqsa.causal(offset),
        "device": "cuda",
        "options": Options(cover=cover),
    }
    memory = int(room * least_bytes(*arrays, **call))
    plan = cqsa.plan(*arrays, memory=memory, **call)
    assert plan.cover_name == cover
    assert parts(plan) >= 6
    assert plan.memory_bytes <= memory
    out = cqsa.attention(*arrays, memory=memory, **call)
    assert (type(out), out.dtype) == (np.ndarray, dtype)
    assert_close(out, exact(*arrays, offset=offset)[0])


@by_cover
@pytest.mark.parametrize("storage", ["contiguous", "chunked", "compressed"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_files_in_many_chunks(folder, cover, storage, dtype):
    arrays = qkv(1, 3, 1500, 64, keys=2411, dtype=dtype)
    names = store(arrays, storage)
    call = {"mask": cqsa.causal(-20), "device": "cuda", "out": "out.h5", "options": Options(cover=cover)}
    memory = least_bytes(*names, **call)
    out = cqsa.attention(*names, memory=memory, **call)
    expected, lse = exact(*arrays, offset=-20)
    assert_close(out[...], expected)
    with h5py.File("out.h5") as file:
        assert_lse_close(file["lse"][...], lse)
    assert cqsa.verify("out.h5").passed
    assert sorted(os.listdir()) == ["in.h5", "out.h5"]


@by_cover
@pytest.mark.parametrize("layout", ["bnhd", "nhd", "nd"])
def test_layouts_with_tokens_outside_heads(cover, layout):
    heads = 1 if layout == "nd" else 3
    arrays = qkv(1, heads, 1500, 40, dtype="f2")
    given = [np.ascontiguousarray(array[0].swapaxes(0, 1)) for array in arrays]
    shape = {"bnhd": (1, 1500, 3, 40), "nhd": (1500, 3, 40), "nd": (1500, 40)}[layout]
    given = [array.reshape(shape) for array in given]
    call = {"causal": True, "layout": layout, "device": "cuda", "options": Options(cover=cover)}
    out = cqsa.attention(*given, memory=least_bytes(*given, **call), **call)
    assert_close(out, exact(*arrays, offset=0)[0][0].swapaxes(0, 1).reshape(shape))


@pytest.mark.parametrize("order", ["heads outside tokens", "tokens outside heads"])
@by_cover
def test_page_locked_arrays_are_copied_from_where_they_are(cover, order, monkeypatch):
    import cupyx

    arrays = qkv(2, 3, 1500, 40, keys=2411, dtype="f2")
    layout = "bhnd" if order == "heads outside tokens" else "bnhd"
    given = []
    for array in arrays:
        physical = array if layout == "bhnd" else array.swapaxes(1, 2)
        locked = cupyx.empty_pinned(physical.shape, physical.dtype)
        locked[...] = physical
        given.append(locked)
    monkeypatch.setattr("cqsa_arrays.engine.cuda.resident.at_work", None)
    call = {"causal": True, "layout": layout, "device": "cuda", "options": Options(cover=cover)}
    out = cqsa.attention(*given, memory=int(1.5 * least_bytes(*given, **call)), **call)
    assert_close(out if layout == "bhnd" else out.swapaxes(1, 2), exact(*arrays, offset=0)[0])


@pytest.mark.parametrize("chunks", [1, 3, 5, 16, 40])
def test_any_number_of_chunks(chunks):
    arrays = qkv(1, 2, 2000, 64, dtype="f8")
    out = cqsa.attention(*arrays, causal=True, device="cuda", options=Options(chunks=chunks))
    assert_close(out, exact(*arrays, offset=0)[0])


def test_dead_tasks_and_rows_without_keys():
    arrays = qkv(1, 2, 2000, 64, dtype="f4")
    for cover in ("cqs", "rectangular"):
        call = {"mask": cqsa.causal(-1500), "device": "cuda", "options": Options(cover=cover)}
        out = cqsa.attention(*arrays, memory=least_bytes(*arrays, **call), **call)
        assert not out[:, :, :1500].any()
        assert_close(out, exact(*arrays, offset=-1500)[0])


# ---- the same bits


@by_cover
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_bits_depend_neither_on_the_run_nor_on_reader_threads(cover, dtype, monkeypatch):
    operands = qkv(1, 4, 2500, 64, dtype=dtype)
    call = {"causal": True, "device": "cuda", "options": Options(cover=cover)}
    call["memory"] = int(1.2 * least_bytes(*operands, **call))
    runs = [cqsa.attention(*operands, **call) for _ in range(3)]
    for threads in (1, 2, 7):
        monkeypatch.setattr("cqsa_arrays.engine.cuda.resident.READER_THREADS", threads)
        runs.append(cqsa.attention(*operands, **call))
    assert all(np.array_equal(runs[0], run) for run in runs[1:])


def test_long_heads_begin_and_end_in_two_tiles(gpu):
    """Three heads, each a launch; with all on the device it is one launch for all of them."""
    import cupy

    arrays = qkv(1, 3, 1 << 17, 64, dtype="f2")
    call = {"causal": True, "device": "cuda", "memory": "1GiB"}
    assert cqsa.plan(*arrays, **call).chosen.edge_tiles == 2
    there = cqsa.attention(*map(cupy.asarray, arrays), causal=True).get()
    for _ in range(5):
        out = np.full_like(arrays[0], np.nan)
        cqsa.attention(*arrays, out=out, **call)
        assert np.array_equal(out[:, 1:], there[:, 1:])
        assert_close(out[:, :1], there[:, :1])  # its keys are two blocks


def test_a_thread_that_has_not_used_the_device(gpu):
    """It has no context there; compiled code needs one."""
    arrays = qkv(1, 2, 2000, 64, dtype="f2")
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(cqsa.attention, *arrays, device="cuda").result()
    assert_close(out, exact(*arrays)[0])


# ---- errors


ERRORS = [cqsa.StorageError("the disk is gone"), OSError(5, "gone"), KeyboardInterrupt()]


@by_cover
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["source", "map", "array", "file", "lse"])
def test_an_error_midway_is_raised_and_leaves_nothing(folder, cover, error, where, monkeypatch, tmp_path_factory):
    from cqsa_arrays.engine.cuda.crew import Crew
    from cqsa_arrays.engine.cuda.transfer import Transfers

    arrays = qkv(1, 3, 2000, 64, dtype="f2")
    if where == "map":
        elsewhere = tmp_path_factory.mktemp("maps")
        arrays = [as_map(elsewhere / f"{name}.raw", array) for name, array in zip("qkv", arrays, strict=True)]
    call = {"causal": True, "device": "cuda", "options": Options(cover=cover)}
    if where in ("file", "lse"):
        call["out"] = "out.h5"
    call["memory"] = least_bytes(*arrays, **call)
    expected = cqsa.attention(*arrays, **call)[...]
    for path in folder.iterdir():
        path.unlink()
    owner, name = {
        "source": (Crew, "send"),
        "map": (MemmapSource, "read"),
        "array": (Transfers, "receive"),
        "file": (OutputFile, "write_out"),
        "lse": (OutputFile, "write_lse"),
    }[where]
    midway = Midway(monkeypatch, owner, name, error)
    with pytest.raises(type(error)) as caught:
        cqsa.attention(*arrays, **call)
    assert caught.value is error
    assert midway.calls >= 5
    assert not ours_alive()
    assert os.listdir() == []
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert np.array_equal(cqsa.attention(*arrays, **call)[...], expected)


def test_an_error_in_the_first_read(folder, monkeypatch):
    from cqsa_arrays.engine.cuda.crew import Crew

    arrays = qkv(1, 1, 2000, 64, dtype="f2")
    Midway(monkeypatch, Crew, "send", cqsa.StorageError("gone"), at=1)
    with pytest.raises(cqsa.StorageError, match="gone"):
        cqsa.attention(*arrays, device="cuda", out="out.h5")
    assert os.listdir() == []


def test_what_cuda_reports_becomes_an_error_that_names_the_device(monkeypatch):
    import cupy
    from cupy_backends.cuda.api.driver import CUDADriverError

    from cqsa_arrays.kernels.cuda.kernel import CudaKernel

    arrays = qkv(1, 1, 500, 64, dtype="f2")
    cqsa.attention(*arrays, device="cuda")

    for error in (cupy.cuda.runtime.CUDARuntimeError(719), CUDADriverError(719)):
        Midway(monkeypatch, CudaKernel, "accumulate", error, at=1)
        with pytest.raises(cqsa.DeviceError, match=r"^cuda:0: "):
            cqsa.attention(*arrays, device="cuda")
        monkeypatch.undo()
    assert_close(cqsa.attention(*arrays, device="cuda"), exact(*arrays)[0])


# ---- what else a run is part of


def test_progress_reaches_all_pairs(monkeypatch):
    """The executor tells of every pair once, although it runs ahead of the device."""
    from cqsa_arrays.engine import executor
    from cqsa_arrays.job import Request, _output_results, prepared
    from cqsa_arrays.storage import Layout

    class Counter:
        pairs = 0

        def advance(self, pairs: int) -> None:
            self.pairs += pairs

        def close(self) -> None:
            """Nothing to do."""

    q, k, v = qkv(1, 3, 2000, 64, dtype="f2")
    for cover in ("cqs", "rectangular"):
        call = {"causal": True, "device": "cuda", "options": Options(cover=cover)}
        out, counter = np.empty(q.shape, "f2"), Counter()
        with prepared(Request(q=q, k=k, v=v, out=out, memory=least_bytes(q, k, v, **call), **call)) as job:
            sink = ArraySink(out, None, Layout("bhnd"))
            report = executor.run(job.plan, job.inputs, _output_results(job, sink, None), counter)
        assert counter.pairs == job.plan.problem.pairs
        assert report.input_read_bytes >= q.nbytes + k.nbytes + v.nbytes


def test_maps_and_bfloat16_bits_are_streamed(folder):
    arrays = qkv(1, 2, 1500, 64, dtype=ml_dtypes.bfloat16)
    maps = [as_map(f"{name}.raw", array) for name, array in zip("qkv", arrays, strict=True)]
    call = {"causal": True, "device": "cuda"}
    out = cqsa.attention(*maps, memory=least_bytes(*maps, **call), **call)
    assert_close(host(out), exact(*arrays, offset=0)[0])
