"""The command: what it prints as text and as JSON, its exit codes, its progress, and how it ends when it is stopped."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import environment, run_command

from cqsa_arrays import Options, attention
from cqsa_arrays.durable import status
from cqsa_arrays.verification import verify

COMMAND = [sys.executable, "-c", "import sys; from cqsa_arrays.cli import main; sys.exit(main())"]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with in.h5 and its attention out.h5."""
    folder = tmp_path_factory.mktemp("made")
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 500, 16)).astype("f4")
    with h5py.File(folder / "in.h5", "w") as file:
        file["q"], file["k"], file["v"] = q, k, v
    inputs = [f"{folder}/in.h5:/{name}" for name in "qkv"]
    attention(*inputs, causal=True, out=folder / "out.h5")
    return folder


@pytest.fixture
def command(capsys, monkeypatch, made):
    """``command("info in.h5")`` in the folder of ``made``."""
    monkeypatch.chdir(made)
    return lambda line: run_command(capsys, *line.split())


# ---- what each subcommand prints


def test_attend_says_what_it_did_and_how_to_check_it(command):
    done = command("attend in.h5 -o one.h5 --memory 8MiB --causal --dtype float64 --threads 1")
    assert (done.code, done.err) == (0, "")
    first, second, third = done.out.splitlines()
    assert first == "one.h5: /out hnd(2, 500, 16) float64, and /lse"
    assert re.fullmatch(
        r"[\d.]+ s, [\d.]+ GFLOP/s, \w+ cover, read [\d.]+ \wiB, moved .* of states, held at most .*", second
    )
    assert third == "check it: cqsa verify one.h5"
    assert command(third.removeprefix("check it: cqsa ")).code == 0


def test_attend_quiet_prints_nothing(command):
    done = command("attend in.h5 -o quiet.h5 --quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert Path("quiet.h5").exists()


def test_attend_json_holds_the_plan_and_what_was_moved(command):
    done = command("attend in.h5 -o json.h5 --json --cover rectangular --offset 7")
    found = json.loads(done.out)
    assert done.code == 0
    assert set(found) == {"out", "elapsed_s", "flops", "input_read_bytes", "state_moved_bytes", "plan"}
    assert found["out"] == "json.h5"
    assert found["input_read_bytes"] >= 3 * 2 * 500 * 16 * 4
    assert found["plan"]["chosen"]["cover"] == "rectangular"
    assert found["plan"]["problem"]["mask"] == {"kind": "causal", "offset": 7}


def test_attend_takes_each_input_from_its_own_file(command):
    done = command("attend in.h5 -o own.h5 --q in.h5:/v --k in.h5:/v --v in.h5:/q")
    assert done.code == 0
    with h5py.File("in.h5") as inputs, h5py.File("own.h5") as out:
        q, v = inputs["q"][...], inputs["v"][...]
        assert np.allclose(out["out"][...], attention(v, v, q), atol=1e-6)


def test_plan_shows_its_table_and_writes_nothing(command):
    before = sorted(os.listdir())
    done = command("plan in.h5 --memory 4MiB --causal")
    assert (done.code, done.err) == (0, "")
    for words in ("plan ", "causal, offset 0", "memory\n", "kernel scratch", "of 4 MiB (memory='4MiB')", "price"):
        assert words in done.out
    assert sorted(os.listdir()) == before


def test_plan_json_is_the_plan(command):
    found = json.loads(command("plan in.h5 --memory 4MiB --chunks 3 --cover cqs --json").out)
    keys = {
        "identity", "device", "kernel", "problem", "budget", "memory_bytes", "flops", "reason", "chosen", "alternative",
        "durability",
    }  # fmt: skip
    assert set(found) == keys
    assert found["budget"]["memory_bytes"] == 4 << 20
    assert found["memory_bytes"] == sum(term["size_bytes"] for term in found["chosen"]["terms"])
    assert (found["chosen"]["cover"], found["chosen"]["query_parts"]) == ("cqs", 3)
    assert found["flops"] == 2 * 32 * 2 * 500 * 500


def test_verify_reports_errors_rows_and_seed(command):
    done = command("verify out.h5 --rows 10 --seed 3")
    assert done.code == 0
    assert re.match(
        r"PASSED: relative Frobenius error \S+ \(tolerance 2e-06\) over 20 rows, sampled with seed 3", done.out
    )
    for words in ("worst row", "worst element", "0 NaN, 0 inf", "log-sum-exp"):
        assert words in done.out


def test_verify_json_and_all_rows(command):
    found = json.loads(command("verify out.h5 --rows all --json").out)
    keys = {
        "passed", "frobenius", "worst_row", "worst_element", "nans", "infs", "mismatches", "rows", "tolerance", "lse",
        "seed", "verdict", "inherent", "undetermined", "arithmetic",
    }  # fmt: skip
    assert set(found) == keys
    assert (found["passed"], found["rows"], found["seed"]) == (True, 1000, None)


def test_compare_tells_equal_from_different(command):
    same, other = command("compare out.h5:/out out.h5:/out --json"), command("compare out.h5:/out in.h5:/q")
    assert (same.code, json.loads(same.out)["frobenius"]) == (0, 0.0)
    assert other.code == 1
    assert other.out.startswith("FAILED: relative Frobenius error")
    assert command("compare out.h5:/out in.h5:/q --tolerance 9").code == 0


def test_info_lists_the_data_sets(command):
    text = command("info out.h5")
    assert (text.code, text.err) == (0, "")
    assert re.search(r"^/out +2 x 500 x 16 +hnd +float32 +contiguous", text.out, re.MULTILINE)
    found = json.loads(command("info out.h5 --json").out)
    assert set(found) == {"path", "size_bytes", "datasets", "attributes"}
    assert [one["name"] for one in found["datasets"]] == ["/lse", "/out"]
    assert found["size_bytes"] == os.path.getsize("out.h5")


def test_make_writes_what_info_then_shows(command):
    done = command("make small.h5 --tokens 300 --heads 2 --key-tokens 200 --value-dim 8 --dtype float16 --layout nhd")
    assert (done.code, done.err) == (0, "")
    assert done.out == command("info small.h5").out
    assert re.search(r"^/v +200 x 2 x 8 +nhd +float16 +contiguous", done.out, re.MULTILINE)
    chunked = command("make chunked.h5 --tokens 300 --chunk-tokens 100 --compression gzip --json")
    assert {one["kind"] for one in json.loads(chunked.out)["datasets"]} == {"chunked"}
    again = command("make small.h5 --tokens 300 --overwrite")
    assert (again.code, command("attend small.h5 -o made.h5").code, command("verify made.h5").code) == (0, 0, 0)


def test_overwrite_replaces_an_output(command):
    assert command("attend in.h5 -o twice.h5").code == 0
    first = Path("twice.h5").stat().st_ino
    again = command("attend in.h5 -o twice.h5")
    assert (again.code, "nothing was left to compute" in again.out) == (0, True)
    assert command("attend in.h5 -o twice.h5 --causal").code == 2
    assert Path("twice.h5").stat().st_ino == first
    assert command("attend in.h5 -o twice.h5 --overwrite --causal").code == 0
    assert command("compare twice.h5:/out out.h5:/out --tolerance 0").code == 0


@pytest.mark.parametrize("name", ["", "attend ", "plan ", "verify ", "compare ", "make ", "info ", "demo "])
def test_help_of_each_command(command, name):
    done = command(f"{name}--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: cqsa {name}".rstrip())
    assert ("--json" in done.out) == bool(name)


def test_version(command):
    done = command("--version")
    assert (done.code, done.out.split()[0]) == (0, "cqsa_arrays")


# ---- a wrong output is found


def test_verify_fails_on_one_wrong_element(command):
    assert command("attend in.h5 -o wrong.h5").code == 0
    row = 0  # the first row is in every sample
    with h5py.File("wrong.h5", "r+") as file:
        file["out"][1, row, 5] += 0.01
    done = command("verify wrong.h5 --rows 4 --json")
    found = json.loads(done.out)
    assert (done.code, found["passed"]) == (1, False)
    assert found["worst_element"]["index"] == [0, 1, row, 5]
    assert not verify("wrong.h5", rows=4).passed


def test_verify_fails_on_a_wrong_log_sum_exp(command):
    assert command("attend in.h5 -o lse.h5").code == 0
    with h5py.File("lse.h5", "r+") as file:
        file["lse"][0, 499] += 0.001
    done = command("verify lse.h5 --rows 4")
    assert (done.code, done.out[:6]) == (1, "FAILED")


def test_verify_refuses_inputs_that_have_changed(command):
    assert command("make moving.h5 --tokens 200").code == 0
    assert command("attend moving.h5 -o moved.h5").code == 0
    assert command("make moving.h5 --tokens 200 --seed 1 --overwrite").code == 0
    done = command("verify moved.h5")
    assert done.code == 2
    assert "moving.h5:/q has changed since" in done.err


# ---- as a process: terminals, pipes, signals


def start(folder: Path, *words: object, **streams: object) -> subprocess.Popen[bytes]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **streams}
    return subprocess.Popen([*COMMAND, *map(str, words)], cwd=folder, **streams)


def test_no_progress_where_there_is_no_terminal(made):
    for words in (("attend", "in.h5", "-o", "silent.h5"), ("make", "silent_in.h5", "--tokens", 5000)):
        out, err = start(made, *words).communicate(timeout=WAIT_S)
        assert out
        assert err == b""


def on_a_terminal(folder: Path, *words: object) -> str:
    """What the command writes to standard error where that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows and columns
    process = start(folder, *words, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(ours)
    assert process.wait(WAIT_S) == 0
    process.stdout.close()
    return shown.decode()


def test_a_terminal_gets_a_bar_with_rate_and_time_left(made):
    shown = on_a_terminal(made, "attend", "in.h5", "-o", "shown.h5")
    assert re.search(r"attend: 100%\|.*\| [\d.]+M/[\d.]+MFLOP \[\d\d:\d\d<\d\d:\d\d, .*FLOP/s\]", shown), shown
    assert "attend" not in on_a_terminal(made, "attend", "in.h5", "-o", "quieter.h5", "--quiet")


@pytest.mark.parametrize("words", [["info", "in.h5"], ["verify", "out.h5", "--json"], ["plan", "in.h5"]])
def test_nobody_reads_the_output(made, words):
    """As in ``cqsa info x | head -1`` where head is quicker: no traceback, and not the code of success."""
    read, write = os.pipe()
    os.close(read)
    process = start(made, *words, stdout=write)
    os.close(write)
    assert (process.communicate(timeout=WAIT_S)[1], process.returncode) == (b"", 141)


def test_a_reader_that_wants_one_line(made):
    line = f"{subprocess.list2cmdline(COMMAND)} info in.h5 | head -1"
    done = subprocess.run(
        line, shell=True, cwd=made, env=environment(), capture_output=True, timeout=WAIT_S, check=True
    )
    assert done.stdout.startswith(b"in.h5, ")
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("number", "code", "says", "flags"),
    [
        (signal.SIGINT, 130, b"cqsa attend: interrupted; what was committed is kept: cqsa resume out.h5\n", []),
        (
            signal.SIGTERM, 143, b"cqsa attend: terminated; what was committed is kept: cqsa resume out.h5\n",
            ["--cover", "cqs", "--chunks", 7, "--memory", "16MiB"],
        ),
    ],
    ids=["Ctrl-C", "SIGTERM, on disk"],
)  # fmt: skip
def test_stopped_by_a_signal_what_is_done_is_kept(tmp_path, number, code, says, flags):
    """A job of minutes: it must end soon, so a limit on the wait is part of what is tested."""
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["q"] = file["k"] = file["v"] = np.ones((4, 60_000, 32), "f4")
    process = start(
        tmp_path,
        "attend",
        "in.h5",
        "-o",
        "out.h5",
        "--checkpoint",
        "0.1",
        *flags,
        env=environment(TMPDIR=str(tmp_path)),
    )
    deadline = time.monotonic() + WAIT_S
    while not (tmp_path / "out.h5.part").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while not ((tmp_path / "out.h5.job/job").exists() and status(str(tmp_path / "out.h5")).done_pairs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == says
    assert process.returncode == code
    assert sorted(os.listdir(tmp_path)) == ["in.h5", "out.h5.job", "out.h5.part"]
    found = status(str(tmp_path / "out.h5"))
    assert 0 < found.done_pairs < found.pairs
    assert not found.running


def test_a_lost_terminal_does_not_stop_what_nohup_started(tmp_path):
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["q"] = file["k"] = file["v"] = np.ones((4, 8_000, 32), "f4")
    with patch_signal(signal.SIGHUP, signal.SIG_IGN):
        process = start(tmp_path, "attend", "in.h5", "-o", "out.h5")
    while not (tmp_path / "out.h5.part").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=WAIT_S)[1] == b""
    assert process.returncode == 0


@contextmanager
def patch_signal(number: int, handler: object) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "replace"])
def test_interrupted_in_the_system_nothing_is_left(call, command, monkeypatch):
    """Ctrl-C while space is reserved, data go to the disk or the file gets its name: the old output stays."""
    assert command("attend in.h5 -o stays.h5 --overwrite").code == 0
    before = {name: os.stat(name).st_mtime_ns for name in sorted(os.listdir())}

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, call, interrupted)
        done = command("attend in.h5 -o stays.h5 --overwrite")
    assert (done.code, done.out) == (130, "")
    assert {name: os.stat(name).st_mtime_ns for name in before} == before
    if call != "posix_fallocate":  # begun: it goes on
        assert command("attend in.h5 -o stays.h5 --overwrite").code == 0
        assert command("verify stays.h5").code == 0
    assert sorted(os.listdir()) == sorted(before)


def test_a_library_call_shows_progress_only_if_asked(made, capfd):
    attention(*(f"{made}/in.h5:/{name}" for name in "qkv"), options=Options(progress=True))
    assert capfd.readouterr().err == ""
