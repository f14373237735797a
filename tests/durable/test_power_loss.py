"""Power loss: of the writes that were not synced yet any part may be there, and the job still ends with its bytes.

A run is recorded: every write and sync of its files, and the ledger after each commit (SQLite's syncs are trusted).
Then what a disk could hold at some instant is built, and another run goes on from there. A kill never does that: the
system keeps what was written, synced or not.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from durable_cases import CASES, Case, command, digest, log, make, run, unbroken

from cqsa_arrays.cli import main
from cqsa_arrays.durable.ledger import Ledger

PAGE = 4096
LEDGER = Path("out.h5.job/ledger.sqlite")
SOME = [CASES[0], CASES[1], CASES[2], CASES[4]]


@dataclass
class Recording:
    """What a run did to the disk, in order. ``base`` is every file when the job had begun, all of it synced."""

    events: list[tuple] = field(default_factory=list)
    base: dict[str, bytes] = field(default_factory=dict)
    ledgers: list[tuple[int, bytes]] = field(default_factory=list)  # after which event the ledger was so

    def begin(self) -> None:
        files = [Path("out.h5.part"), *Path("out.h5.job").glob("*-states-*")]
        self.base = {str(path): path.read_bytes() for path in files}

    def at(self, cut: int, rng: random.Random) -> dict[str, bytes]:
        """The files, as a disk could have them after the first ``cut`` events."""
        found = {name: bytearray(data) for name, data in self.base.items()}
        kept = rng.choice((0.0, 0.5, 1.0))
        for number, (kind, name, *what) in enumerate(self.events[:cut]):
            if kind != "write" or name not in found:
                continue
            data, position = what
            synced = any(k == "synced" and n == name and begun[0] > number for k, n, *begun in self.events[number:cut])
            for start in range(0, len(data), PAGE):
                if synced or rng.random() < kept:
                    part = data[start : start + PAGE]
                    found[name][position + start : position + start + len(part)] = part
        ledger = [data for number, data in self.ledgers if number <= cut][-1]
        return {**{name: bytes(data) for name, data in found.items()}, str(LEDGER): ledger}


def record(case: Case, patch: pytest.MonkeyPatch) -> Recording:
    """A whole run of ``case``, in this process."""
    found = Recording()
    write, sync, commit = os.pwrite, os.fsync, Ledger.commit

    def name_of(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"))

    def pwrite(descriptor, data, position):
        done = write(descriptor, data, position)
        found.events.append(("write", name_of(descriptor), bytes(data[:done]), position))
        return done

    def fsync(descriptor):
        name, begun = name_of(descriptor), len(found.events)
        sync(descriptor)
        found.events.append(("synced", name, begun))

    def committed(self, facts, drop=()):
        commit(self, facts, drop)
        if LEDGER.exists() and self.path == str(LEDGER):
            if not found.base:
                found.begin()
                found.events.clear()
            found.ledgers.append((len(found.events), LEDGER.read_bytes()))

    with patch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        patched.setattr(os, "fsync", fsync)
        patched.setattr(Ledger, "commit", committed)
        assert main(command(case)) == 0
    return found


def lay_out(files: dict[str, bytes]) -> None:
    """These files, and the inputs, are all there is."""
    shutil.rmtree("out.h5.job", ignore_errors=True)
    for name in set(os.listdir()) - {"qkv.h5"}:
        os.remove(name)
    for name, data in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)


def survives(recording: Recording, expected: str, cut: int, rng: random.Random, case: Case) -> bool:
    lay_out(recording.at(cut, rng))
    return run(command(case)) == 0 and digest() == expected


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_whatever_was_not_synced_is_not_missed(here, case, monkeypatch) -> None:
    make(case)
    expected = unbroken(case)
    recording = record(case, monkeypatch)
    assert digest() == expected
    assert len(recording.ledgers) > 5
    rng = random.Random(case.name)
    for _ in range(24):
        cut = rng.randint(1, len(recording.events))
        assert survives(recording, expected, cut, rng, case), f"after {cut} events: {log()}"


@pytest.mark.parametrize("missing", ["states", "output"])
def test_a_missing_sync_would_be_seen(here, missing, monkeypatch) -> None:
    """The same with a run that commits what it has not synced."""
    from cqsa_arrays.engine.statefile import StateFile
    from cqsa_arrays.storage import OutputFile

    case = CASES[0] if missing == "states" else CASES[2]
    make(case)
    expected = unbroken(case)
    with monkeypatch.context() as patched:
        patched.setattr(StateFile if missing == "states" else OutputFile, "sync", lambda self: None)
        recording = record(case, monkeypatch)
    rng = random.Random(0)
    cuts = [rng.randint(1, len(recording.events)) for _ in range(24)]
    assert not all(survives(recording, expected, cut, rng, case) for cut in cuts)
