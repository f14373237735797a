"""Power loss: of what was not synced yet any part may be there, and the job still ends with its bytes.

A run is recorded: every write, name and sync of its files. Then what a disk could hold at some instant is built, and
another run goes on from there: any pages of what was written to a file since it was synced; names as they were at
some moment since a directory was synced. A kill never does that: the system keeps what was done, synced or not.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from durable_cases import CASES, Case, command, digest, log, make, run, unbroken

from cqsa_arrays.cli import main
from cqsa_arrays.durable.journal import Journal
from cqsa_arrays.engine.statefile import StateFile
from cqsa_arrays.storage import RawFile

PAGE = 4096
SOME = [CASES[0], CASES[1], CASES[2], CASES[4], CASES[5]]


@dataclass
class Recording:
    """What a run did to the disk, in order; files are numbers. Before ``begun`` events the job was not begun."""

    events: list[tuple] = field(default_factory=list)
    begun: int = 0

    def at(self, cut: int, rng: random.Random) -> dict[str, tuple[int, bytes]]:
        """The files, by name, as a disk could have them after the first ``cut`` events."""
        syncs = [i for i, event in enumerate(self.events[:cut]) if event[0] == "names synced"]
        names = self._names(rng.randint(max(syncs), cut))
        kept, data = rng.choice((0.0, 0.5, 1.0)), {number: bytearray() for number in names.values()}
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
        return {name: (number, bytes(data[number])) for name, number in names.items()}

    def _names(self, until: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for kind, *what in self.events[:until]:
            if kind == "name":
                found[what[1]] = what[0]
            elif kind == "remove":
                found.pop(what[0], None)
            elif kind == "rename":
                before, after = what
                for name in [n for n in found if n == before or n.startswith(before + "/")]:
                    found[after + name[len(before) :]] = found.pop(name)
        return found


class Recorder:
    """Stands between a run and the system."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found, self._numbers, self._offsets = Recording(), dict[int, int](), dict[int, int]()
        self._lock = threading.RLock()
        for name in (
            "open",
            "close",
            "pwrite",
            "write",
            "fsync",
            "rename",
            "replace",
            "link",
            "remove",
            "posix_fallocate",
        ):
            patch.setattr(os, name, self._recorded(getattr(self, name), getattr(os, name)))

    def _recorded(self, what, usual):
        def call(*arguments, **named):
            with self._lock:
                return what(usual, *arguments, **named)

        return call

    def _number(self, descriptor: int) -> int | None:
        return self._numbers.get(os.fstat(descriptor).st_ino)

    def open(self, usual, path, flags, *more, **named):
        new = bool(flags & os.O_CREAT) and not os.path.exists(path)
        descriptor = usual(path, flags, *more, **named)
        if new:
            number = len(self.found.events)
            self._numbers[os.fstat(descriptor).st_ino] = number
            self.found.events.append(("name", number, os.path.relpath(path)))
        return descriptor

    def close(self, usual, descriptor):
        self._offsets.pop(descriptor, None)
        usual(descriptor)

    def pwrite(self, usual, descriptor, data, position):
        done = usual(descriptor, data, position)
        self.found.events.append(("write", self._number(descriptor), bytes(data[:done]), position))
        return done

    def write(self, usual, descriptor, data):
        done, position = usual(descriptor, data), self._offsets.get(descriptor, 0)
        self.found.events.append(("write", self._number(descriptor), bytes(data[:done]), position))
        self._offsets[descriptor] = position + done
        return done

    def posix_fallocate(self, usual, descriptor, offset, size):
        usual(descriptor, offset, size)
        self.found.events.append(("size", self._number(descriptor), offset + size))

    def fsync(self, usual, descriptor):
        begun = len(self.found.events)
        usual(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self.found.events.append(("names synced", None))
        else:
            number = self._number(descriptor)
            self._by_hdf5(descriptor, number, begun)
            self.found.events.append(("synced", number, len(self.found.events)))

    def _by_hdf5(self, descriptor: int, number: int | None, begun: int) -> None:
        """HDF5 writes the structure of the output by itself: what is there when it is synced first."""
        if number is not None and not any(e[0] == "write" and e[1] == number for e in self.found.events):
            data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            self.found.events.append(("write", number, data, 0))

    def rename(self, usual, before, after):
        usual(before, after)
        self.found.events.append(("rename", os.path.relpath(before), os.path.relpath(after)))

    replace = rename

    def link(self, usual, before, after):
        usual(before, after)
        self.found.events.append(("name", self._numbers[os.stat(after).st_ino], os.path.relpath(after)))
        if after.endswith("out.h5.job/job"):
            self.found.begun = len(self.found.events) + 1  # the next is the sync of the folder

    def remove(self, usual, path):
        usual(path)
        self.found.events.append(("remove", os.path.relpath(path)))


def record(case: Case, patch: pytest.MonkeyPatch) -> Recording:
    """A whole run of ``case``, in this process."""
    with patch.context() as patched:
        recorder = Recorder(patched)
        assert main(command(case)) == 0
    return recorder.found


def lay_out(files: dict[str, tuple[int, bytes]]) -> None:
    """These files, and the inputs, are all there is."""
    for name in set(os.listdir()) - {"qkv.h5"}:
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)
    first: dict[int, str] = {}
    for name, (number, data) in files.items():
        if "worker-" in name:
            continue  # of this process, which lives: the others would wait for it
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if number in first:
            os.link(first[number], name)
        else:
            Path(name).write_bytes(data)
        first.setdefault(number, name)


def survives(recording: Recording, expected: str, cut: int, rng: random.Random, case: Case) -> bool:
    lay_out(recording.at(cut, rng))
    return run(command(case)) == 0 and digest() == expected


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_whatever_was_not_synced_is_not_missed(here, case, monkeypatch) -> None:
    make(case)
    expected = unbroken(case)
    recording = record(case, monkeypatch)
    assert digest() == expected
    assert sum(event[0] == "names synced" for event in recording.events) > 5
    rng = random.Random(case.name)
    for _ in range(24):
        cut = rng.randint(recording.begun, len(recording.events))
        assert survives(recording, expected, cut, rng, case), f"after {cut} events: {log()}"


@pytest.mark.parametrize("missing", ["states", "output", "journal", "record"])
def test_a_missing_sync_would_be_seen(here, missing, monkeypatch) -> None:
    """The same with a run that commits what it has not synced."""
    case = CASES[0] if missing == "states" else CASES[2]
    make(case)
    expected = unbroken(case)
    with monkeypatch.context() as patched:
        if missing == "record":
            from cqsa_arrays.durable import attempt

            def unsynced(path, facts) -> None:
                with monkeypatch.context() as inner:
                    inner.setattr(os, "fsync", lambda descriptor: None)
                    write(path, facts)

            write = attempt.write_record
            patched.setattr(attempt, "write_record", unsynced)
        elif missing == "output":
            usual = RawFile.sync
            patched.setattr(RawFile, "sync", lambda self: None if "out.h5" in self.label else usual(self))
        else:
            patched.setattr(StateFile if missing == "states" else Journal, "sync", lambda self: None)
        recording = record(case, monkeypatch)
    rng = random.Random(0)
    cuts = [rng.randint(recording.begun, len(recording.events)) for _ in range(24)]
    assert not all(survives(recording, expected, cut, rng, case) for cut in cuts)
