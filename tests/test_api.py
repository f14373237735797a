"""The public functions: every kind of array in, the same kind out, and the same numbers whatever the plan."""

from __future__ import annotations

import errno
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import h5py
import ml_dtypes
import numpy as np
import pytest

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.engine.states import FileStates, scratch_file
from cqsa_arrays.planner import Group
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import DiskArray, InputSpec, make_inputs

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Largest error of one element, about twice what rounding the exact result to the type makes of values up to 4.
ATOL = {np.dtype("f2"): 2e-3, BFLOAT16: 2e-2, np.dtype("f4"): 3e-6, np.dtype("f8"): 1e-14}
DTYPES = [pytest.param(dtype, id=dtype.name) for dtype in ATOL]
SHAPES = {
    "bhnd": (2, 3, 150, 24), "bnhd": (2, 150, 3, 24), "hnd": (3, 150, 24), "nhd": (150, 3, 24), "nd": (150, 24),
}  # fmt: skip


def normal(shape: tuple[int, ...], dtype: object = "f4", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(shape: tuple[int, ...], dtype: object = "f4") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v = (normal(shape, dtype, seed) for seed in (1, 2, 3))
    return q, k, v


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, layout: str, *, offset: int | None = None, scale=None):
    """Output and log-sum-exp by the formula, in float64, all scores at once; both in (batch, heads, tokens, ...)."""
    q, k, v = (np.einsum(f"{layout}->{''.join(sorted(layout, key='bhnd'.index))}", a.astype("f8")) for a in (q, k, v))
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ np.swapaxes(k, -1, -2))
    if offset is not None:
        seen = np.arange(k.shape[-2]) <= np.arange(q.shape[-2])[:, None] + offset
        scores = np.where(seen, scores, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.logaddexp.reduce(scores, axis=-1)
        weights = np.exp(scores - np.where(np.isinf(lse), 0, lse)[..., None])
    return weights @ v, lse


def in_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """What ``exact`` gives, in ``layout``."""
    return np.einsum(f"{''.join(sorted(layout, key='bhnd'.index))}->{layout}", array)


def assert_close(found: np.ndarray, expected: np.ndarray, dtype: np.dtype) -> None:
    error = np.abs(found.astype("f8") - expected)
    assert (error <= ATOL[dtype]).all(), error.max()


# ---- exactness


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("offset", [None, 0, 40, -40])
def test_equals_the_formula(dtype, layout, offset):
    q, k, v = qkv(SHAPES[layout], dtype)
    mask = None if offset is None else cqsa.causal(offset)
    out = cqsa.attention(q, k, v, mask=mask, layout=layout)
    assert (type(out), out.shape, out.dtype) == (np.ndarray, q.shape, dtype)
    assert_close(out, in_layout(exact(q, k, v, layout, offset=offset)[0], layout), dtype)


def test_causal_is_the_mask_without_offset():
    q, k, v = qkv((2, 150, 24))
    assert np.array_equal(cqsa.attention(q, k, v, causal=True), cqsa.attention(q, k, v, mask=cqsa.causal()))


@pytest.mark.parametrize(("keys", "value_dim"), [(1, 24), (500, 24), (37, 5), (500, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_with_other_values(keys, value_dim, causal):
    q, k, v = normal((2, 150, 24)), normal((2, keys, 24), seed=1), normal((2, keys, value_dim), seed=2)
    mask = cqsa.causal(keys - 150) if causal else None
    expected, _ = exact(q, k, v, "hnd", offset=keys - 150 if causal else None)
    assert_close(cqsa.attention(q, k, v, mask=mask), expected, q.dtype)


def test_rows_that_see_no_key_are_zero_and_nan_reaches_the_rows_that_see_it():
    q, k, v = qkv((1, 150, 24))
    assert not cqsa.attention(q, k, v, mask=cqsa.causal(-50))[0, :50].any()
    k[0, 100] = np.nan
    found = np.isnan(cqsa.attention(q, k, v, causal=True)).any(axis=-1)[0]
    assert np.array_equal(found, np.arange(150) >= 100)


@pytest.mark.parametrize("scale", [0, -0.5, 1.0, np.float32(0.25)])
def test_scale(scale):
    q, k, v = qkv((2, 150, 24))
    assert_close(cqsa.attention(q, k, v, scale=scale), exact(q, k, v, "hnd", scale=float(scale))[0], q.dtype)


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_the_output(dtype, wanted):
    q, k, v = qkv((2, 150, 24), dtype)
    out = cqsa.attention(q, k, v, dtype=wanted.name)
    assert out.dtype == wanted
    assert np.array_equal(cqsa.attention(q, k, v, dtype=wanted), out)
    assert_close(out, exact(q, k, v, "hnd")[0], max(dtype, wanted, key=ATOL.get))


# ---- kinds of arrays


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stored(folder):
    """q, k and v of 150 tokens, and the file in.h5 that holds them, k chunked."""
    arrays = qkv((2, 150, 24))
    with h5py.File("in.h5", "w") as file:
        for name, array in zip("qkv", arrays, strict=True):
            file.create_dataset(name, data=array, chunks=(1, 40, 24) if name == "k" else None)
    return arrays


class ByDlpack:
    """An array that can do nothing but hand itself over."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class ByInterface:
    def __init__(self, array: np.ndarray) -> None:
        self._array, self.__array_interface__ = array, array.__array_interface__


def as_memmap(name: str, array: np.ndarray) -> np.memmap:
    made = np.memmap(f"{name}.raw", array.dtype, "w+", shape=array.shape)
    made[...] = array
    return made


OFFERS = {
    "np.memmap": as_memmap,
    "DLPack": lambda name, array: ByDlpack(array),
    "array interface": lambda name, array: ByInterface(array),
    "cqsa.open": lambda name, array: getattr(cqsa.open("in.h5"), name),
    "text": lambda name, array: f"in.h5:/{name}",
    "path": lambda name, array: Path(f"in.h5:/{name}"),
    "strided view": lambda name, array: np.repeat(array, 3, axis=1)[:, ::3],
    "Fortran order": lambda name, array: np.asfortranarray(array),
    "read-only": lambda name, array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
}


@pytest.mark.parametrize("offer", OFFERS)
def test_any_kind_of_array_comes_in(offer, stored):
    out = cqsa.attention(*map(OFFERS[offer], "qkv", stored), causal=True)
    assert type(out) is np.ndarray
    assert_close(out, exact(*stored, "hnd", offset=0)[0], np.dtype("f4"))


def test_h5py_datasets_come_in(stored):
    with h5py.File("in.h5") as file:
        out = cqsa.attention(file["q"], file["k"], file["v"])
    assert type(out) is np.ndarray
    assert_close(out, exact(*stored, "hnd")[0], np.dtype("f4"))


def test_kinds_mix(stored):
    q, k, v = stored
    out = cqsa.attention(ByDlpack(q), "in.h5:/k", as_memmap("v", v))
    assert_close(out, exact(q, k, v, "hnd")[0], np.dtype("f4"))


def test_arrays_go_back_to_the_library_that_they_came_from(monkeypatch):
    """A library whose arrays know DLPack and that takes arrays over by ``from_dlpack``."""
    library = ModuleType("arraylib")
    library.Array = type("Array", (ByDlpack,), {"__module__": "arraylib.arrays"})
    library.from_dlpack = lambda array: library.Array(np.from_dlpack(array))
    monkeypatch.setitem(sys.modules, "arraylib", library)
    q, k, v = qkv((2, 150, 24))
    out = cqsa.attention(library.Array(q), k, v)
    assert type(out) is library.Array
    assert_close(np.from_dlpack(out), exact(q, k, v, "hnd")[0], q.dtype)
    assert type(cqsa.attention(q, library.Array(k), v)) is np.ndarray


def test_torch_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(array) for array in qkv((2, 150, 24))]
    out = cqsa.attention(*tensors, causal=True)
    assert isinstance(out, torch.Tensor)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("offer", ["np.memmap", "DLPack", "array interface", "strided view", "Fortran order"])
def test_inputs_are_never_changed(offer, stored):
    offered = [OFFERS[offer](name, array) for name, array in zip("qkv", stored, strict=True)]
    before = [array.copy() for array in stored]
    cqsa.attention(*offered, causal=True, options=Options(chunks=7, cover="cqs"))
    for was, array, one in zip(before, stored, offered, strict=True):
        assert np.array_equal(was, array)
        assert not isinstance(one, np.ndarray) or np.array_equal(was, one)


# ---- where the result goes

OUTS = {
    "contiguous": lambda shape: np.full(shape, 7, "f4"),
    "every other": lambda shape: np.full((*shape[:2], 2 * shape[2]), 7, "f4")[..., ::2],
    "reversed": lambda shape: np.full(shape, 7, "f4")[:, ::-1],
    "Fortran order": lambda shape: np.full(shape, 7, "f4", order="F"),
    "wider": lambda shape: np.full(shape, 7, "f8"),
    "narrower": lambda shape: np.full(shape, 7, "f2"),
}


@pytest.mark.parametrize("cover", ["cqs", "rectangular"])
@pytest.mark.parametrize("make", OUTS)
def test_out_array_is_filled_and_handed_back(make, cover, folder):
    q, k, v = qkv((2, 500, 24))
    out = OUTS[make](q.shape)
    found = cqsa.attention(q, k, v, mask=cqsa.causal(-9), out=out, options=Options(cover=cover))
    assert found is out
    narrow = min(out.dtype, q.dtype, key=lambda dtype: dtype.itemsize)
    assert_close(out, exact(q, k, v, "hnd", offset=-9)[0], narrow)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
def test_out_file_holds_output_and_log_sum_exp(dtype, layout, folder):
    q, k, v = qkv(SHAPES[layout], dtype)
    out = cqsa.attention(q, k, v, mask=cqsa.causal(-20), layout=layout, out=Path("out.h5"))
    assert isinstance(out, DiskArray)
    assert (out.shape, out.dtype, out.layout.name) == (q.shape, dtype, layout)
    expected, lse = exact(q, k, v, layout, offset=-20)
    assert_close(out[...], in_layout(expected, layout), dtype)
    with h5py.File("out.h5") as file:
        found = file["lse"][...]
        assert sorted(file) == ["lse", "out"]
        assert json.loads(file.attrs["mask"]) == {"kind": "causal", "offset": -20}
    seen = ~np.isinf(lse)
    assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert np.array_equal(np.isinf(found), ~seen)
    assert np.allclose(found[seen], lse[seen], rtol=0, atol=1e-12 if dtype == np.float64 else 3e-6)
    assert os.listdir() == ["out.h5"]


def test_out_file_of_another_dtype_from_files_is_verified(stored):
    out = cqsa.attention(*(f"in.h5:/{name}" for name in "qkv"), out="out.h5", dtype="bfloat16", causal=True)
    assert out.dtype == BFLOAT16
    report = cqsa.verify("out.h5", rows=None)
    assert report.passed
    assert report.rows == 300


# ---- the same numbers whatever the plan


def big() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return qkv((2, 900, 24))


@pytest.mark.parametrize("cover", ["cqs", "rectangular"])
@pytest.mark.parametrize("out", [None, "out.h5"])
def test_bits_do_not_depend_on_threads_or_the_run(cover, out, folder):
    runs = [
        cqsa.attention(*big(), causal=True, out=out, options=Options(cover=cover, threads=threads, overwrite=True))[...]
        for threads in (1, 2, 3, 8, 1)
    ]
    assert all(np.array_equal(runs[0], run) for run in runs[1:])


@dataclass(frozen=True, slots=True)
class Way:
    """A forced plan; ``memory`` "least" is the smallest budget, which puts the states of CQS on the disk."""

    name: str
    cover: str
    chunks: int | None = None
    memory: str | None = None


WAYS = [
    Way("one task", "cqs", 1),
    Way("perfect 3", "cqs", 3),
    Way("perfect 7", "cqs", 7),
    Way("relaxed 5", "cqs", 5),
    Way("relaxed 16", "cqs", 16),
    Way("more chunks than tiles", "cqs", 40),
    Way("more chunks than tokens", "cqs", 1000),
    Way("perfect 7 on disk", "cqs", 7, "least"),
    Way("relaxed 5 on disk", "cqs", 5, "least"),
    Way("more chunks than tiles on disk", "cqs", 40, "least"),
    Way("rectangular", "rectangular"),
    Way("rectangular in tiles", "rectangular", None, "least"),
]


def least_bytes(**arguments: object) -> int:
    with pytest.raises(cqsa.BudgetError) as caught:
        cqsa.plan(**{**arguments, "memory": 1})
    return int(str(caught.value).partition("Pass memory=")[2].split()[0])


@pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
@pytest.mark.parametrize("offset", [None, 0, -300])
def test_every_way_gives_the_same_result(way, offset, stored):
    """Inputs are float64, so that 1e-14 tells a wrong weight from rounding."""
    q, k, v = (array.astype("f8") for array in big())
    with h5py.File("big.h5", "w") as file:
        file["q"], file["k"], file["v"] = q, k, v
    arguments = {
        **{name: f"big.h5:/{name}" for name in "qkv"},
        "mask": None if offset is None else cqsa.causal(offset),
        "out": "out.h5",
        "options": Options(cover=way.cover, chunks=way.chunks, threads=2),
    }
    memory = least_bytes(**arguments) if way.memory else None
    plan = cqsa.plan(**arguments, memory=memory)
    assert plan.cover_name == way.cover
    assert plan.chosen.states_on_disk == ("on disk" in way.name)
    assert way.chunks is None or plan.chosen.query_parts == way.chunks
    out = cqsa.attention(**arguments, memory=memory)
    assert_close(out[...], exact(q, k, v, "hnd", offset=offset)[0], q.dtype)
    assert sorted(os.listdir()) == ["big.h5", "in.h5", "out.h5"]  # and no scratch


def test_plan_is_what_attention_does(folder):
    q, k, v = big()
    plan = cqsa.plan(q, k, v, causal=True, out="out.h5", memory="16MiB")
    assert isinstance(plan, cqsa.Plan)
    assert os.listdir() == []
    cqsa.attention(q, k, v, causal=True, out="out.h5", memory="16MiB")
    with h5py.File("out.h5") as file:
        assert json.loads(file.attrs["plan"])["identity"] == plan.identity


def test_calls_from_several_threads_do_not_disturb_each_other(folder):
    q, k, v = big()
    calls = [
        partial(cqsa.attention, q, k, v, options=Options(cover="rectangular")),
        partial(cqsa.attention, q, k, v, causal=True, options=Options(cover="cqs", chunks=7)),
        partial(cqsa.attention, q.astype("f8"), k.astype("f8"), v.astype("f8")),
        partial(cqsa.attention, q, k, v, causal=True, out="out.h5", options=Options(overwrite=True)),
    ]
    alone = [call()[...].copy() for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in range(3):
            together = [future.result()[...] for future in [pool.submit(call) for call in calls]]
            assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


# ---- statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_merged_statistics_are_attention(dtype, layout):
    q, k, v = qkv(SHAPES[layout], dtype)
    axis = layout.index("n")
    parts = [
        cqsa.statistics(q, *(np.take(a, np.arange(s, e), axis) for a in (k, v)), layout=layout)
        for s, e in ((0, 1), (1, 60), (60, 150))
    ]
    merged = cqsa.merge(cqsa.merge(parts[2], parts[0]), parts[1])
    expected, lse = exact(q, k, v, layout)
    wide = np.dtype("f8") if dtype == np.float64 else np.dtype("f4")
    assert {a.dtype for a in (merged.acc, merged.m, merged.l)} == {wide}
    assert_close(merged.output(), expected, wide)
    assert_close(merged.lse(), lse, wide)


def test_statistics_take_masks_and_files(stored):
    found = cqsa.statistics("in.h5:/q", "in.h5:/k", "in.h5:/v", mask=cqsa.causal(-10), memory="16MiB")
    expected, lse = exact(*stored, "hnd", offset=-10)
    assert (found.acc.shape, found.m.shape) == ((2, 150, 24), (2, 150))
    assert_close(found.output(), expected, np.dtype("f4"))
    assert (found.lse()[:, :10] == -np.inf).all()
    assert_close(found.lse()[:, 10:], lse[:, 10:], np.dtype("f4"))


def test_statistics_that_do_not_fit_do_not_speak_of_out():
    long = np.broadcast_to(normal((1, 1, 8)), (1, 1 << 24, 8))
    with pytest.raises(cqsa.BudgetError) as caught:
        cqsa.statistics(long, long[:, :9], long[:, :9], memory="64MiB")
    assert "out=" not in str(caught.value)


# ---- states on the disk


@pytest.fixture
def states(tmp_path):
    """States of 2 heads, 300 rows in 3 chunks, and what is written to each."""
    made = FileStates(scratch_file(str(tmp_path), 300, 2 * 6 * 4), 100, heads=2, value_dim=4, dtype="f4")
    made.begin(Group(Range(0, 1), Range(0, 2)))
    assert os.listdir(tmp_path) == []  # it has no name
    yield made
    made.close()


def fill(states: FileStates, rows: Range, number: float) -> None:
    state = states.load(rows)
    for part in (state.acc, state.m, state.l):
        part[...] = number
    states.store(rows, state)


def holds(states: FileStates, rows: Range, number: float) -> bool:
    state = states.load(rows)
    return all((part == number).all() for part in (state.acc, state.m, state.l))


def test_file_states_are_empty_at_first_and_for_each_group(states):
    for group in range(2):
        for rows in Range(0, 300).split(100):
            state = states.load(rows)
            assert (state.m == -np.inf).all() and (state.l == 0).all()  # noqa: PT018
            fill(states, rows, rows.start + 1.0)
        assert all(holds(states, rows, rows.start + 1.0) for rows in Range(0, 300).split(100))
        states.begin(Group(Range(0, 1), Range(0, 2), index=group + 1))
    assert states.moved_bytes == 2 * 3 * 2 * (100 * 2 * 6 * 4)  # groups, chunks, one store and one load


@pytest.mark.parametrize("versions", [1, 2, 3])
def test_the_old_version_survives_until_the_new_one_is_written(states, versions, monkeypatch):
    first, second, third = Range(0, 300).split(100)
    for version in range(versions):
        for rows in (first, second, third):
            fill(states, rows, rows.start + version)
    write, calls = os.pwrite, []

    def dies(descriptor: int, data: memoryview, position: int) -> int:
        """Half of the state is written over, then the disk is gone."""
        calls.append(position)
        if len(calls) == 2:
            raise OSError(errno.EIO, "gone")
        return write(descriptor, data[: len(data) // 2], position)

    monkeypatch.setattr(os, "pwrite", dies)
    with pytest.raises(cqsa.StorageError, match=r"scratch: .*gone"):
        fill(states, second, -1.0)
    monkeypatch.undo()
    assert all(holds(states, rows, rows.start + versions - 1) for rows in (first, second, third))
    fill(states, second, -2.0)
    assert holds(states, second, -2.0)
    assert holds(states, first, versions - 1)


def test_short_transfers_of_states_are_completed(states, monkeypatch):
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read(fd, [buffers[0][:1000]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:1000], at))
    for rows in Range(0, 300).split(100):
        fill(states, rows, rows.start + 5.0)
    assert all(holds(states, rows, rows.start + 5.0) for rows in Range(0, 300).split(100))


# ---- opening, comparing, verifying


def test_open_gives_arrays_that_slice_and_know_their_layout(folder):
    make_inputs("in.h5", InputSpec(tokens=150, heads=2, head_dim=24, layout="nhd"))
    opened = cqsa.open("in.h5")
    with h5py.File("in.h5") as file:
        assert np.array_equal(opened.k[10:20], file["k"][10:20])
        arrays = [file[name][...] for name in "qkv"]
    assert [a.layout.name for a in (opened.q, opened.k, opened.v)] == ["nhd"] * 3
    assert cqsa.open("in.h5", layout="hnd").q.layout.name == "hnd"
    found = cqsa.attention(opened.q, opened.k, opened.v)
    assert_close(found, in_layout(exact(*arrays, "nhd")[0], "nhd"), np.dtype("f4"))


def test_compare_after_everything_else_was_used(stored):
    """The function, not the module that it lives in."""
    out = cqsa.attention(*stored)
    expected = exact(*stored, "hnd")[0]
    assert cqsa.compare(out, expected).passed
    out[1, 7, 3] += 0.01
    report = cqsa.compare(out, expected)
    assert not report.passed
    assert report.worst_element.index == (1, 7, 3)


def test_verify_finds_what_changed(stored):
    cqsa.attention(*(f"in.h5:/{name}" for name in "qkv"), out="out.h5")
    assert cqsa.verify("out.h5", rows=5, seed=1).passed
    assert not cqsa.verify("out.h5", tolerance=1e-12).passed
    with h5py.File("out.h5", "r+") as file:
        file["out"][1, 149, 3] += 0.01
    assert not cqsa.verify("out.h5", rows=5).passed


def test_verify_says_that_inputs_were_in_memory(stored):
    cqsa.attention(*stored, out="out.h5")
    with pytest.raises(cqsa.ArgumentError, match=r"q was an array in memory; expected inputs in files\. Compare"):
        cqsa.verify("out.h5")
