"""How much memory this process may use: the machine's, a container's or batch job's, its own limits (ulimit)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")
MOUNTS = Path("/sys/fs/cgroup")

# Files that hold a limit. The system slows a group down above memory.high, which a job would never end in.
_LIMITS_V2, _LIMITS_V1 = ("memory.max", "memory.high"), ("memory.limit_in_bytes",)
# That of all groups above, too, where a container does not see them; a line of version 1's memory.stat.
_HIERARCHICAL = "hierarchical_memory_limit"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A tree of control groups: ``root`` is the group that is mounted at ``mount``, ``own`` that of this process.

    Both are paths in the whole tree. Where a container has no namespace of its own, ``own`` begins with ``root``.
    """

    mount: Path
    root: PurePosixPath
    own: PurePosixPath
    files: tuple[str, ...]

    @property
    def folders(self) -> Iterator[Path]:
        """The groups that confine this process, as far as they are seen: its own, and all above."""
        inside = self.own.relative_to(self.root) if self.own.is_relative_to(self.root) else self.own.relative_to("/")
        if ".." not in inside.parts:  # which leads out of what this container sees
            for group in (inside, *inside.parents):
                yield self.mount / group
        yield self.mount

    @property
    def limit_bytes(self) -> int | None:
        """The smallest limit; None where there is none."""
        found = [_number("".join(_lines(folder / name))) for folder in self.folders for name in self.files]
        for folder in self.folders:
            lines = [line.partition(" ") for line in _lines(folder / "memory.stat")]
            found += [_number(value) for name, _, value in lines if name == _HIERARCHICAL]
        return min((limit for limit in found if limit), default=None)


def machine_bytes() -> int:
    """Memory of the machine, or of the container, batch job or service that this process is confined to."""
    return _confined_bytes(PROCESS, MOUNTS)


@lru_cache(maxsize=4)
def _confined_bytes(process: Path, mounts: Path) -> int:
    """Looked at once, for it takes half a millisecond: who confines a process does so before it begins."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for each in hierarchies() if (limit := each.limit_bytes))])


def own_limits() -> dict[str, int]:
    """The limits of this process (``ulimit -v`` and ``-d``), by the fields of /proc/self/status that count for them."""
    if sys.platform != "linux":  # elsewhere they are not kept, or not counted
        return {}
    import resource

    found = {"VmSize": resource.getrlimit(resource.RLIMIT_AS)[0], "VmData": resource.getrlimit(resource.RLIMIT_DATA)[0]}
    return {field: limit for field, limit in found.items() if limit != resource.RLIM_INFINITY}


def room_bytes() -> int | None:
    """What the limits of this process leave of themselves; None where there are none.

    In whole sixteenths of a limit: libraries are not always of one size, but the same call is to give the same plan.
    """
    used = dict(line.partition(":")[::2] for line in _lines(PROCESS / "status"))
    left = []
    for field, limit in own_limits().items():
        step = max(1, limit // 16)
        kilobytes = used.get(field, "0 kB").split()[0]
        left.append(max(0, limit - (int(kilobytes) << 10)) // step * step)
    return min(left, default=None)


def hierarchies() -> Iterator[Hierarchy]:
    """The trees of control groups that may limit the memory of this process, of version 1, 2 or both."""
    mounts = _mounts()
    for line in _lines(PROCESS / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        usual: tuple[Path, ...]
        files: tuple[str, ...]
        if number == "0" and not controllers:
            usual, kind, files = (MOUNTS, MOUNTS / "unified"), "cgroup2", _LIMITS_V2
        elif "memory" in controllers.split(","):
            usual, kind, files = (MOUNTS / "memory",), "memory", _LIMITS_V1
        else:
            continue
        for mount, root in {**dict.fromkeys(usual, PurePosixPath("/")), **mounts.get(kind, {})}.items():
            yield Hierarchy(mount, root, PurePosixPath("/" + own.lstrip("/")), files)


def _mounts() -> dict[str, dict[Path, PurePosixPath]]:
    """Where version 2 ("cgroup2") and version 1's memory ("memory") are mounted, with the group that is seen there."""
    found: dict[str, dict[Path, PurePosixPath]] = {}
    for line in _lines(PROCESS / "mountinfo"):
        left, _, right = line.partition(" - ")
        fields, described = left.split(), right.split()
        if len(fields) < 5 or len(described) < 3:
            continue
        if described[0] == "cgroup2":
            kind = "cgroup2"
        elif described[0] == "cgroup" and "memory" in described[2].split(","):
            kind = "memory"
        else:
            continue
        found.setdefault(kind, {})[Path(_unescaped(fields[4]))] = PurePosixPath(_unescaped(fields[3]))
    return found


def _unescaped(path: str) -> str:
    """A path of mountinfo, which has spaces as octal numbers."""
    return path.replace("\\040", " ")


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text(errors="surrogateescape").splitlines()
    return []


def _number(text: str) -> int | None:
    """None for "max", and where there is no file."""
    return int(text) if text.strip().isdigit() else None
