"""fork() while other threads compute: the child computes, too, and waits for no lock that somebody held before."""

import os
import subprocess
import sys
from pathlib import Path

import cqsa_arrays

BEGIN = """
import faulthandler, os, sys, threading, time
import numpy as np
import cqsa_arrays as cqsa

def in_child(work):
    '''The exit code of a copy of this process that does ``work``: 0 if that comes back, and is true.'''
    child = os.fork()
    if child == 0:
        code = 3
        try:
            faulthandler.dump_traceback_later(60, exit=True)
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]

def with_held(*locks):
    '''Another thread holds the locks from now on.'''
    held = threading.Event()
    def hold():
        for lock in locks:
            lock.__enter__()
        held.set()
        time.sleep(3600)
    threading.Thread(target=hold, daemon=True).start()
    assert held.wait(60)

x = np.random.default_rng(0).standard_normal((2, 300, 16)).astype("f4")
"""


def run(code: str, folder: Path) -> list[str]:
    """What the program ``code`` prints; it ends with ``os._exit``, because threads of it go on."""
    command = [
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        f"{BEGIN}{code}\nsys.stdout.flush()\nos._exit(0)",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(cqsa_arrays.__file__).parents[1])}
    found = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


CALLS = """
y = x.astype("f8")
expected, expected_64 = cqsa.attention(x, x, x), cqsa.attention(y, y, y, causal=True)

def right():
    return (cqsa.attention(x, x, x) == expected).all() and (cqsa.attention(y, y, y, causal=True) == expected_64).all()
"""

COMPUTING = """
def compute():
    while True:
        right()

for _ in range(2):
    threading.Thread(target=compute, daemon=True).start()
codes = set()
for number in range(25):
    codes.add(in_child(right))
    time.sleep(0.002 * (number % 7))
print(codes)
"""


def test_children_of_a_process_that_computes_compute(tmp_path) -> None:
    assert run(CALLS + COMPUTING, tmp_path) == ["{0}"]


FILES = """
import h5py
with h5py.File("in.h5", "w") as file:
    for name in "qkv":
        file[name] = x[None]
    file["c/k"] = 1
    for name in "qkv":
        file.create_dataset("chunked/" + name, data=x[None], chunks=(1, 1, 64, 16))
opened = cqsa.open("in.h5")
expected = cqsa.attention(opened.q, opened.k, opened.v)
cqsa.attention("in.h5:/q", "in.h5:/k", "in.h5:/v", out="out.h5")

def right():
    chunked = [f"in.h5:/chunked/{name}" for name in "qkv"]
    out = f"out {os.getpid()} {threading.get_ident()}.h5"
    written = cqsa.attention(*chunked, out=out, options=cqsa.Options(overwrite=True))
    return (
        (cqsa.attention(opened.q, opened.k, opened.v) == expected).all()
        and cqsa.verify("out.h5", rows=10).passed
        and cqsa.compare(written[...], expected).passed
    )

threading.Thread(target=lambda: [right() for _ in range(10**6)], daemon=True).start()
codes = set()
for number in range(12):
    codes.add(in_child(right))
    time.sleep(0.003 * (number % 7))
print(codes)
"""


def test_children_read_write_verify_and_compare_files(tmp_path) -> None:
    assert run(FILES, tmp_path) == ["{0}"]


HELD = """
import functools
from llvmlite.binding import ffi
from numba.core.compiler_lock import global_compiler_lock
from tqdm import tqdm

durable, progress = cqsa.Options(durable=True, cover="cqs", chunks=3), cqsa.Options(progress=True)
with_held(ffi.lib._lock, global_compiler_lock._lock, tqdm.get_lock())

def everything():
    written = cqsa.attention(x, x, x, out=f"job {os.getpid()}.h5", options=durable)[...]
    shown = cqsa.attention(x, x, x, options=progress)
    return right() and np.allclose(written, expected, atol=1e-6) and np.array_equal(shown, expected)

print(in_child(everything), everything())
"""


def test_no_lock_of_numba_llvm_or_tqdm_is_taken_by_a_call(tmp_path) -> None:
    """Once the kernels are loaded."""
    assert run(CALLS + HELD, tmp_path) == ["0 True"]


OURS = """
from cqsa_arrays.cover import CqsCover
from cqsa_arrays.engine import progress

bar = progress._bar_class()
locks = [bar.get_lock()] + [p.lock for p in vars(CqsCover).values() if hasattr(p, "lock")]  # of functools, in 3.11
with_held(*locks)
cqs, silent = cqsa.Options(cover="cqs", chunks=7), cqsa.Options(progress=True)
print(in_child(lambda: np.allclose(cqsa.attention(x, x, x, options=cqs), expected, atol=1e-6)))
print(in_child(lambda: right() and cqsa.attention(x, x, x, options=silent) is not None))
"""


def test_locks_of_ours_are_new_in_the_child_or_there_are_none(tmp_path) -> None:
    assert run(CALLS + OURS, tmp_path) == ["0", "0"]


READING = """
import h5py
from cqsa_arrays.storage.rawfile import RawFile
with h5py.File("in.h5", "w") as file:
    for name in "qkv":
        file[name] = x[None]
opened = cqsa.open("in.h5")
expected = cqsa.attention(opened.q, opened.k, opened.v)
raw = RawFile("in.h5", "in.h5")
with_held(raw._lock)
found = np.empty(8, "u1")
print(in_child(lambda: raw.read_into(found, 0) is None and bytes(found) == b"\\x89HDF\\r\\n\\x1a\\n"))
"""


def test_a_file_that_another_thread_reads_is_read_by_the_child(tmp_path) -> None:
    assert run(READING, tmp_path) == ["0"]


IMPORTING = """
import pathlib
from cqsa_arrays.forks import preload
pathlib.Path("tqdm.py").write_text("import time; time.sleep(1); value = 7")
sys.path.insert(0, os.getcwd())
threading.Thread(target=preload, args=("tqdm",)).start()
while "tqdm" not in sys.modules:
    time.sleep(0.001)
print(in_child(lambda: __import__("tqdm").value == 7))
"""


def test_a_process_forks_when_what_another_thread_imports_is_imported(tmp_path) -> None:
    """Of the packages that a call needs; else the child waits for ever for the rest of the module."""
    assert run(IMPORTING, tmp_path) == ["0"]


FIRST = """
expected = np.broadcast_to(x.mean(1, keepdims=True), x.shape)
y = np.zeros_like(x)

def work():
    return np.allclose(cqsa.attention(y, y, x), expected, atol=1e-6)

codes = []
for delay_s in (0.0, 0.01, 0.03):
    threading.Thread(target=work).start()
    time.sleep(delay_s)
    codes.append(in_child(work))
print(codes)
"""


def test_a_process_may_fork_while_another_thread_makes_the_first_call(tmp_path) -> None:
    assert run(FIRST, tmp_path) == ["[0, 0, 0]"]


LOADING = """
from cqsa_arrays import forks
begun, loaded = threading.Event(), []

@forks.once
def load(name):
    begun.set()
    time.sleep(1)
    loaded.append(name)
    return name

other = threading.Thread(target=load, args=("kernel",))
other.start()
begun.wait()
code = in_child(lambda: loaded == ["kernel"] and load("kernel") == "kernel" and load("another") == "another")
print(code, loaded)
"""


def test_a_process_forks_when_what_another_thread_loads_is_loaded(tmp_path) -> None:
    """Numba and LLVM have locks of their own, which would stay locked."""
    assert run(LOADING, tmp_path) == ["0 ['kernel']"]


POOL = """
import concurrent.futures, multiprocessing
expected = cqsa.attention(x, x, x)
threading.Thread(target=lambda: [cqsa.attention(x, x, x) for _ in range(10**6)], daemon=True).start()

def work(number):
    return bool((cqsa.attention(x, x, x) == expected).all())

with multiprocessing.get_context("fork").Pool(4) as pool:
    print(pool.map(work, range(12)) == [True] * 12)
with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
    print(list(pool.map(work, range(6))) == [True] * 6)
"""


def test_pools_of_processes_that_fork_compute(tmp_path) -> None:
    assert run(POOL, tmp_path) == ["True", "True"]
