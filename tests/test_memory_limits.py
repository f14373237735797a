"""The default budget: of the machine, of containers and batch jobs by either version of control groups, of ulimit."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from command_line import environment

import cqsa_arrays as cqsa
from cqsa_arrays import limits

MIB = 1 << 20
LIMIT = str(512 * MIB)
MORE = str(700 * MIB)
UNLIMITED_V1 = "9223372036854771712"
ROOT = "cgroup2 cgroup2 rw"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")

# What /proc/self/cgroup says, the mounts (place, group seen there, kind and options), the files of limits.
CASES = {
    "v2, in a namespace": ("0::/", [], {"memory.max": LIMIT}),
    "v2, nested": ("0::/slurm/job_1", [], {"slurm/job_1/memory.max": LIMIT}),
    "v2, the limit of the job of a step": (
        "0::/slurm/job_1/step_0/user", [],
        {"slurm/job_1/step_0/user/memory.max": "max", "slurm/job_1/memory.max": LIMIT, "slurm/memory.max": MORE},
    ),
    "v2, above which it is slowed down": ("0::/a.b", [], {"a.b/memory.max": MORE, "a.b/memory.high": LIMIT}),
    "v2, mounted elsewhere": ("0::/a b", [("other place", "/", ROOT)], {"other place/a b/memory.max": LIMIT}),
    "v2, a container without a namespace": (
        "0::/docker/1/sub", [("", "/docker/1", ROOT)], {"sub/memory.max": MORE, "memory.max": LIMIT},
    ),
    "v2, outside of what is seen": ("0::/../../other", [], {"memory.max": LIMIT}),
    "v1, in a container": ("4:memory:/docker/1", [], {"memory/memory.limit_in_bytes": LIMIT}),
    "v1, nested": (
        "7:cpu,cpuacct:/x\n5:devices,memory:/slurm/uid_0/job_3/step_0", [],
        {
            "memory/memory.limit_in_bytes": UNLIMITED_V1, "memory/slurm/uid_0/job_3/memory.limit_in_bytes": LIMIT,
            "memory/slurm/uid_0/job_3/step_0/memory.limit_in_bytes": MORE,
        },
    ),
    "v1, of a group that is not seen": (
        "4:memory:/", [],
        {
            "memory/memory.limit_in_bytes": UNLIMITED_V1,
            "memory/memory.stat": f"cache 5\nhierarchical_memory_limit {LIMIT}",
        },
    ),
    "v1 and v2 together": (
        "4:memory:/a\n0::/a", [("memory", "/", "cgroup cgroup rw,memory"), ("unified", "/", ROOT)],
        {"memory/a/memory.limit_in_bytes": LIMIT, "unified/a/memory.max": MORE},
    ),
    "v2 beside v1": ("1:name=systemd:/b\n0::/b", [], {"unified/b/memory.max": LIMIT}),
}  # fmt: skip


def escaped(path: Path) -> str:
    return str(path).replace(" ", "\\040")


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    def set_up(groups: str, mounts: list[tuple[str, str, str]], files: dict[str, str]) -> None:
        top, process = tmp_path / "cgroup", tmp_path / "proc"
        process.mkdir()
        for name, content in files.items():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(content + "\n")
        (process / "cgroup").write_text(groups + "\n")
        lines = [f"31 23 0:28 {group} {escaped(top / place)} rw shared:9 - {kind}" for place, group, kind in mounts]
        (process / "mountinfo").write_text("\n".join(["22 1 0:1 / / rw - ext4 /dev/sda rw", *lines]) + "\n")
        monkeypatch.setattr(limits, "MOUNTS", top)
        monkeypatch.setattr(limits, "PROCESS", process)

    return set_up


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_limits_of_control_groups_are_found(case, pretend):
    pretend(*case)
    assert limits.machine_bytes() == 512 * MIB
    x = np.zeros((1, 100, 8), "f4")
    budget = cqsa.plan(x, x, x, device="cpu").budget
    assert budget.memory_bytes == 256 * MIB
    assert budget.origin == "half of this machine's 512 MiB"


@pytest.mark.parametrize(
    "case",
    [
        ("0::/a", [], {"a/memory.max": "max", "memory.high": "max"}),
        ("4:memory:/", [], {"memory/memory.limit_in_bytes": UNLIMITED_V1}),
        ("", [], {}),
        ("nonsense\n:::\n0::", [("", "/", "cgroup")], {"memory.max": "nonsense"}),
        ("3:cpu:/a", [], {"memory/a/memory.limit_in_bytes": LIMIT}),
    ],
    ids=["v2", "v1", "no groups", "nonsense", "of others"],
)
def test_without_a_limit_it_is_the_memory_of_the_machine(case, pretend):
    pretend(*case)
    assert limits.machine_bytes() == limits.os.sysconf("SC_PHYS_PAGES") * limits.os.sysconf("SC_PAGE_SIZE")


@contextmanager
def limited(kind: int, size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.mark.parametrize(("kind", "field"), [(resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")])
def test_what_ulimit_leaves_is_the_room(kind, field):
    assert limits.room_bytes() is None
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    limit = used + 800 * MIB
    with limited(kind, limit):
        room = limits.room_bytes()
        x = np.zeros((1, 100, 8), "f4")
        budget = cqsa.plan(x, x, x, device="cpu").budget
    assert 800 * MIB - limit // 16 - MIB <= room <= 800 * MIB
    assert room % (limit // 16) == 0
    assert budget.memory_bytes == room // 2
    assert budget.origin.startswith("half of what ulimit leaves, ")


CALL = """
import resource, sys
import numpy as np, cqsa_arrays as cqsa
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
x = np.ones((1, 100, 8), "f4")
try:
    cqsa.attention(x, x, x, device="cpu", memory="8MiB")
except (MemoryError, ImportError) as error:
    print(type(error).__name__, error)
"""


def test_a_call_under_a_limit_of_addresses_raises_an_error_and_does_not_end_the_process():
    """LLVM would abort: it is not begun where it might."""
    said = []
    for mib in range(300, 520, 50):
        argv = [sys.executable, "-c", CALL, str(mib)]
        changes = {"OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(
            argv, env=environment(**changes), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, (mib, done.stderr)
        said.append(done.stdout)
    assert any("of address space (ulimit -v)" in one for one in said)
