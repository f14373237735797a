"""Whole jobs under a hard limit of the operating system: at the budget and what README.md says comes on top, none dies.

A limit of data (RLIMIT_DATA, ``ulimit -d``) counts every private writable page from when it is reserved, thread stacks
included; memory.max of a control group counts pages that were touched, and files', which the system can take back.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import environment

import cqsa_arrays as cqsa
from cqsa_arrays.cli.process import keep_small, memory_was_refused
from cqsa_arrays.storage import InputSpec, make_inputs
from cqsa_arrays.workers import DEFAULT_STACK_BYTES, stack_bytes

MIB = 1 << 20
# As README.md has it: Python, libraries and the compiler, and what each thread reserves.
BASELINE_BYTES, THREAD_BYTES = 208 * MIB, 2 * MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")


@dataclass(frozen=True, slots=True)
class Job:
    """An input file and the options of ``cqsa attend``."""

    name: str
    inputs: InputSpec
    budget_mib: int
    threads: int
    more: tuple[str, ...]

    @property
    def limit_bytes(self) -> int:
        return self.budget_mib * MIB + BASELINE_BYTES + self.threads * THREAD_BYTES


def job(name: str, budget_mib: int, threads: int, *more: str, **inputs: object) -> Job:
    return Job(name, InputSpec(**{"tokens": 3000, "heads": 4, **inputs}), budget_mib, threads, more)


JOBS = [
    job("cqs", 8, 2, "--cover", "cqs"),
    job("rectangular, eight threads", 32, 8, "--cover", "rectangular", heads=12),
    job("states on disk", 8, 1, "--cover", "cqs", "--chunks", "31", tokens=12_000, heads=1, head_dim=32, value_dim=64),
    job("float16 gzip", 16, 2, dtype="float16", chunk_tokens=500, compression="gzip"),
    job("float64 bnhd", 16, 2, "--cover", "rectangular", dtype="float64", layout="bnhd"),
    job("bfloat16 bnhd gzip", 32, 1, dtype="bfloat16", layout="bnhd", chunk_tokens=500, compression="gzip"),
]
LARGE = job("a budget that is used", 128, 2, "--cover", "cqs", tokens=1000, key_tokens=100_000, heads=1, head_dim=128)


def attend(folder: Path, one: Job, confine: Callable[[], None], **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``one`` in a process of its own, in which ``confine`` is called first."""
    if not (folder / "in.h5").exists():
        make_inputs(folder / "in.h5", one.inputs)
    argv = [sys.executable, "-m", "cqsa_arrays", "attend", "in.h5", "-o", "out.h5", "--quiet", *one.more]
    argv += ["--memory", f"{one.budget_mib}MiB", "--threads", str(one.threads)]
    return subprocess.run(
        argv, cwd=folder, env=environment(**changes), preexec_fn=confine, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def data_limit(limit_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def check_done(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in.h5", "out.h5"]
    assert cqsa.verify(folder / "out.h5", rows=64).passed


def check_refused(folder: Path, done: subprocess.CompletedProcess[str], said: str) -> None:
    """One line, the exit code of what cannot be used, and nothing left behind."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cqsa attend: the system ")
    assert said in done.stderr
    assert not list(folder.glob("out.h5*"))


@pytest.mark.parametrize("one", JOBS, ids=[one.name for one in JOBS])
def test_jobs_live_under_a_limit_of_data(one, tmp_path):
    check_done(tmp_path, attend(tmp_path, one, data_limit(one.limit_bytes)))


def test_a_job_that_uses_its_budget_lives_in_it_and_not_in_less(tmp_path):
    """The same job is refused where the limit leaves the budget out: it is the limit that the others live under."""
    check_refused(tmp_path, attend(tmp_path, LARGE, data_limit(LARGE.limit_bytes - 128 * MIB)), "MiB")
    check_done(tmp_path, attend(tmp_path, LARGE, data_limit(LARGE.limit_bytes)))


@pytest.mark.parametrize(("one", "dtype"), [(JOBS[0], "float32"), (JOBS[4], "float64")], ids=["float32", "float64"])
def test_a_job_that_compiles_its_kernel_lives_too_and_is_refused_before_it_begins_to(one, dtype, tmp_path):
    """With Numba's cache empty. LLVM would end the process, and leave out.h5.part, in the smaller limit."""
    folder, empty = tmp_path / "job", {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    folder.mkdir()
    check_refused(folder, attend(folder, one, data_limit(144 * MIB), **empty), "68 MiB")
    done = attend(folder, one, data_limit(one.limit_bytes), **empty)
    assert f"compiling the {dtype} kernel" in done.stderr
    check_done(folder, done)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6])
def test_a_limit_that_is_far_too_small_is_said_in_one_line(share, tmp_path):
    """Without room for the libraries, and for the kernel of one job with many threads."""
    check_refused(tmp_path, attend(tmp_path, JOBS[1], data_limit(int(share * BASELINE_BYTES))), "--memory")


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA], ids=["addresses", "data"])
@pytest.mark.parametrize("command", ["info in.h5", "plan in.h5", "compare in.h5:/q in.h5:/q"])
def test_every_command_says_in_one_line_that_a_limit_is_too_small(command, kind, tmp_path):
    """OpenBLAS, where it is refused memory, ends the process or goes on for ever; its exit code is 1, or 130."""
    make_inputs(tmp_path / "in.h5", InputSpec(tokens=100))
    argv = [sys.executable, "-m", "cqsa_arrays", *command.split()]
    codes = []
    for limit in (40 * MIB, 100 * MIB, 130 * MIB, 400 * MIB):
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False,
            preexec_fn=lambda limit=limit: resource.setrlimit(kind, (limit, limit)),
        )  # fmt: skip
        codes.append(done.returncode)
        assert done.returncode in (0, 2), (limit, done.stderr)
        assert len(done.stderr.splitlines()) == (1 if done.returncode else 0), (limit, done.stderr)
    assert (codes[0], codes[-1]) == (2, 0)


@pytest.mark.parametrize("limit_mib", [200, 350, 390, 440, 1000])
def test_a_limit_of_addresses_ends_in_success_or_in_one_line(limit_mib, tmp_path):
    """Libraries and what malloc reserves for threads count there; LLVM would abort from 340 to 410 MiB."""
    limit = limit_mib * MIB
    make_inputs(tmp_path / "in.h5", JOBS[0].inputs)
    done = attend(tmp_path, JOBS[0], lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    if limit_mib == 1000 or done.returncode == 0:
        check_done(tmp_path, done)
    else:
        check_refused(tmp_path, done, "")


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A new control group (v2) below this process's, with a limit of memory; removed at the end."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line]
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    if not mounts or not own:
        pytest.skip("no control groups of version 2 here")
    here = Path(mounts[0][4], own[0].lstrip("/"))
    handed_down = here / "cgroup.subtree_control"
    if not handed_down.exists() or "memory" not in handed_down.read_text().split():
        pytest.skip(f"{here} hands no limit of memory down to groups below it")
    group = here / f"cqsa-limits-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made below {here}: {error.strerror}")
    try:
        yield group
    finally:
        group.rmdir()


@pytest.mark.parametrize("one", [*JOBS[:3], LARGE], ids=[one.name for one in [*JOBS[:3], LARGE]])
def test_jobs_live_in_a_control_group(one, control_group, tmp_path):
    (control_group / "memory.max").write_text(str(one.limit_bytes))
    swap = control_group / "memory.swap.max"
    if swap.exists():
        swap.write_text("0")
    enter = control_group / "cgroup.procs"
    check_done(tmp_path, attend(tmp_path, one, lambda: enter.write_text("0") and None))


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (RuntimeError("can't start new thread"), True),
        (chained(OSError("cannot find or load it"), OSError(12, "Cannot allocate memory")), True),
        (RuntimeError("anything else"), False),
        (OSError(2, "No such file or directory"), False),
    ],
)
def test_refused_memory_is_known_by_what_it_came_of(error, refused):
    assert memory_was_refused(error) is refused


def test_a_process_of_somebody_else_keeps_its_threads(monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    keep_small()
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    assert stack_bytes() == DEFAULT_STACK_BYTES


def test_asking_for_the_size_of_stacks_changes_nothing():
    threading.stack_size(4 * MIB)
    try:
        assert [stack_bytes(), stack_bytes()] == [4 * MIB, 4 * MIB]
    finally:
        assert threading.stack_size(0) == 4 * MIB
