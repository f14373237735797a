"""Files that another program has locked, or whose disk has no locks: what can be done is said, done and remembered."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import run_command
from storage_files import normal, qkv

import cqsa_arrays as cqsa
from cqsa_arrays import ArgumentError, JobStopped, Options, StorageError
from cqsa_arrays.durable import Stop
from cqsa_arrays.durable.ending import was_finished
from cqsa_arrays.durable.fact import current
from cqsa_arrays.durable.folder import JobFolder
from cqsa_arrays.job import Request, prepared
from cqsa_arrays.partial import verify_partial
from cqsa_arrays.resumable import attend, resumed

X = normal((2, 300, 8))
UNLOCKED = Options(locking=False)


@contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """What HDF5 meets where another program writes a file."""
    files = [path.open("rb") for path in paths]
    try:
        for file in files:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        for file in files:
            file.close()


@pytest.fixture(autouse=True)
def locks_count(monkeypatch):
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)


@pytest.fixture(params=["contiguous", "chunked"])
def inputs(tmp_path, monkeypatch, request) -> Path:
    monkeypatch.chdir(tmp_path)
    return qkv(Path("in.h5"), X, **({"chunks": (1, 50, 8)} if request.param == "chunked" else {}))


def named(path: Path) -> list[str]:
    return [f"{path}:/{name}" for name in "qkv"]


def test_a_lock_is_named_with_what_can_be_done(inputs, capsys):
    says = r"in\.h5 cannot be locked .*Options\(locking=False\).*HDF5_USE_FILE_LOCKING=FALSE"
    with locked(inputs):
        for call in (cqsa.open, lambda path: cqsa.attention(*named(path)), lambda path: cqsa.plan(*named(path))):
            with pytest.raises(StorageError, match=says):
                call(inputs)
        assert "--locking off" in run_command(capsys, "plan", inputs).err
    opened = cqsa.open(inputs)
    with locked(inputs):
        if opened.q.stored.offset is None:
            with pytest.raises(StorageError, match=says):
                opened.q[0]
            with pytest.raises(StorageError, match=says):
                cqsa.attention(opened.q, opened.k, opened.v)
        expected = cqsa.attention(*named(inputs), options=UNLOCKED)
        opened = cqsa.open(inputs, locking=False)
        assert np.array_equal(cqsa.attention(opened.q, opened.k, opened.v), expected)
        assert np.array_equal(opened.q[...], X)


def test_a_folder_called_locks_is_not_a_lock(tmp_path):
    path = tmp_path / "locked blocks, truncated.h5"
    path.write_bytes(b"no HDF5")
    with pytest.raises(StorageError, match="is not an HDF5 file"):
        cqsa.open(path)


def test_a_file_whose_writer_was_killed_is_named_with_what_can_be_done(tmp_path):
    """A mark in the file itself, which no option passes over."""
    writes = (
        "import h5py, os\n"
        "file = h5py.File('x.h5', 'w', libver='latest')\n"
        "file.create_dataset('q', (9, 4), 'f4', chunks=(3, 4))\n"
        "file.swmr_mode = True\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", writes], cwd=tmp_path, check=True)
    with pytest.raises(StorageError, match=r"x\.h5 is marked as being written\. .*h5clear -s .*x\.h5"):
        cqsa.open(tmp_path / "x.h5", locking=False)


@pytest.mark.parametrize("value", ["off", 0, "best effort", None])
def test_only_what_h5py_takes_is_taken(value, inputs):
    if value is None:
        assert cqsa.open(inputs, locking=value)
        return
    for call in (lambda: cqsa.open(inputs, locking=value), lambda: cqsa.plan(X, X, X, options=Options(locking=value))):
        with pytest.raises(ArgumentError, match=r"locking: found .*; expected True, False, 'best-effort' or None"):
            call()


def test_every_command_opens_without_locks(inputs, capsys):
    with locked(inputs):
        for command in (["info", inputs], ["plan", inputs], ["attend", inputs, "-o", "out.h5"]):
            assert run_command(capsys, *command).code == 2
            assert run_command(capsys, *command, "--locking", "off").code == 0
        assert run_command(capsys, "verify", "out.h5").code == 0  # it remembers how its inputs were opened
        with locked(Path("out.h5")):
            for command in (["verify", "out.h5"], ["compare", "out.h5", "--against", "cpu"]):
                assert run_command(capsys, *command).code == 2
                assert run_command(capsys, *command, "--locking", "off").code == 0
            assert run_command(capsys, "compare", "out.h5:/out", "out.h5:/out", "--locking", "off").code == 0
        assert run_command(capsys, "attend", inputs, "-o", "out2.h5", "--locking", "of").code == 2


def test_files_are_made_where_nothing_can_be_locked(inputs, monkeypatch, capsys):
    """Every file that is opened by its name is opened without a lock."""
    opened, whole = [], h5py.File.__init__

    def seen(self, name, mode="r", *args, **options):
        if isinstance(name, (str, os.PathLike)):  # not the file of an open data set
            opened.append((Path(name).name, options.get("locking")))
        whole(self, name, mode, *args, **options)

    monkeypatch.setattr(h5py.File, "__init__", seen)
    cqsa.attention(*named(inputs), out="out.h5", options=UNLOCKED)
    cqsa.attention(*named(inputs), out="job.h5", options=Options(locking=False, durable=True))
    cqsa.verify("out.h5", locking=False)
    run_command(capsys, "make", "made.h5", "--tokens", 9, "--locking", "off")
    run_command(capsys, "make", "chunks.h5", "--tokens", 9, "--chunk-tokens", 3, "--locking", "off")
    assert {name for name, _ in opened} >= {
        "in.h5",
        "out.h5",
        "out.h5.part",
        "output",  # of the job
        "made.h5",
        "chunks.h5.part",
    }
    assert {locking for _, locking in opened} == {False}


class StopSoon(Stop):
    """Asks to stop at the third safe place, when something is committed."""

    polls = 0

    def reason_within(self, ahead_s: float) -> str | None:
        self.polls += 1
        return "enough" if self.polls > 2 else None


@pytest.mark.parametrize("said_by", ["option", "array"])
def test_an_unfinished_job_remembers(inputs, capsys, said_by):
    """Resume, status and verify open the inputs as attend did, whether the option or the array said it."""
    opened = cqsa.open(inputs, locking=False)
    q, k, v = named(inputs) if said_by == "option" else (opened.q, opened.k, opened.v)
    locking = False if said_by == "option" else None
    options = Options(durable=True, locking=locking, checkpoint_s=0, cover="cqs", chunks=7, threads=1)
    with locked(inputs):
        with prepared(Request(q=q, k=k, v=v, out="out.h5", options=options)) as job, pytest.raises(JobStopped):
            attend(job, StopSoon())
        assert run_command(capsys, "status", "out.h5", "--json").code == 0
        with locked(Path("out.h5.part")):
            assert verify_partial("out.h5").passed
        assert resumed("out.h5", device=None, memory=None, options=Options()).options.locking is False
        fact = current(JobFolder("out.h5"))
        assert run_command(capsys, "resume", "out.h5").code == 0
        with locked(Path("out.h5")):
            assert was_finished("out.h5", fact)  # as a process asks that others have overtaken
        assert run_command(capsys, "verify", "out.h5").code == 0
