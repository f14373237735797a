"""The command with standard streams that are closed, full or read by nobody: the same files, the same exit code."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import environment, run_command

import cqsa_arrays
from cqsa_arrays import Options, attention

COMMAND = [sys.executable, "-c", "import sys; from cqsa_arrays.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with in.h5, its attention out.h5, and wrong.h5, where one element is not."""
    folder = tmp_path_factory.mktemp("streams")
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 500, 16)).astype("f4")
    with h5py.File(folder / "in.h5", "w") as file:
        file["q"], file["k"], file["v"] = q, k, v
    inputs = [f"{folder}/in.h5:/{name}" for name in "qkv"]
    for name in ("out.h5", "wrong.h5"):
        attention(*inputs, out=folder / name, options=Options())
    with h5py.File(folder / "wrong.h5", "r+") as file:
        file["out"][0, 0, 0] += 1
    return folder


# What each command does where all is well, and its exit code.
LINES = {
    "info in.h5": 0,
    "plan in.h5 --json": 0,
    "verify out.h5": 0,
    "verify wrong.h5": 1,
    "compare wrong.h5:/out out.h5:/out": 1,
    "make made.h5 --tokens 10 --overwrite": 0,
    "attend in.h5 -o done.h5 --overwrite": 0,
    "info missing.h5": 2,
    "status out.h5": 0,
    "no-such-command": 2,
    "--version": 0,
}
by_line = pytest.mark.parametrize("line", LINES)


@pytest.fixture
def run(capsys, monkeypatch, made):
    """``run("info in.h5", stdout=None)``: the command in this process, with these streams in place of its own."""
    monkeypatch.chdir(made)

    def start(line: str, **streams: object):
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            return run_command(capsys, *line.split())

    return start


class Failing(io.StringIO):
    """A stream that takes no text."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def write(self, text: str) -> int:
        raise OSError(self.code, os.strerror(self.code))


@by_line
def test_standard_output_is_closed(line, run):
    done = run(line, stdout=None)
    assert (done.code, done.out) == (LINES[line], "")
    if LINES[line] == 2:
        assert done.err  # why, where that can still be said


@by_line
def test_standard_error_is_closed(line, run):
    done = run(line, stderr=None)
    assert (done.code, done.err) == (LINES[line], "")
    # Messages have no place in what other programs read.
    assert bool(done.out) == (LINES[line] != 2)


@by_line
def test_standard_input_is_closed(line, run):
    assert run(line, stdin=None).code == LINES[line]


@pytest.mark.parametrize(("line", "code"), [*zip(LINES, cycle([errno.ENOSPC, errno.EPIPE, errno.EIO]), strict=False)])
def test_standard_error_is_full_or_read_by_nobody(line, code, run):
    assert run(line, stderr=Failing(code)).code == LINES[line]


@pytest.mark.parametrize("line", [line for line, code in LINES.items() if code < 2 and line != "--version"])
def test_standard_output_is_full(line, run):
    done = run(line, stdout=Failing(errno.ENOSPC))
    assert (done.code, done.err) == (2, f"cqsa {line.split()[0]}: No space left on device\n")


def shell(redirected: str, *words: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """The command ``words`` as a shell starts it with ``redirected`` after it."""
    line = ["sh", "-c", f'exec "$0" "$@" {redirected}', *words]
    return subprocess.run(line, cwd=folder, env=environment(), capture_output=True, check=False, timeout=120)


NOISY = """
import os, sys
from cqsa_arrays import cli, storage
create = storage.output.OutputFile.create
def loud(*arguments, **options):
    made = create(*arguments, **options)
    for number in (1, 2):
        os.write(number, b"a library prints this")
    return made
storage.output.OutputFile.create = loud
sys.exit(cli.main())
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-"])
def test_what_libraries_print_never_goes_into_a_file(closed, made):
    """A file that is opened while a standard stream is closed gets its number."""
    words = [sys.executable, "-c", NOISY, "attend", "in.h5", "-o", "done.h5", "--overwrite", "--quiet"]
    done = shell(closed, *words, folder=made)
    assert done.returncode == 0, done.stderr
    with h5py.File(made / "done.h5") as file, h5py.File(made / "out.h5") as out:
        for name in ("out", "lse"):
            assert np.array_equal(file[name][...], out[name][...])


# Python writes once more when it ends, and ends with 120 where it cannot.
ENDS = {
    "info in.h5": (">&-", 0),
    "verify wrong.h5": ("<&- >&- 2>&-", 1),
    "info missing.h5": ("2>/dev/full", 2),
    "plan in.h5": (">/dev/full", 2),
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("line", ENDS)
def test_the_process_ends_as_it_should(line, made):
    redirected, code = ENDS[line]
    assert shell(redirected, *COMMAND, *line.split(), folder=made).returncode == code


@pytest.mark.parametrize(("line", "code"), [("--help", 0), ("info in.h5", 141)])
def test_nobody_reads_the_output(line, code, made):
    reader, writer = os.pipe()
    os.close(reader)
    words = [*COMMAND, *line.split()]
    done = subprocess.run(words, cwd=made, env=environment(PYTHONUNBUFFERED=""), stdout=writer, timeout=120)
    os.close(writer)
    assert done.returncode == code


@pytest.mark.parametrize("gone", [("stdout", "stderr"), ("stderr",)])
def test_a_library_call_with_progress_needs_no_standard_streams(gone, monkeypatch, tmp_path):
    """As in daemons and in programs without a console."""
    for name in gone:
        monkeypatch.setattr(sys, name, None)
    x = np.ones((1, 50, 8), "f4")
    for options in (Options(progress=True), Options(progress=True, durable=True)):
        out = tmp_path / "out.h5" if options.durable else None
        assert (cqsa_arrays.attention(x, x, x, out=out, options=options)[0] == 1).all()
