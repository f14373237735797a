"""What Numba compiles is kept on disk if that can be; whatever is wrong there, it is compiled in memory."""

import importlib.util
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

import cqsa_arrays
from cqsa_arrays import codefiles, compiled
from cqsa_arrays.compiled import entry_point
from cqsa_arrays.engine.cuda import native
from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.forks import once
from cqsa_arrays.kernels.cpu.attend import attend_group
from cqsa_arrays.units import parse_bytes

TINY = """
import numba as nb
from cqsa_arrays.compiled import kept_on_disk

@kept_on_disk
@nb.njit
def twice(x):
    return 2 * x
"""
WHOLE, REAL = numba.int64(numba.int64), numba.float64(numba.float64)


class Process:
    """What a new process would have: the function as nobody has called it yet; ``folder`` has the module and cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache" / "cqsa_arrays"
        self.module = folder / "package" / "tiny.py"
        self.module.parent.mkdir(exist_ok=True)
        self.module.write_text(TINY)

    def call(self, signature=WHOLE, argument=21):
        """The function's answer, and whether it came from disk."""
        spec = importlib.util.spec_from_file_location("tiny", self.module)
        tiny = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tiny)
        answer = entry_point(tiny.twice, signature, "tiny kernel")(argument)
        return answer, bool(tiny.twice.stats.cache_hits)


@pytest.fixture
def process(tmp_path, monkeypatch, caplog) -> Process:
    caplog.set_level(logging.INFO, "cqsa_arrays")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    codefiles._warn.cache_clear()
    return Process(tmp_path)


def test_the_second_process_loads_what_the_first_compiled(process, caplog) -> None:
    assert process.call() == (42, False)
    assert caplog.messages == ["compiling the tiny kernel for this processor (once; later runs load it from disk)"]
    assert process.call() == (42, True)
    assert len(caplog.messages) == 1
    (kept,) = process.cache.iterdir()
    assert kept.name.startswith("tiny.twice-")


def test_each_signature_is_kept_for_itself(process) -> None:
    assert process.call() == (42, False)
    assert process.call(REAL, 1.25) == (2.5, False)
    assert process.call() == (42, True)
    assert process.call(REAL, 1.25) == (2.5, True)


def test_a_slow_disk_is_no_compilation(process, caplog, monkeypatch) -> None:
    """On a busy machine loading takes longer than any time that could be named."""
    process.call()
    caplog.clear()
    load = codefiles.CodeFile.load
    monkeypatch.setattr(codefiles.CodeFile, "load", lambda self: (time.sleep(1), load(self))[1])
    assert process.call() == (42, True)
    assert caplog.messages == []


@pytest.mark.parametrize("damage", [lambda code: b"", lambda code: code[: len(code) // 2], lambda code: b"x" * 5000])
def test_what_is_damaged_is_compiled_again_and_replaced(damage, process, caplog) -> None:
    process.call()
    (kept,) = process.cache.iterdir()
    code = kept.read_bytes()
    kept.write_bytes(damage(code))
    assert process.call() == (42, False)
    assert process.call() == (42, True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert list(process.cache.iterdir()) == [kept]


def test_code_of_another_version_or_source_is_replaced(process, monkeypatch) -> None:
    process.call()
    with monkeypatch.context() as later:
        later.setattr(numba, "__version__", "99.0")
        assert process.call() == (42, False)
        assert process.call() == (42, True)
    assert process.call() == (42, False)
    process.module.with_name("other.py").write_text("# the function may be compiled from it")
    assert process.call() == (42, False)
    assert process.call() == (42, True)
    assert len(list(process.cache.iterdir())) == 1


def test_a_source_that_cannot_be_read_hinders_nothing(process) -> None:
    """As the file that Emacs leaves beside one that is being changed."""
    process.module.with_name(".#tiny.py").symlink_to("somebody@somewhere")
    assert process.call() == (42, False)
    assert process.call() == (42, True)


@pytest.mark.parametrize("named", [True, False])
def test_where_nothing_can_be_written_it_is_compiled_in_memory(named, process, monkeypatch, caplog) -> None:
    """NUMBA_CACHE_DIR is a file, or a package is read-only and there is no home."""
    if not named:
        monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    for folder in (process.folder / "cache", process.module.parent / "__pycache__", process.folder / "home"):
        folder.touch()
    assert process.call() == (42, False)
    assert process.call(REAL, 1.25) == (2.5, False)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]
    assert "NUMBA_CACHE_DIR" in warnings[0]


def test_without_a_named_place_it_is_kept_in_the_package_or_the_home(process, monkeypatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    process.call()
    (kept,) = (process.module.parent / "__pycache__").glob("tiny.twice*")
    kept.unlink()
    (process.module.parent / "__pycache__").rename(process.folder / "elsewhere")
    (process.module.parent / "__pycache__").touch()
    assert process.call() == (42, False)
    assert len(list((process.folder / "home").rglob("tiny.twice*"))) == 1
    assert process.call() == (42, True)


def test_no_function_is_left_to_the_cache_of_numba() -> None:
    """Which raises where it cannot be written, when the module is imported."""
    for function in (attend_group, native.send, native.serve, native.post, native.receive):
        assert isinstance(function._cache, compiled._CodeOnDisk)


COLD = """
import os
import numba
import tiny
from cqsa_arrays.compiled import entry_point

def work(number):
    for kind in (numba.int64, numba.float64)[:: 1 - number % 2 * 2]:
        assert entry_point(tiny.twice, kind(kind), "tiny")(21) == 42

numba.njit(lambda x: x)(1)  # what Numba does once is done
children = []
for number in range(8):
    children.append(os.fork())
    if children[-1] == 0:
        failed = True
        try:
            work(number)
            failed = False
        finally:
            os._exit(failed)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
work(0)
assert not tiny.twice.stats.cache_misses, tiny.twice.stats
"""


def run_child(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    everything = {**os.environ, "PYTHONPATH": str(Path(cqsa_arrays.__file__).parents[1]), **environment}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    return subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, timeout=120, check=False)


def test_processes_that_begin_at_the_same_time_share_an_empty_cache(process) -> None:
    found = run_child(COLD, process.module.parent, NUMBA_CACHE_DIR=str(process.folder / "cache"))
    assert found.returncode == 0, found.stderr
    assert len(list(process.cache.iterdir())) == 2


def test_an_answer_is_asked_for_once_and_an_error_again() -> None:
    asked = []

    @once
    def double(text: str) -> int:
        asked.append(text)
        return 2 * parse_bytes(text, "size")

    assert [double("1KiB"), double("1KiB"), double("2KiB")] == [2048, 2048, 4096]
    assert asked == ["1KiB", "2KiB"]
    for _ in range(2):
        with pytest.raises(ArgumentError):
            double("nothing")
    assert asked == ["1KiB", "2KiB", "nothing", "nothing"]


UNCOMPILED = """
import os, sys
import numpy as np
import cqsa_arrays as cqsa
from cqsa_arrays.cli import main

x = np.ones((1, 40, 8), "f4")
try:
    cqsa.attention(x, x, x)
except cqsa.ArgumentError as error:
    print(error)
main(["make", "in.h5", "--tokens", "64", "--head-dim", "8"])
code = main(["attend", "in.h5", "-o", "out.h5"])
print(os.listdir())
sys.exit(code)
"""


def test_numba_that_is_told_to_compile_nothing_is_named(tmp_path) -> None:
    found = run_child(UNCOMPILED, tmp_path, NUMBA_DISABLE_JIT="1")
    message = (
        "NUMBA_DISABLE_JIT: found 1; expected 0, or no such variable."
        " The float32 kernel exists as compiled code only: unset the variable.\n"
    )
    assert found.stdout.startswith(message)
    assert found.stdout.endswith("['in.h5']\n")
    assert found.stderr == f"cqsa attend: {message}"
    assert found.returncode == 2
