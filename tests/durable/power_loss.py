"""What a disk can hold after the power was lost: runs are recorded, and a disk is laid out as of some instant.

Of what was written to a file since it was synced, any pages are there. Each directory has its names as they were at
some moment since it was synced; a file that went from one directory to another is in one of them.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
ROOT = 0  # the number of the working directory
_PATCHED = (
    "open", "close", "pwrite", "write", "fsync", "rename", "replace", "link", "remove", "unlink", "mkdir", "rmdir",
    "posix_fallocate",
)  # fmt: skip


@dataclass
class Recording:
    """What runs did to the disk, in order. Files and directories are numbers."""

    events: list[tuple] = field(default_factory=list)

    def at(self, cut: int, rng: random.Random) -> dict[str, tuple[int, bytes | None]]:
        """Files and directories (which have no bytes) by name, as a disk could have them after ``cut`` events."""
        names = self._reachable(self._directories(self._moments(cut, rng)))
        kept, data = rng.choice((0.0, 0.5, 1.0)), {number: bytearray() for number, _ in names.values()}
        for i, (kind, number, *what) in enumerate(self.events[:cut]):
            if kind == "size" and number in data:
                data[number].extend(bytes(what[0] - len(data[number])))
            if kind != "write" or number not in data:
                continue
            part, position = what
            synced = any(k == "synced" and n == number and begun[0] > i for k, n, *begun in self.events[i:cut])
            for start in range(0, len(part), PAGE):
                if synced or rng.random() < kept:
                    page, at = part[start : start + PAGE], position + start
                    data[number].extend(bytes(max(0, at + len(page) - len(data[number]))))
                    data[number][at : at + len(page)] = page
        return {name: (number, None if is_dir else bytes(data[number])) for name, (number, is_dir) in names.items()}

    def _moments(self, cut: int, rng: random.Random) -> dict[int, int]:
        """For each directory the moment whose names it has."""
        synced = {ROOT: 0}
        for i, (kind, number, *what) in enumerate(self.events[:cut]):
            if kind == "names synced" or (kind == "name" and what[2]):
                synced[number] = i
        how = rng.choice(("as synced", "as left", "any"))
        chosen = {
            number: cut if how == "as left" else i if how == "as synced" else rng.randint(i, cut)
            for number, i in synced.items()
        }
        moved = [(i, event[1], event[3]) for i, event in enumerate(self.events[:cut]) if event[0] == "rename"]
        while torn := [(i, one, other) for i, one, other in moved if (i < chosen[one]) != (i < chosen[other])]:
            i, one, other = torn[0]
            chosen[one], chosen[other] = max(chosen[one], i + 1), max(chosen[other], i + 1)
        return chosen

    def _directories(self, until: dict[int, int]) -> dict[int, dict[str, tuple[int, bool]]]:
        """What each directory holds: number, and whether it is a directory, by name."""
        found: dict[int, dict[str, tuple[int, bool]]] = {number: {} for number in until}
        for i, (kind, *what) in enumerate(self.events):
            if kind == "name":
                number, directory, name, is_directory = what
                if i < until.get(directory, 0):
                    found[directory][name] = number, is_directory
            elif kind == "remove":
                directory, name = what
                if i < until.get(directory, 0):
                    found[directory].pop(name, None)
            elif kind == "rename":
                directory, name, to, new = what
                if i < until.get(directory, 0) and name in found[directory]:
                    found[to][new] = found[directory].pop(name)
        return found

    def _reachable(self, found: dict, number: int = ROOT, path: str = "") -> dict[str, tuple[int, bool]]:
        names = {}
        for name, (inside, is_directory) in found[number].items():
            names[path + name] = inside, is_directory
            if is_directory:
                names |= self._reachable(found, inside, f"{path}{name}/")
        return names


class Recorder:
    """Stands between a run and the system, and tells what it does. ``before``: what runs did that are over."""

    def __init__(self, told: Callable[[tuple], None], before: Recording | None = None) -> None:
        self._told, self._count = told, 0
        self._numbers, self._offsets = {os.stat(".").st_ino: ROOT}, dict[int, int]()
        self._written, self._lock = set[int](), threading.RLock()
        for event in before.events if before else ():
            self._count += 1
            self._know(event)

    def install(self, patch: Callable[[object, str, object], None] = setattr) -> None:
        self._process = os.getpid()
        for entry in os.scandir("."):
            if entry.is_dir() and entry.inode() not in self._numbers:
                self._made(entry.inode(), entry.name, True)
                self._say("names synced", ROOT)
        for name in _PATCHED:
            patch(os, name, self._recorded(getattr(self, name), getattr(os, name)))

    def _recorded(self, what, usual):
        def call(*arguments, **named):
            if os.getpid() != self._process:
                return usual(*arguments, **named)
            with self._lock:
                return what(usual, *arguments, **named)

        return call

    def _know(self, event: tuple) -> None:
        if event[0] == "made":
            self._numbers[event[2]] = event[1]
        elif event[0] == "write":
            self._written.add(event[1])

    def _say(self, *event) -> None:
        self._know(event)
        self._count += 1
        self._told(event)

    def _made(self, inode: int, path: str, is_directory: bool) -> None:
        number = self._count + 1
        self._say("made", number, inode)
        self._say("name", number, *self._place(path), is_directory)

    def _place(self, path: str) -> tuple[int, str]:
        """The number of the directory, and the name in it."""
        directory, name = os.path.split(os.path.relpath(path))
        return self._numbers[os.stat(directory or ".").st_ino], name

    def _number(self, descriptor: int) -> int | None:
        return self._numbers.get(os.fstat(descriptor).st_ino)

    def open(self, usual, path, flags, *more, **named):
        new = bool(flags & os.O_CREAT) and not os.path.exists(path)
        descriptor = usual(path, flags, *more, **named)
        if new:
            self._made(os.fstat(descriptor).st_ino, path, False)
        return descriptor

    def mkdir(self, usual, path, *more, **named):
        usual(path, *more, **named)
        self._made(os.stat(path).st_ino, path, True)

    def close(self, usual, descriptor):
        self._offsets.pop(descriptor, None)
        usual(descriptor)

    def pwrite(self, usual, descriptor, data, position):
        done = usual(descriptor, data, position)
        self._say("write", self._number(descriptor), bytes(data[:done]), position)
        return done

    def write(self, usual, descriptor, data):
        done, position = usual(descriptor, data), self._offsets.get(descriptor, 0)
        self._say("write", self._number(descriptor), bytes(data[:done]), position)
        self._offsets[descriptor] = position + done
        return done

    def posix_fallocate(self, usual, descriptor, offset, size):
        usual(descriptor, offset, size)
        self._say("size", self._number(descriptor), offset + size)

    def fsync(self, usual, descriptor):
        begun, number = self._count, self._number(descriptor)
        usual(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            if number is not None:
                self._say("names synced", number)
            return
        if number is not None and number not in self._written:
            # HDF5 writes the structure of the output by itself: what is there when it is synced first.
            self._say("write", number, os.pread(descriptor, os.fstat(descriptor).st_size, 0), 0)
            begun = self._count
        self._say("synced", number, begun)

    def rename(self, usual, before, after):
        places = (*self._place(before), *self._place(after))
        usual(before, after)
        self._say("rename", *places)

    replace = rename

    def link(self, usual, before, after):
        usual(before, after)
        self._say("name", self._numbers.get(os.stat(after).st_ino, -1), *self._place(after), False)

    def remove(self, usual, path):
        place = self._place(path)
        usual(path)
        self._say("remove", *place)

    unlink = rmdir = remove


class ToFile:
    """Before a run in a copy of this process: what it does is told to a file, until it is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> None:
        file = self._path.open("wb", buffering=0)
        Recorder(lambda event: file.write(pickle.dumps(event)) and None).install()

    def read(self) -> Recording:
        found = Recording()
        with self._path.open("rb") as file:
            while True:
                try:
                    found.events.append(pickle.load(file))
                except (EOFError, pickle.UnpicklingError):
                    return found


def lay_out(files: dict[str, tuple[int, bytes | None]], kept: set[str]) -> None:
    """These files, and those called ``kept``, are all there is."""
    for name in set(os.listdir()) - kept:
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)
    first: dict[int, str] = {}
    for name, (number, data) in sorted(files.items()):
        if "worker-" in name:
            continue  # of a process that lives, or of this boot: the others would wait for it, or know that it is dead
        if data is None:
            os.makedirs(name, exist_ok=True)
        elif number in first:
            os.link(first[number], name)
        else:
            Path(name).write_bytes(data)
            first[number] = name
