"""Compiling once: the first process says so, the next one loads from disk and says nothing."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import cqsa_arrays
from cqsa_arrays.kernels.cpu import kernel

CHILD = """
import json, logging, sys

class Keep(logging.Handler):
    def emit(self, record):
        messages.append([record.levelname, record.getMessage()])

messages = []
logging.getLogger("cqsa_arrays").addHandler(Keep())
logging.getLogger("cqsa_arrays").setLevel(logging.INFO)

from cqsa_arrays.kernels.cpu.attend import attend_group
from cqsa_arrays.kernels.cpu.kernel import load

before = dict(attend_group.overloads)
for dtype in sys.argv[1:]:
    load(dtype)
hits, misses = (sum(counter.values()) for counter in (attend_group.stats.cache_hits, attend_group.stats.cache_misses))
print(json.dumps({"imported": len(before), "hits": hits, "misses": misses, "messages": messages}))
"""


def start_child(cache, code, *arguments):
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(cache),
        "PYTHONPATH": str(Path(cqsa_arrays.__file__).parents[1]),
    }
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def run_child(cache, *dtypes):
    return json.loads(start_child(cache, CHILD, *dtypes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for what is compiled here: a kernel takes ten seconds."""
    return tmp_path_factory.mktemp("cache")


def test_the_first_process_compiles_and_says_so_the_second_loads(cache):
    first = run_child(cache, "float32")
    assert (first["imported"], first["hits"], first["misses"]) == (0, 0, 1)
    assert [level for level, _ in first["messages"]] == ["INFO"]
    assert "compiling the float32 kernel" in first["messages"][0][1]
    second = run_child(cache, "float32", "float32")
    assert second == {"imported": 0, "hits": 1, "misses": 0, "messages": []}


def test_import_compiles_nothing(tmp_path):
    assert run_child(tmp_path) == {"imported": 0, "hits": 0, "misses": 0, "messages": []}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


CALLS_WHILE_LOADING = """
import threading
import numpy as np
from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock
from cqsa_arrays.kernels.cpu.attend import attend_group
from cqsa_arrays.kernels.cpu.kernel import CpuKernel, load

x = np.ones((1, 2, 500, 8), "float32")
kernel = CpuKernel("float32", rows=500, head_dim=8, value_dim=8, threads=1)
other = threading.Thread(target=load, args=("float64",))
other.start()
while other.is_alive():
    state = BlockStatistics.empty((1, 2, 500), 8, "float32")
    kernel.accumulate(x, 0, [KeyBlock(0, x, x)], state, diagonal=0, scale=1.0, done=lambda part: None)
kernel.close()
assert len(attend_group.signatures) == 2, attend_group.signatures
"""


def test_a_kernel_runs_while_another_is_loaded(cache):
    start_child(cache, CALLS_WHILE_LOADING)


def test_code_is_never_loaded_by_the_main_thread(monkeypatch) -> None:
    """Else a signal that comes while llvmlite calls back through ctypes is lost, and the job goes on."""
    loaded_by = []

    class Dispatcher:
        def __init__(self) -> None:
            self.overloads = {}

        def compile(self, wanted) -> None:
            loaded_by.append(threading.current_thread())
            self.overloads[wanted.args] = SimpleNamespace(entry_point="loaded")

    monkeypatch.setattr(kernel, "attend_group", Dispatcher())
    assert [kernel.load("float32"), kernel.load("float32"), kernel.load("float64")] == ["loaded"] * 3
    assert len(loaded_by) == 2
    assert threading.main_thread() not in loaded_by
