"""Fixtures of the tests that run on a GPU: without CuPy or a GPU they are skipped, and say why."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from our_threads import ours_alive

from cqsa_arrays.devices import OLDEST, Gpu, gpus


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The GPU that computes; skips where there is none."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no CUDA device: {error}")
    found = [one for one in gpus()[:1] if one.capability >= OLDEST]
    if not found:
        pytest.skip("no CUDA device: none of compute capability 8.0 or newer")
    return found[0]


@pytest.fixture(params=["numpy", "cupy"])
def xp(request):
    """The module whose arrays go in: NumPy's are computed on the CPU, CuPy's on the GPU."""
    if request.param == "numpy":
        return np
    request.getfixturevalue("gpu")
    import cupy

    return cupy


@pytest.fixture
def no_thread_is_left():
    """This library's threads have ended when the test has."""
    yield
    assert not ours_alive()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
