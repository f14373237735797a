"""The file system of the model of durable jobs: values that can be hashed, and operations that are atomic.

A file that is written once is its content: a link is the same value under another name. A file that is written in
place is a handle, and its content lies in ``files``: descriptors outlive names, and what is written to a file that has
no name left nobody can see. A directory has a name in the folder, and its files have names in it. ``<key>.gone`` is not
modelled: what lies there is never looked at, so that a directory that is renamed away is gone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TOP = ""
JOB, OUT = (TOP, "job"), (TOP, "out.h5")
FOLDER = "a folder"
PAGE = 2  # rows

Path = tuple[Any, Any]
Names = dict[Path, Any]
Files = dict[Any, tuple]
Operation = tuple


class Disk(NamedTuple):
    """What lies on the disk, and what was once so (for the invariants only: no worker reads ``past``)."""

    names: frozenset = frozenset()
    files: frozenset = frozenset()
    past: frozenset = frozenset()


def output_of(key: Any) -> tuple:
    return ("output", key)


def newest(names: dict[Any, Any], lane: int) -> Any:
    """The name of the lane's checkpoint with the highest position, of all attempts."""
    found = [name for name in names if name[0] == "checkpoint" and name[1] == lane]
    return max(found, key=lambda name: (name[3], name[2]), default=None)


def _read(names: Names, files: Files, path: Path) -> Any:
    return names.get(path)


def _list(names: Names, files: Files, folder: Any) -> Any:
    """Names and contents, as records never change; None where there is no such directory."""
    if (TOP, folder) not in names:
        return None
    return frozenset((path[1], value) for path, value in names.items() if path[0] == folder)


def _glances(listing: frozenset | None) -> list:
    """What a listing that takes its time can be: of a lane, both an older and a newer checkpoint can be missed."""
    if listing is None:
        return [None]
    names = dict(listing)
    lanes = {name[1] for name in names if name[0] == "checkpoint"}
    return [listing, *(listing - {(newest(names, lane), names[newest(names, lane)])} for lane in lanes)]


def _folders(names: Names, files: Files) -> tuple:
    return tuple(sorted(name for (top, name), value in names.items() if top == TOP and value == FOLDER))


def _mkdir(names: Names, files: Files, folder: Any, inside: tuple) -> bool:
    names[TOP, folder] = FOLDER
    for name, value, content in inside:
        _make(names, files, (folder, name), value, content)
    return True


def _make(names: Names, files: Files, path: Path, value: Any, content: tuple | None = None) -> bool:
    """A file that appears whole, in the place of any that was there."""
    if path[0] != TOP and (TOP, path[0]) not in names:
        return False
    names[path] = value
    if content is not None:
        files[value] = content
    return True


def _create(names: Names, files: Files, path: Path, value: Any) -> bool:
    return path not in names and _make(names, files, path, value)


def _unlink(names: Names, files: Files, path: Path) -> bool:
    return names.pop(path, None) is not None


def _link(names: Names, files: Files, source: Path, target: Path) -> bool:
    return source in names and target not in names and _make(names, files, target, names[source])


def _rename(names: Names, files: Files, source: Path, target: Path) -> bool:
    if source not in names or (target[0] != TOP and (TOP, target[0]) not in names):
        return False
    if names.get(target) != names[source]:  # two names of one file: nothing is done, says POSIX
        names[target] = names.pop(source)
    return True


def _move(names: Names, files: Files, folder: Any, to: Any) -> bool:
    """A directory is renamed; ``to`` is None where it goes away."""
    if (TOP, folder) not in names:
        return False
    moved = [path for path in names if path[0] == folder]
    for path in moved:
        value = names.pop(path)
        if to is not None:
            names[to, path[1]] = value
    del names[TOP, folder]
    if to is not None:
        names[TOP, to] = FOLDER
    return True


def _write(names: Names, files: Files, handle: Any, offset: int, values: tuple) -> None:
    if handle in files:
        content = files[handle]
        files[handle] = content[:offset] + values + content[offset + len(values) :]


def _see(names: Names, files: Files, handle: Any, offset: int, count: int) -> tuple | None:
    return files[handle][offset : offset + count] if handle in files else None


_LOOKS = {"read": _read, "list": _list, "folders": _folders, "see": _see}
_CHANGES = {
    "mkdir": _mkdir,
    "make": _make,
    "create": _create,
    "unlink": _unlink,
    "link": _link,
    "rename": _rename,
    "move": _move,
    "write": _write,
}


def outcomes(disk: Disk, operation: Operation) -> list[tuple[Disk, Any]]:
    """What the operation can leave, and what the worker may be told; first what is usual."""
    kind, *rest = operation
    if kind == "choose":
        return [(disk, option) for option in rest[0]]
    if kind == "untold":  # the worker does the same whatever the answer is, a lost one too
        return [(outcomes(disk, rest[0])[0][0], None)]
    if kind == "dead":
        return [(disk, ("dead", rest[0]) in disk.past)]
    names, files = dict(disk.names), dict(disk.files)
    if kind == "glance":
        return [(disk, listing) for listing in _glances(_list(names, files, *rest))]
    if kind in _LOOKS:
        return [(disk, _LOOKS[kind](names, files, *rest))]
    told = _CHANGES[kind](names, files, *rest)
    if told is False:
        return [(disk, False)]
    named = set(names.values())
    after = Disk(frozenset(names.items()), frozenset((h, c) for h, c in files.items() if h in named), disk.past)
    lost = [(after, False)] if kind in ("link", "rename", "move") else []
    return [(after, told), *lost]


def shown(thing: Any) -> str:
    """A name, a path or a value for people."""
    if isinstance(thing, tuple) and len(thing) == 2 and thing[0] == TOP:
        return shown(thing[1])
    if isinstance(thing, tuple) and len(thing) == 2 and str(thing[0]).startswith("K"):
        return f"{thing[0]}/{shown(thing[1])}"
    if isinstance(thing, tuple):
        return ".".join(shown(part) for part in thing)
    return "nothing" if thing is None else str(thing)


def step_shown(operation: Operation, told: Any) -> str:
    kind, *rest = operation[1] if operation[0] == "untold" else operation
    if kind == "mkdir":
        rest = rest[:1]
    listing = isinstance(told, frozenset)
    answer = ", ".join(sorted(shown(name) for name, _ in told)) if listing else shown(told)
    return f"{kind} {' '.join(shown(part) for part in rest)} -> {answer}"
