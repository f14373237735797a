"""Which device computes, and what is said where that cannot be; without a GPU, with a CuPy that is made up."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
import types
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import cqsa_arrays as cqsa
from cqsa_arrays import arguments, devices
from cqsa_arrays.devices import Gpu, gpus, resolve_device
from cqsa_arrays.gpu_models import DEFAULT_MODEL, MODELS


class CUDARuntimeError(RuntimeError):
    pass


def made_up(monkeypatch, *capabilities: tuple[int, int], error: Exception | None = None) -> None:
    """A module cupy that sees GPUs of these compute capabilities, or raises when asked for them."""

    def count() -> int:
        if error is not None:
            raise error
        return len(capabilities)

    def properties(index: int) -> dict[str, object]:
        major, minor = capabilities[index]
        return {"name": b"made up", "totalGlobalMem": 80 << 30, "major": major, "minor": minor}

    monkeypatch.setattr(devices, "_describe", lru_cache(devices._describe.__wrapped__))  # what it knows of real ones
    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, getDeviceCount=count, getDeviceProperties=properties
    )
    cupy.cuda = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)


def without_cupy(monkeypatch) -> None:
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cupy" else usual(name, *rest))


@pytest.mark.parametrize(
    "device", ["gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "", None, 0, b"cpu"], ids=repr
)
def test_other_names_are_refused(device, monkeypatch):
    made_up(monkeypatch, (9, 0))
    with pytest.raises(
        cqsa.ArgumentError, match=r"^device: found .*; expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'"
    ):
        resolve_device(device, set())


def test_each_name_finds_its_device(monkeypatch):
    made_up(monkeypatch, (9, 0), (8, 0))
    first, second = gpus()
    assert first == Gpu(0, "made up", 80 << 30, (9, 0))
    assert (first.name, second.name) == ("cuda:0", "cuda:1")
    found = {name: resolve_device(name, set()) for name in ("auto", "cpu", "cuda", "cuda:0", "cuda:1")}
    assert found == {"auto": first, "cpu": None, "cuda": first, "cuda:0": first, "cuda:1": second}


def test_arrays_on_a_gpu_decide(monkeypatch):
    made_up(monkeypatch, (9, 0), (8, 0))
    for device in ("auto", "cuda", "cuda:1"):
        assert resolve_device(device, {1}) == gpus()[1]
    for device in ("cpu", "cuda:0"):
        with pytest.raises(
            cqsa.ArgumentError, match=f"device: found '{device}' with arrays on cuda:1; expected 'cuda:1'"
        ):
            resolve_device(device, {1})
    with pytest.raises(cqsa.ArgumentError, match=r"q, k, v, out: found arrays on cuda:0, cuda:1; expected .* one GPU"):
        resolve_device("auto", {0, 1})


def test_without_cupy_the_cpu_computes_and_a_gpu_is_refused_with_a_remedy(monkeypatch):
    without_cupy(monkeypatch)
    assert gpus() == []
    assert resolve_device("auto", set()) is None
    assert resolve_device("cpu", set()) is None
    for device in ("cuda", "cuda:3"):
        with pytest.raises(cqsa.ArgumentError, match=r"without CuPy; .*pip install cupy-cuda13x.*device='cpu'"):
            resolve_device(device, set())
    x = np.ones((1, 1, 9, 4), "f4")
    with pytest.raises(cqsa.ArgumentError, match="without CuPy"):
        cqsa.attention(x, x, x, device="cuda")
    assert cqsa.plan(x, x, x).device == "cpu"


def test_without_a_gpu_the_cpu_computes_and_the_reason_is_said(monkeypatch):
    made_up(monkeypatch, error=CUDARuntimeError("no driver"))
    assert gpus() == []
    assert resolve_device("auto", set()) is None
    with pytest.raises(cqsa.DeviceError, match=r"cuda:0 was asked for, .* no GPU: no driver\. Pass device='cpu'"):
        resolve_device("cuda", set())
    made_up(monkeypatch)
    with pytest.raises(cqsa.DeviceError, match=r"there is none\. Pass device='cpu'"):
        resolve_device("cuda", set())


def test_a_gpu_that_is_not_there(monkeypatch):
    made_up(monkeypatch, (9, 0), (8, 0))
    with pytest.raises(cqsa.ArgumentError, match="found cuda:2; expected one of cuda:0, cuda:1"):
        resolve_device("cuda:2", set())


def test_a_gpu_that_is_too_old(monkeypatch):
    made_up(monkeypatch, (7, 5))
    assert resolve_device("auto", set()) is None
    with pytest.raises(cqsa.ArgumentError, match=r"compute capability 7\.5; expected 8\.0 or newer\. .*'cpu'"):
        resolve_device("cuda", set())


def test_a_cupy_that_cannot_be_imported(monkeypatch, tmp_path):
    """As where libraries of CUDA are missing: the CPU computes, and a GPU is refused with an error of ours."""
    (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc.so is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    assert gpus() == []
    assert resolve_device("auto", set()) is None
    with pytest.raises(cqsa.CqsaError, match=r"libnvrtc\.so is missing"):
        resolve_device("cuda", set())


def test_the_oldest_that_kernels_take_is_the_oldest_that_is_chosen():
    from cqsa_arrays.kernels.cuda import variants

    assert devices.OLDEST == variants.OLDEST


def test_the_host_of_a_gpu_has_half_of_its_memory_unless_it_is_said(monkeypatch):
    """Also where ``memory`` is given: states that wait on the host must fit there."""
    gpu = Gpu(0, "made up", 80 << 30, (9, 0))
    monkeypatch.setattr(arguments, "machine_bytes", lambda: 100)
    for memory, host_memory, expected in ((None, None, 50), ("1GiB", None, 50), ("1GiB", 7, 7), (None, 7, 7)):
        budget = arguments.resolve_budget(memory, cqsa.Options(host_memory=host_memory), None, gpu)
        assert budget.host_bytes == expected
        assert budget.memory_bytes == (40 << 30 if memory is None else 1 << 30)
    assert arguments.resolve_budget("1GiB", cqsa.Options(), None, None).host_bytes is None


# ---- models that are not here


def planned(device: str, **arguments: object) -> cqsa.Plan:
    x = np.ones((1, 8, 4096, 64), "float16")
    return cqsa.plan(x, x, x, device=device, **arguments)


@pytest.mark.parametrize("device", ["cuda:h200", "cuda:H200", "cuda:NVIDIA H200"])
def test_a_plan_for_a_model_that_is_not_here(device, monkeypatch):
    without_cupy(monkeypatch)
    plan = planned(device)
    assert plan.device == "cuda:h200"
    assert plan.budget.memory_bytes == MODELS["h200"].total_bytes // 2
    assert plan.kernel.startswith("hopper.cu")
    assert "model        NVIDIA H200, 139.8 GiB, not a GPU of this machine" in str(plan)
    assert planned(device, memory="1GiB").budget.memory_bytes == 1 << 30


def test_it_is_the_plan_of_that_gpu(monkeypatch):
    """But for its name: the same chunks, memory and price as where such a GPU is."""
    without_cupy(monkeypatch)
    here = planned("cuda:h100", memory="64MiB", options=cqsa.Options(host_memory="4GiB"))
    monkeypatch.undo()
    gpu = Gpu(0, "NVIDIA H100 80GB HBM3", MODELS["h100"].total_bytes, (9, 0))
    monkeypatch.setattr(arguments, "resolve_device", lambda *_: gpu)
    monkeypatch.setattr(arguments, "planned_device", lambda *_: gpu)
    there = planned("cuda", memory="64MiB", options=cqsa.Options(host_memory="4GiB"))
    assert (there.device, there.chosen, there.kernel) == ("cuda:0", here.chosen, here.kernel)


@pytest.mark.parametrize("key", MODELS)
def test_every_model_can_be_planned_for(key, monkeypatch):
    without_cupy(monkeypatch)
    plan = planned(f"cuda:{key}")
    assert (plan.device, bool(plan.kernel)) == (f"cuda:{key}", True)
    assert MODELS[key].title in str(plan)
    assert MODELS[key].capability >= devices.OLDEST


def test_a_gpu_where_none_is_is_a_model_that_is_named(monkeypatch):
    without_cupy(monkeypatch)
    for device in ("cuda", "cuda:0"):
        assert planned(device).device == f"cuda:{DEFAULT_MODEL}"


def test_a_gpu_that_is_here_is_planned_for(monkeypatch):
    made_up(monkeypatch, (9, 0))
    assert devices.planned_device("cuda", set()) == gpus()[0]
    with pytest.raises(cqsa.ArgumentError, match="found cuda:2; expected one of cuda:0"):
        devices.planned_device("cuda:2", set())


def test_an_unknown_model_is_refused_with_those_that_are_known(monkeypatch):
    without_cupy(monkeypatch)
    with pytest.raises(cqsa.ArgumentError, match=r"^device: found 'cuda:k80'; expected .*cuda:a100, .*cuda:h200"):
        planned("cuda:k80")


def test_nothing_is_computed_on_a_model(monkeypatch):
    without_cupy(monkeypatch)
    x = np.ones((1, 1, 9, 4), "f4")
    for call in (cqsa.attention, cqsa.statistics):
        with pytest.raises(cqsa.ArgumentError, match=r"^device: found 'cuda:h200'; .* can only be planned for"):
            call(x, x, x, device="cuda:h200")


def test_hints_name_packages_that_pip_finds():
    """Those of the extras, whose own names are of this package, which may not be on an index."""
    text = (Path(__file__).parents[1] / "setup.py").read_text()
    extras = dict(re.findall(r'"(cuda1\d)": \["([\w-]+)', text))
    assert set(devices.CUPY_WHEELS) == set(extras.values())
    assert 'PLOT = ["matplotlib>=' in text
    package = Path(devices.__file__).parent
    hints = re.findall(r"pip install ([^\s(]+)", "".join(path.read_text() for path in package.rglob("*.py")))
    assert set(hints) <= {"{CUPY_WHEELS[0]}", "matplotlib", 'matplotlib")', "hdf5plugin;"}
