"""Fixtures of the tests of durability."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from durable_cases import KilledAtCommit, command, make, run, unbroken
from fault_cases import CASE

from cqsa_arrays.kernels.cpu.kernel import load


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """The processes of these tests are copies of this one: it has the kernels loaded."""
    for dtype in ("float32", "float64"):
        load(dtype)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    before = {name for name in os.listdir("/proc/self/fd") if _deleted(name)}  # of other tests
    yield tmp_path
    assert not {name for name in os.listdir("/proc/self/fd") if _deleted(name)} - before


@pytest.fixture
def begun(here: Path) -> str:
    """An unfinished job of ``CASE``, and the hash of what it should become."""
    make(CASE)
    expected = unbroken(CASE)
    assert run(command(CASE), KilledAtCommit(5)) == -signal.SIGKILL
    return expected


def _deleted(name: str) -> bool:
    try:
        return "out.h5" in os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        return False
