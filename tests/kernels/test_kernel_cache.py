"""Compiling once: the first process says so, the next one loads from disk and says nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cqsa_arrays

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


def run_child(cache, *dtypes):
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(cache),
        "PYTHONPATH": str(Path(cqsa_arrays.__file__).parents[1]),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *dtypes], env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_the_first_process_compiles_and_says_so_the_second_loads(tmp_path):
    first = run_child(tmp_path, "float32")
    assert (first["imported"], first["hits"], first["misses"]) == (0, 0, 1)
    assert [level for level, _ in first["messages"]] == ["INFO"]
    assert "compiling the float32 kernel" in first["messages"][0][1]
    second = run_child(tmp_path, "float32", "float32")
    assert second == {"imported": 0, "hits": 1, "misses": 0, "messages": []}
    other = run_child(tmp_path, "float32", "float64")
    assert (other["hits"], other["misses"]) == (1, 1)
    assert ["float64" in message for _, message in other["messages"]] == [True]


def test_import_compiles_nothing(tmp_path):
    assert run_child(tmp_path) == {"imported": 0, "hits": 0, "misses": 0, "messages": []}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
