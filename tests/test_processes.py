"""What people send between processes arrives as it was: by pickle, multiprocessing, joblib and distributed."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from pkgutil import walk_packages

import h5py
import numpy as np
import pytest

import cqsa_arrays as cqsa
from cqsa_arrays import Options, errors
from cqsa_arrays.cover.report import CoverError
from cqsa_arrays.demo.report import DemoReport, MemoryReport, SignalReport
from cqsa_arrays.durable.status import JobStatus, LaneStatus
from cqsa_arrays.engine import RunReport
from cqsa_arrays.masks import Full
from cqsa_arrays.partial import PartialReport, PlaceReport
from cqsa_arrays.plots import PlotError
from cqsa_arrays.ranges import Cut, Range
from cqsa_arrays.recomputation import PathComparison
from cqsa_arrays.storage import DiskArray, InputSpec, Layout, OpenedFile, dataset, describe

WAIT_S = 120.0
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


# ---- what is sent


def errors_of_all_kinds() -> list[errors.CqsaError]:
    """One of each class, the first with what a note and an attribute of one's own add."""
    noted = errors.ArgumentError("q", np.dtype("i4"), "one of float32, float64", "Convert it.")
    noted.add_note("in worker 3")
    noted.place = "row 7"  # type: ignore[attr-defined]
    return [
        noted,
        errors.ArgumentError("mask", lambda row: row, "cqsa.causal(...)", "Functions are no masks."),
        errors.BudgetError("needs 5.2 GiB, budget 4.0 GiB"),
        errors.CqsaError("any"),
        errors.DeviceError("cuda:0 fails"),
        errors.DeviceMemoryError("1 GiB left of 2", 1 << 30),
        errors.JobBusyError("lane 1 is computed by process 7"),
        errors.JobStopped("terminated"),
        errors.MissingArrayError("k", "no such data set", "one of q, v", "Name one that is there."),
        errors.StorageError("x.h5:/q: No space left on device"),
        CoverError("held twice", (3, 4)),
        CoverError("tasks are missing"),
        PlotError("no plot"),
    ]


def _report(seed: int | None = 7) -> cqsa.ErrorReport:
    found = cqsa.compare(np.ones((3, 4), "f4") * 1.5, np.ones((3, 4)), tolerance=cqsa.Tolerance(1e-3))
    return replace(found, seed=seed)


def things(folder: Path) -> dict[str, object]:
    """Every public object, by name."""
    opened = cqsa.open(folder / "in.h5")
    x = np.random.default_rng(0).standard_normal((2, 60, 8))
    signal = SignalReport(
        samples=9, sampling_hz=360.0, noisy_db=1.0, smoothed_db=2.0, smoothed_width=3, denoised_db=4.0, noise_mv=0.1,
        bandwidth_mv=0.2, window=31,
    )  # fmt: skip
    memory = MemoryReport(budget_bytes=1, planned_bytes=2, peak_bytes=None, score_matrix_bytes=4)
    inputs = [folder / f"in.h5:/{name}" for name in "qkv"]
    durable = Options(durable=True, lanes=2, overwrite=True)
    return {
        "options": Options(host_memory="2GiB", scratch=folder, threads=2),
        "causal": cqsa.causal(-3),
        "full": Full(),
        "range": Range(3, 9),
        "cut": Cut(100, 7, 16),
        "layout": Layout("bnhd"),
        "tolerance": cqsa.Tolerance(1e-3),
        "report": _report(),
        "comparison": PathComparison("cpu", Range(0, 3), _report(), _report(None)),
        "partial": PartialReport((PlaceReport(0, True, 0, Range(0, 3), 60, _report()),), 1),
        "status": JobStatus(
            "o.h5", "stopped", 9, 3, 99, None, None, 1.5, 2.5, "cpu", (LaneStatus(0, 3, 1.5, False, None, None, 2.0),)
        ),
        "run": RunReport(1.5, 2, 3, 4),
        "demo": DemoReport(
            signal=signal, memory=memory, error=_report(), elapsed_s=1.0, flops=2, plot=None, notice="no plot"
        ),
        "plan": cqsa.plan(x, x, x, memory="8MiB", causal=True),
        "plan of files": cqsa.plan(*inputs, memory="32MiB", out=folder / "out.h5", options=durable),
        "statistics": cqsa.statistics(x, x, x),
        "statistics of float32": cqsa.statistics(*(x.astype("f4"),) * 3),
        "opened file": opened,
        "disk array": opened.q,
        "chunked disk array": opened.k,
        "disk array of bfloat16": dataset(f"{folder}/in.h5:/bits"),
        "sliced disk array": sliced(cqsa.open(folder / "in.h5").q),
        "disk array of another layout": opened.q.in_layout(Layout("nhd")),
        "file info": describe(folder / "in.h5"),
        "input spec": InputSpec(tokens=100),
    }


def sliced(array: DiskArray) -> DiskArray:
    """The same, with its map made."""
    assert array[0, :2].shape == (2, 8)
    return array


def facts(thing: object) -> object:
    """All that can be seen of ``thing``, as what compares by ``==``."""
    if isinstance(thing, Exception):
        return type(thing), str(thing), repr(thing), sorted(vars(thing).items())
    if isinstance(thing, DiskArray):
        return repr(thing), thing.stored, thing[...].dtype.name, thing[...].tobytes()
    if isinstance(thing, OpenedFile):
        return thing.path, [facts(array) for array in (thing.q, thing.k, thing.v)]
    if isinstance(thing, cqsa.BlockStatistics):
        return [(array.dtype, array.shape, array.tobytes()) for array in (thing.acc, thing.m, thing.l)]
    return type(thing), thing, str(thing)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With in.h5: /q contiguous, /k compressed, /v, and /bits of bfloat16."""
    made = tmp_path_factory.mktemp("processes")
    x = np.random.default_rng(0).standard_normal((2, 60, 8)).astype("f4")
    with h5py.File(made / "in.h5", "w") as file:
        file["q"] = file["v"] = x
        file.create_dataset("k", data=x, chunks=(1, 20, 8), compression="gzip")
        file["bits"] = (x.view("u4") >> 16).astype("u2")
        file["bits"].attrs["dtype"] = "bfloat16"
    return made


def all_error_classes() -> set[type]:
    """Those that any module of the package defines, wherever it is."""
    for module in walk_packages(cqsa.__path__, "cqsa_arrays."):
        if "cuda" not in module.name and not module.name.endswith("__main__"):  # those want CuPy
            import_module(module.name)
    found, waiting = set(), [errors.CqsaError]
    while waiting:
        found.add(one := waiting.pop())
        waiting += one.__subclasses__()
    return {one for one in found if one.__module__.startswith("cqsa_arrays.")}


def test_no_class_of_errors_is_left_out():
    assert all_error_classes() == {type(error) for error in errors_of_all_kinds()}


def test_errors_that_are_public_are_all_of_them():
    public = {
        name for name in cqsa.__all__ if inspect.isclass(one := getattr(cqsa, name)) and issubclass(one, Exception)
    }
    assert public <= {one.__name__ for one in all_error_classes()}


# ---- within one process


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_unpickles_as_it_was(protocol, folder):
    for name, thing in {**things(folder), **dict(enumerate(errors_of_all_kinds()))}.items():
        again = pickle.loads(pickle.dumps(thing, protocol))
        assert facts(again) == facts(thing), name


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_everything_copies(copied, folder):
    for name, thing in {**things(folder), **dict(enumerate(errors_of_all_kinds()))}.items():
        assert facts(copied(thing)) == facts(thing), name


def test_an_error_says_what_it_said_and_has_its_parts():
    error = pickle.loads(pickle.dumps(errors.ArgumentError("q", "dtype int32", "a float", "Convert it.")))
    assert str(error) == "q: found dtype int32; expected a float. Convert it."
    assert (error.argument, error.found, error.expected, error.remedy) == ("q", "dtype int32", "a float", "Convert it.")
    assert pickle.loads(pickle.dumps(errors.DeviceMemoryError("1 GiB left", 1 << 30))).free_bytes == 1 << 30
    assert str(errors.DeviceMemoryError("1 GiB left", 1 << 30)) == "1 GiB left"


# ---- arrays on disk: a name, not the data


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("use", ["nothing", "slice", "all"])
def test_a_disk_array_pickles_as_some_hundred_bytes(name, use, tmp_path):
    x = np.random.default_rng(0).standard_normal((1, 50_000, 16)).astype("f4")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for one in "qkv":
            file.create_dataset(one, data=x, chunks=(1, 1000, 16) if one == "k" else None)
    array = getattr(cqsa.open(tmp_path / "x.h5"), name)
    if use != "nothing":
        assert np.array_equal(array[0, :2] if use == "slice" else array[...][0, :2], x[0, :2])
    text = pickle.dumps(array)
    assert len(text) < 1000
    again = pickle.loads(text)
    assert np.array_equal(again[0, 40_000:], x[0, 40_000:])
    assert len(pickle.dumps(again)) == len(text)


def test_a_disk_array_of_a_relative_path_is_found_from_another_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    array, expected = cqsa.open("in.h5").q, cqsa.open("in.h5").q[...]
    text = pickle.dumps(array)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(pickle.loads(text)[...], expected)
    assert np.array_equal(array[...], expected)


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("change", ["gone", "replaced"])
def test_a_disk_array_whose_file_is_gone_or_another_says_so(name, change, folder, tmp_path):
    path = tmp_path / "in.h5"
    path.write_bytes((folder / "in.h5").read_bytes())
    text = pickle.dumps(getattr(cqsa.open(path), name))
    path.unlink()
    if change == "replaced":
        path.write_bytes((folder / "in.h5").read_bytes() + b"and more")
    array = pickle.loads(text)
    with pytest.raises(cqsa.StorageError, match=rf"in\.h5:/{name}: .*(gone|changed) since it was opened"):
        array[0, :2]
    with pytest.raises(cqsa.StorageError, match=r"(gone|changed) since it was opened"):
        cqsa.attention(array, array, array)


# ---- between processes


def echo(sent: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """What arrived, and what can be seen of it there."""
    return sent, {name: facts(thing) for name, thing in sent.items()}


def fail(error: Exception) -> None:
    raise error


def mistaken() -> None:
    x = np.zeros((1, 10, 4), "i4")
    cqsa.attention(x, x, x)


def attend(q: DiskArray, k: DiskArray, v: DiskArray) -> np.ndarray:
    return np.asarray(cqsa.attention(q, k, v, causal=True))


Call = Callable[..., object]


@contextmanager
def _pool(method: str) -> Iterator[Call]:
    with get_context(method).Pool(1) as pool:
        yield lambda function, *arguments: pool.apply_async(function, arguments).get(WAIT_S)


@contextmanager
def _executor() -> Iterator[Call]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(WAIT_S)


@contextmanager
def _joblib() -> Iterator[Call]:
    joblib = pytest.importorskip("joblib")
    with joblib.Parallel(n_jobs=2, backend="loky", timeout=WAIT_S) as parallel:  # of one job it would run it here
        yield lambda function, *arguments: parallel([joblib.delayed(function)(*arguments)])[0]
    joblib.externals.loky.get_reusable_executor().shutdown(wait=True)


@contextmanager
def _distributed() -> Iterator[Call]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield lambda function, *arguments: client.submit(function, *arguments, pure=False).result(WAIT_S)


WAYS = {
    "spawn": lambda: _pool("spawn"),
    "forkserver": lambda: _pool("forkserver"),
    "executor": _executor,
    "joblib": _joblib,
    "distributed": _distributed,
}


@pytest.mark.parametrize("way", WAYS)
def test_everything_goes_to_another_process_and_back(way, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where distributed writes
    sent = things(folder) | {f"error {i}": error for i, error in enumerate(errors_of_all_kinds())}
    expected = {name: facts(thing) for name, thing in sent.items()}
    opened = cqsa.open(folder / "in.h5")
    with WAYS[way]() as call:
        returned, seen = call(echo, sent)
        assert seen == expected
        assert {name: facts(thing) for name, thing in returned.items()} == expected
        assert np.array_equal(call(attend, opened.q, opened.k, opened.v), attend(opened.q, opened.k, opened.v))
        # joblib starts its workers anew after each error.
        for error in errors_of_all_kinds()[: 1 if way == "joblib" else None]:
            with pytest.raises(errors.CqsaError) as caught:
                call(fail, error)
            assert (type(caught.value), str(caught.value)) == (type(error), str(error))
            for name, value in vars(error).items():
                assert getattr(caught.value, name) == value, name
        with pytest.raises(cqsa.ArgumentError, match=r"q: found dtype int32; expected .*q\.astype\('float32'\)"):
            call(mistaken)
