"""A short run of the fuzzer of inputs; the long one is ``python tests/fuzz/fuzz_inputs.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_runner import Outcome, Session, changes, faults

import cqsa_arrays

HERE = Path(__file__).parent
CASES = 60


def test_damaged_files_and_odd_commands_end_with_a_message(tmp_path):
    argv = [sys.executable, HERE / "fuzz_inputs.py", "--cases", str(CASES), "--seed", "7", "--folder", tmp_path]
    environment = {"PYTHONPATH": str(Path(cqsa_arrays.__file__).parents[1]), "PATH": ""}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"'bytes': {CASES // 3}, 'structure': {CASES // 3}, 'command': {CASES // 3}" in done.stdout
    assert "attend: 0" in done.stdout


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (Outcome(0, "fine", ""), None),
        (Outcome(1, "FAILED", ""), None),
        (Outcome(2, "", "cqsa info: no.\n"), None),
        (Outcome(2, "", "usage: cqsa info\ncqsa info: error: no\n"), None),
        (Outcome(2, "", ""), "not one line"),
        (Outcome(2, "", "cqsa info: no.\nAnd no.\n"), "not one line"),
        (Outcome(2, "", "cqsa plan: no.\n"), "not one line"),
        (Outcome(2, "", "cqsa info: \x1b[2J\n"), "unprintable"),
        (Outcome(2, "half a table", "cqsa info: no.\n"), "an error after output"),
        (Outcome(0, "fine", "RuntimeWarning: overflow\n"), "on standard error"),
        (Outcome(130, "", "cqsa info: interrupted\n"), "exit code 130"),
        (Outcome(99, "", "", "Traceback: KeyError"), "KeyError"),
    ],
)
def test_the_fuzzer_sees_broken_promises(outcome, says):
    found = faults(("info", "x.h5"), outcome)
    assert found == [] if says is None else says in found[0]


def test_the_fuzzer_sees_files_that_were_made_or_changed(tmp_path):
    before = {"in.h5": b"1", "fifo": "mode 10644"}
    assert changes(before, dict(before)) == []
    assert changes(before, {"in.h5": b"2", "out.h5.part": b""}) == [
        "'fifo' was changed or removed", "'in.h5' was changed or removed", "'out.h5.part' was made"
    ]  # fmt: skip
    (tmp_path / "case").mkdir()
    session = Session(tmp_path / "case")
    assert session.run("info", "no.h5").code == 2
    assert session.problems == []
