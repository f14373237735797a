"""Files that pass for outputs, and names that a terminal cannot show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import environment, run_command

import cqsa_arrays as cqsa

X = np.random.default_rng(0).standard_normal((2, 300, 8)).astype("float32")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory, with the input in.h5 and its output out.h5."""
    monkeypatch.chdir(tmp_path)
    with h5py.File("in.h5", "w") as file:
        for name in "qkv":
            file[name] = X
    cqsa.attention(*(f"in.h5:/{name}" for name in "qkv"), out="out.h5")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], says: str) -> None:
    """verify and compare refuse out.h5 with one line, and leave it as it is."""
    before = Path("out.h5").read_bytes()
    for argv in (["verify", "out.h5"], ["compare", "out.h5", "--against", "cpu"]):
        done = run_command(capsys, *argv)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
        assert re.search(f"^cqsa {argv[0]}: path: {says}", done.err), done.err
    assert Path("out.h5").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("inputs", text) for text in ("{}", "[]", "null", "5", "", "[" * 100_000, '{"q": {}, "k": 5, "v": {}}')),
        *(("mask", text) for text in ("{}", "[]", '{"kind": "causal"}', '{"kind": "causal", "offset": 5e18}')),
        ("mask", f'{{"kind": "causal", "offset": {2**62 + 1}}}'),
        *(("scale", text) for text in ("one", "", [1.0, 2.0])),
    ],
)  # fmt: skip
def test_outputs_that_do_not_name_their_inputs_are_refused(name, value, folder, capsys):
    with h5py.File("out.h5", "r+") as file:
        file.attrs[name] = value
    refused(capsys, "found out.h5 without them .*; expected an output of cqsa attend")


@pytest.mark.parametrize("name", ["out", "lse"])
def test_outputs_of_another_shape_than_their_inputs_give_are_refused(name, folder, capsys):
    """Rows of the inputs beyond the end of such an output would be read from whatever lies there."""
    with h5py.File("out.h5", "r+") as file:
        short, layout = file[name][:, :200], file[name].attrs["layout"]
        del file[name]
        file[name] = short
        file[name].attrs["layout"] = layout
    says = rf"found out.h5:/{name} of logical shape \(1, 2, 200, .*; expected \(1, 2, 300, .* as its inputs give"
    refused(capsys, says)


def test_names_that_the_terminal_cannot_show_are_shown_as_escapes(folder):
    with h5py.File("odd.h5", "w") as file:
        file["\x1b[31mred\nblue"] = file["\u00e9"] = X
        file.attrs["note"] = "two\nlines"
    argv = [sys.executable, "-m", "cqsa_arrays", "info", "odd.h5"]
    done = subprocess.run(argv, env=environment(PYTHONIOENCODING="ascii"), capture_output=True, text=True, check=True)
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[2:4]] == [r"/\x1b[31mred blue", r"/\xe9"]
    assert done.stdout.endswith("note = two lines\n")
