"""Files on which HDF5 itself crashes or never comes back: met in a child process, named, and left alone."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from command_line import environment, run_command

from cqsa_arrays import StorageError
from cqsa_arrays.cli import trial


def crash() -> None:
    ctypes.string_at(0)


def compute_for_ever() -> None:
    while True:
        pass


def complain() -> None:
    os.write(1, b"in a child")
    raise KeyError("for the caller to meet again")


def test_a_crash_is_named():
    with pytest.raises(StorageError, match=r"x\.h5:/q is damaged: HDF5 crashes \(SIGSEGV\) on reading its structure"):
        trial.survive("x.h5:/q", crash)


def test_a_loop_is_ended(monkeypatch):
    monkeypatch.setattr(trial, "CPU_SECONDS", 1)
    with pytest.raises(StorageError, match=r"x\.h5 is damaged: HDF5 does not come back from reading its structure"):
        trial.survive("x.h5", compute_for_ever)


@pytest.mark.parametrize("look", [complain, lambda: sys.exit(3), lambda: None])
def test_what_a_look_finds_is_left_to_the_caller(look, capfd):
    trial.survive("x.h5", look)
    assert capfd.readouterr() == ("", "")


def test_a_slow_disk_is_waited_for(monkeypatch):
    monkeypatch.setattr(trial, "CPU_SECONDS", 1)
    trial.survive("x.h5", lambda: time.sleep(1.5))


def test_an_interruption_ends_the_child_too(tmp_path):
    """Ctrl-C while HDF5 is in a loop: the child, which is in the same group, is gone as well."""
    code = "from cqsa_arrays.cli import trial\n"
    code += "def loop():\n open('begun', 'w').close()\n while True: pass\n"
    code += "trial.survive('x.h5', loop)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), start_new_session=True, stderr=subprocess.PIPE
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("command", ["info in.h5", "plan in.h5", "verify in.h5", "compare in.h5:/q in.h5:/k"])
def test_zeros_in_the_heap_of_attributes_do_not_stop_the_command(command, tmp_path, monkeypatch, capsys):
    """HDF5 2.0 reads an object of no size there, again and again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "CPU_SECONDS", 1)
    with h5py.File("in.h5", "w") as file:
        for name in "qkv":
            file[name] = np.zeros((20, 8), "f4")
            file[name].attrs["layout"] = "nd"
    content = bytearray((tmp_path / "in.h5").read_bytes())
    heap = content.index(b"GCOL") + 16
    content[heap : heap + 1024] = bytes(1024)
    (tmp_path / "in.h5").write_bytes(content)
    done = run_command(capsys, *command.split())
    assert done.code == 2
    assert done.err.startswith(f"cqsa {command.split()[0]}: ")
    assert done.err.count("\n") == 1
    assert (tmp_path / "in.h5").read_bytes() == content
