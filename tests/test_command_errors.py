"""What the command says of what it cannot do: in its own words, on one line, whatever the value of an option."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import Outcome, run_command

import cqsa_arrays as cqsa
from cqsa_arrays.cli import main, trial
from cqsa_arrays.cli.parser import build_parser
from cqsa_arrays.engine import progress

IN_PYTHON = re.compile(r"Options\(|\b[a-z_]+='|\b(memory|out|layout|chunks|device|dtype|tolerance)=|cqsa\.[a-z]+\(")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with in.h5, its attention out.h5 and the unfinished job of part.h5: nothing here changes them."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        with h5py.File("in.h5", "w") as file:
            file["q"] = file["k"] = file["v"] = np.random.default_rng(0).standard_normal((2, 60, 8)).astype("f4")
        cqsa.attention(*(f"in.h5:/{name}" for name in "qkv"), out="out.h5")
        assert main(["attend", "in.h5", "-o", "part.h5", "--max-time", "0", "--threads", "1"]) == 3
    return folder


@pytest.fixture
def command(capsys, monkeypatch, made):
    """``command("info", "in.h5")`` in that folder."""
    monkeypatch.chdir(made)
    return lambda *words: run_command(capsys, *words)


def is_one_line(done: Outcome, name: str) -> bool:
    """Whether nothing but one line was said, or the usage and one line."""
    lines = done.err.splitlines()
    told = len(lines) == 1 or lines[0].startswith("usage: ")
    return (done.code, done.out, told) == (2, "", True) and re.match(f"cqsa {name}: ", lines[-1]) is not None


REFUSED = [
    ("attend in.h5 -o out.h5 --causal", "--out: found out.h5, which exists; .* or replace it: --overwrite."),
    ("plan in.h5 --memory 1K", r"--memory: .* 1 KiB \(--memory 1K\); .*Pass --memory \d+ or more."),
    ("plan in.h5 --host-memory 1K", r"\(--host-memory 1K\)"),
    ("plan in.h5 --memory 12x", "--memory: found '12x'; .*Pass for example --memory 2GiB."),
    ("plan in.h5 --chunks 3 --cover rectangular", "--chunks: found 3; expected no number of chunks with --cover rect"),
    ("attend in.h5 -o new.h5 --device cuda:h200", "--device: .*A model can only be planned for"),
    ("attend in.h5 -o part.h5 --causal", "mask: found causal, offset 0; expected full, .*over with --restart."),
    ("attend in.h5 -o part.h5 --chunks 3 --lanes 2", "--lanes: found 2; .*over with --restart."),
    ("resume part.h5 --memory 1K", r"--memory: .*Pass --memory \d+ or more; what was committed is kept"),
    ("make part.h5 --tokens 5", "Finish it with cqsa resume part.h5, or drop it with cqsa attend --restart."),
    ("make in.h5 --tokens 5", "replace it: --overwrite."),
    ("make new.h5 --tokens 5 --compression gzip", "--compression: .*Pass --chunk-tokens N, too."),
    ("make new.h5 --tokens 5 --shared --key-tokens 3", "--shared: found --key-tokens or --value-dim"),
    ("verify part.h5", r"whose job is unfinished: 0.00% done; .*cqsa verify part.h5 --partial, .*cqsa resume part.h5."),
    ("verify part.h5 --partial", "nothing is committed yet; .*cqsa status part.h5 shows"),
    ("compare part.h5 --against cpu", "unfinished"),
    ("compare out.h5", "reference: found none; expected a data set, or --against cpu"),
    ("compare out.h5 --against gpu", "--against: found 'gpu'"),
    ("resume in.h5", "found in.h5, which no job has written; expected the output of a job."),
    ("plan in.h5 --scale 1e38", "--scale: found 1e.38; expected a finite number of at most .* float32"),
    ("plan in.h5 --layout nd --q in.h5:/q", "q: found 3 dimensions; expected 2, for layout 'nd'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), REFUSED, ids=[case[0] for case in REFUSED])
def test_it_speaks_of_its_own_options(line, says, command) -> None:
    done = command(*line.split())
    assert is_one_line(done, line.split()[0]), done
    assert re.search(says, done.err), done.err
    assert not IN_PYTHON.search(done.err), done.err


def test_what_is_not_a_name_for_it_is_said(command) -> None:
    """A variable of the shell that is not set."""
    for words in (("attend", "in.h5", "-o", ""), ("plan", "in.h5", "--memory", ""), ("info", ""), ("plan", "")):
        done = command(*words)
        assert is_one_line(done, words[0])
        assert "found ''; expected" in done.err
        assert "Look at the variable" in done.err


def test_python_hears_of_its_own(command) -> None:
    with pytest.raises(cqsa.ArgumentError, match=r"replace it: Options\(overwrite=True\)\.$"):
        cqsa.attention(*(f"in.h5:/{name}" for name in "qkv"), out="out.h5")
    with pytest.raises(cqsa.ArgumentError, match=r"unfinished: 0\.00% done.*cqsa\.resume\('part\.h5'\)\.$"):
        cqsa.verify("part.h5")


# ---- every option that takes a number or a name

ODD = [str(10**18), str(10**43), "-1", "nan", "inf", "1e400", "x", "", "9" * 5000]
LINES = {
    "plan": ["in.h5"], "verify": ["out.h5"], "compare": ["in.h5:/q", "in.h5:/k"],
    "make": ["new.h5", "--tokens", "5", "--chunk-tokens", "5"], "demo": ["--samples", "1"], "resume": ["out.h5"],
}  # fmt: skip
# Names of files and data sets are tried elsewhere.
NAMES = ("q", "k", "v", "scratch", "out", "directory", "device")
VALUED = [
    (name, action.option_strings[-1])
    for name, parser in build_parser().commands.items()
    for action in parser.actions
    if action.option_strings and action.nargs != 0 and name in LINES and action.dest not in NAMES
]


@pytest.mark.parametrize(("name", "option"), VALUED, ids=[" ".join(case) for case in VALUED])
def test_odd_values_end_in_one_line(name, option, command, monkeypatch) -> None:
    monkeypatch.setattr(trial, "survive", lambda place, look: None)  # the files are sound
    for value in ODD:
        done = command(name, *LINES[name], f"{option}={value}")
        if done.code == 2:
            assert is_one_line(done, name), (value, done)
        else:
            assert done.code in (0, 1), (value, done)
            assert done.err == ""
        assert not IN_PYTHON.search(done.err), done.err
        Path("new.h5").unlink(missing_ok=True)


BOUNDS = [
    ("make new.h5 --tokens 1e18", "--tokens: found 1000000000000000000, which makes .* TiB of inputs; "),
    ("make new.h5 --tokens 5 --seed 1e39", "--seed: found 10*; expected at least 0 and less than"),
    ("make new.h5 --tokens 5 --seed -1", "--seed: found -1; expected at least 0"),
    ("make new.h5 --tokens 5 --heads 1e18", "of inputs; expected less than"),
    ("make new.h5 --tokens 5 --head-dim 1e6", "--head-dim: found 1000000; expected at most 65536"),
    ("make new.h5 --tokens 1e7 --chunk-tokens 1e7 --head-dim 1024", "--chunk-tokens: .*chunks of .*4 GiB"),
    ("make new.h5 --tokens 5 --scale 1e38", "--scale: found 1e.38; expected a standard deviation of which float32"),
    ("make new.h5 --tokens 5 --dtype float16 --scale 1e4", "--scale: found 10000.0; .* float16 holds 16"),
    ("plan in.h5 --lanes 1e18", "--lanes: found 10*; expected a whole number, at most 65536"),
    ("plan in.h5 --threads 1e18", "--threads: found 10*; expected a whole number, at most 65536"),
    ("plan in.h5 --offset 1e19", "--offset: found 10*; expected a whole number from -2"),
    ("plan in.h5 --dtype " + "9" * 5000, "--dtype: found '9*'; expected one of float16"),
    ("compare out.h5 --against cpu --seed -1", "--seed: found -1; expected a whole number, at least 0"),
    ("verify part.h5 --partial --rows 0", "--rows: found 0; expected a whole number, at least 1"),
    ("verify part.h5 --partial --seed -1", "--seed: found -1; expected a whole number, at least 0"),
]


@pytest.mark.parametrize(("line", "says"), BOUNDS, ids=[case[0][:60] for case in BOUNDS])
def test_bounds_are_named(line, says, command) -> None:
    done = command(*line.split())
    assert is_one_line(done, line.split()[0]), done
    assert re.search(says, done.err), done.err
    assert not Path("new.h5").exists()


# ---- scale


@pytest.mark.parametrize("scale", [1e38, 1e29, -1e38, 1e300, np.float32(3e38)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_scale_that_makes_scores_infinite_is_refused(scale, dtype) -> None:
    x = np.random.default_rng(0).standard_normal((2, 50, 8)).astype(dtype)
    for call in (cqsa.attention, cqsa.plan, cqsa.statistics):
        with pytest.raises(
            cqsa.ArgumentError, match=r"^scale: found .*; expected a finite number of at most .* float32"
        ):
            call(x, x, x, scale=scale)


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 5e28), ("float32", -5e28), ("float32", 0), ("float64", 1e298)]
)
def test_any_other_gives_numbers(dtype, scale) -> None:
    x = np.random.default_rng(0).standard_normal((2, 50, 8)).astype(dtype)
    assert np.isfinite(cqsa.attention(x, x, x, scale=scale)).all()


def test_double_precision_has_a_bound_of_its_own() -> None:
    x = np.ones((2, 5, 8))
    with pytest.raises(cqsa.ArgumentError, match=r"^scale: found 1e\+300; .* infinite in float64"):
        cqsa.attention(x, x, x, scale=1e300)


# ---- JSON


def test_json_is_one_object_or_nothing(command) -> None:
    for line, code in (("plan in.h5", 0), ("info in.h5", 0), ("verify out.h5", 0), ("compare out.h5:/out in.h5:/q", 1)):
        done = command(*line.split(), "--json")
        assert done.code == code
        json.loads(done.out, parse_constant=pytest.fail)
    for line in ("plan in.h5 --memory 1K", "verify part.h5", "status in.h5", "info no.h5", "compare out.h5"):
        done = command(*line.split(), "--json")
        assert is_one_line(done, line.split()[0]), done


def test_json_of_results_that_are_no_numbers(command, tmp_path) -> None:
    with h5py.File(tmp_path / "nan.h5", "w") as file:
        file["a"] = np.full((2, 5), np.nan, "f4")
        file["b"] = np.full((2, 5), np.inf, "f4")
        file.attrs["x"] = np.nan
    for line in (f"compare {tmp_path}/nan.h5:/a {tmp_path}/nan.h5:/b", f"info {tmp_path}/nan.h5"):
        json.loads(command(*line.split(), "--json").out, parse_constant=pytest.fail)


# ---- jobs


def test_status_of_jobs_that_are_over_or_not(command) -> None:
    finished, part = command("status", "out.h5"), command("status", "part.h5")
    assert (finished.code, part.code) == (0, 0)
    assert finished.out.startswith("out.h5: finished")
    assert part.out.startswith("part.h5: 0.00% done, not running")
    states = [json.loads(command("status", name, "--json").out)["state"] for name in ("out.h5", "part.h5")]
    assert states == ["finished", "stopped"]


def test_status_of_what_is_no_output(command) -> None:
    for words in (["in.h5"], ["in.h5", "--json"]):
        done = command("status", *words)
        assert is_one_line(done, "status")
        assert re.search("found in.h5, which no job has written; expected the output of a job", done.err)
        assert "finished" not in done.err


def test_a_log_hears_of_a_job_now_and_then(command, monkeypatch, tmp_path) -> None:
    """Here after every step; without a terminal there is no bar."""
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    told = command("attend", "in.h5", "-o", tmp_path / "told.h5")
    assert re.search(r"^attend: 100\.0% done, [\d.e-]+ GFLOP/s, 0 s left$", told.err, re.MULTILINE), told
    assert "|" not in told.err
    assert command("attend", "in.h5", "-o", tmp_path / "quiet.h5", "--quiet").err == ""
    made = command("make", tmp_path / "made.h5", "--tokens", "100")
    assert re.search(r"^make: 100\.0% done, [\d.e-]+ GB/s, 0 s left$", made.err, re.MULTILINE), made
