"""A record is input: whatever it says, with a right checksum, it is refused in one line or does no harm."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import zlib
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest
from durable_cases import CASES, KilledAtCommit, command, make, run

from cqsa_arrays.cli import main
from cqsa_arrays.durable import attempt, claims, records

ODD = [
    None, True, -1, 0, 1, 1 << 63, 10**40, 1.5, 1e308, "", "x", "../../mine", "/etc/passwd", "a\0b", "\x1b[2J",
    "9" * 30, [], [[]], [[1]], [["x", 2, 3, 4]], {}, {"a": {}}, {"00000000": [1, 2]},
]  # fmt: skip


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    """Where anything stands in a record, but in lists only the first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, part in inner:
        yield (*at, name)
        yield from places(part, (*at, name))


def changed(text: bytes, at: tuple, value: object) -> bytes:
    facts = json.loads(text.split(b"\n")[0])
    inner = facts
    for name in at[:-1]:
        inner = inner[name]
    inner[at[-1]] = value
    new = json.dumps(facts).encode()
    return b"%b\n%08x\n" % (new, zlib.crc32(new))


@pytest.mark.parametrize("which", ["job", "checkpoint"])
def test_any_field_may_be_anything(here, which, capfd) -> None:
    case = CASES[2]
    make(case)
    Path("mine").mkdir()
    Path("mine/keep.txt").write_text("mine")
    assert run(command(case), KilledAtCommit(9)) == -signal.SIGKILL
    shutil.copytree("out.h5.job", "kept.job")
    path = Path("out.h5.job/job" if which == "job" else glob("out.h5.job/*/lane-0.*.*")[0])
    text = path.read_bytes()
    every = list(places(json.loads(text.split(b"\n")[0])))
    assert len(every) > 8
    for number, at in enumerate(every):
        for value in ODD[number % 13 :: 13]:
            path.unlink()
            path.write_bytes(changed(text, at, value))
            for argv in (["status", "out.h5"], ["verify", "out.h5", "--partial", "--rows", "4"]):
                assert _says_it(argv, capfd), (at, value, argv)
            path.write_bytes(text)
        if number % 4 == 0:
            path.unlink()
            path.write_bytes(changed(text, at, ODD[number % len(ODD)]))
            assert _says_it(["resume", "out.h5", "--quiet"], capfd), at
            shutil.rmtree("out.h5.job", ignore_errors=True)
            shutil.copytree("kept.job", "out.h5.job")
            for name in ("out.h5", "out.h5.part"):
                Path(name).unlink(missing_ok=True)
    assert Path("mine/keep.txt").read_text() == "mine"
    assert os.path.exists("qkv.h5")


def _says_it(argv: list[str], capfd) -> bool:
    """Whether a command ends well, or with one line that says what is wrong, which a terminal can print."""
    capfd.readouterr()
    code = main(argv)
    said = capfd.readouterr().err
    return code in (0, 1, 4) or (code == 2 and "Traceback" not in said and all(c.isprintable() for c in said.strip()))


def test_nothing_outside_the_job_is_removed(here) -> None:
    """By names that lead elsewhere, and by links."""
    case = CASES[0]
    make(case)
    Path("mine").mkdir()
    for name in ("job", "output", "lane-0.done", "0123456789abcdef-0-1-01234567.states", "precious"):
        (Path("mine") / name).write_text("mine")
    Path("out.h5.job").mkdir()
    os.symlink("../mine", "out.h5.job/0123456789abcdef")
    os.symlink("../mine", "out.h5.job/0123456789abcdee.gone")
    os.symlink("../mine/precious", "out.h5.job/job")
    assert run([*command(case), "--restart"]) == 0
    assert sorted(os.listdir("mine")) == [
        "0123456789abcdef-0-1-01234567.states", "job", "lane-0.done", "output", "precious",
    ]  # fmt: skip


def test_an_input_in_the_folder_of_the_job_is_refused(here) -> None:
    case = CASES[0]
    make(case)
    Path("out.h5.job/0123456789abcdef").mkdir(parents=True)
    for name in ("output", "lane-0.done"):
        place = f"out.h5.job/0123456789abcdef/{name}"
        os.rename("qkv.h5", place)
        argv = [place if word == "qkv.h5" else word for word in command(case)]
        assert run(argv) == 2
        assert run([*argv, "--restart"]) == 2
        os.rename(place, "qkv.h5")
    assert run(command(case)) == 0


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
def test_a_file_that_is_removed_while_it_is_read_is_gone_and_not_damaged(here, monkeypatch, number) -> None:
    """A network file system says so of a file that another machine removes."""

    def gone(path, *_arguments):
        raise OSError(number, os.strerror(number), path)

    for module in (claims, records):
        monkeypatch.setattr(module, "open", gone, raising=False)
    with pytest.raises(FileNotFoundError):
        records.read_record("out.h5.job/job")
    assert claims.Observer("out.h5.job").is_gone("01234567")


def test_the_name_of_states_is_on_the_disk_before_a_checkpoint_names_them(here, monkeypatch) -> None:
    """Also where the first commits of an attempt have none: tiles that were finished in between."""
    case = CASES[2]
    make(case)
    Path("scratch").mkdir()
    events = []

    def synced(path) -> None:
        events.append(os.path.basename(path))

    usual = attempt.write_record
    monkeypatch.setattr(attempt, "sync_directory", synced)
    monkeypatch.setattr(attempt, "write_record", lambda path, facts: (events.append(facts), usual(path, facts)))
    assert main([*command(case), "--scratch", "scratch"]) == 0
    facts = [event for event in events if isinstance(event, dict)]
    assert not facts[0]["states"]  # the case is what it is to be
    first = next(number for number, event in enumerate(events) if isinstance(event, dict) and event["states"])
    assert "scratch" in events[:first]
    assert events.count("scratch") == 1
