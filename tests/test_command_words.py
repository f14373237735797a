"""What people type: amounts as they write them, words that are mistyped, help, completion."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import h5py
import numpy as np
import pytest
from command_line import run_command

from cqsa_arrays.cli.parser import build_parser
from cqsa_arrays.cli.texts import COMMANDS
from cqsa_arrays.units import counted, parse_bytes, parse_count

ALL = list(COMMANDS)


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """``command("info in.h5")`` in a folder with in.h5."""
    monkeypatch.chdir(tmp_path)
    with h5py.File("in.h5", "w") as file:
        file["q"] = file["k"] = file["v"] = np.random.default_rng(0).standard_normal((2, 40, 8)).astype("f4")
    return lambda line: run_command(capsys, *line.split())


# ---- amounts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100000", 100_000), ("1e5", 100_000), ("1E5", 100_000), ("1e+5", 100_000), ("100k", 100_000),
        ("0.1M", 100_000),
        ("100_000", 100_000), ("1.5e3", 1500), (" 7 ", 7), ("-3", -3), ("+3", 3), ("-1e3", -1000), ("2G", 2 * 10**9),
        ("1T", 10**12), ("0", 0), ("1e18", 10**18), ("12.50e1", 125),
    ],
)  # fmt: skip
def test_counts_are_read(text, number) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "nan", "inf", "1.5", "1e-3", "1e400", "1e1e1", "0x10", "1,000", "10_00", "_1", "k", "1kk", "1kB",
     "٣", "²",
     "9" * 5000, "1 k k", "--1", "1e", "1m5"],
)  # fmt: skip
def test_what_is_no_count_is_refused(text) -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1G", 1 << 30), ("1g", 1 << 30),
     ("512M", 512 << 20), ("1.5 T", 3 << 39), ("64k", 64 << 10), ("1Gi", 1 << 30), ("1GB", 10**9)],
)  # fmt: skip
def test_sizes_are_read(text, size_bytes) -> None:
    assert parse_bytes(text, "memory") == size_bytes


def test_the_command_takes_them(command) -> None:
    assert command("make made.h5 --tokens 1e2 --heads 2").code == 0
    assert "/q        1 x 2 x 100 x 64" in command("info made.h5").out
    planned = command("plan made.h5 --memory 1G --host-memory 1Gi --threads 1 --json")
    assert json.loads(planned.out)["budget"]["memory_bytes"] == 1 << 30
    assert command("attend made.h5 -o out.h5 --memory 64M --dtype half --offset 1k").code == 0
    assert command("verify out.h5 --rows 0.01k --seed 1e2").code == 0
    with h5py.File("out.h5") as file:
        assert file["out"].dtype == np.float16


def test_the_file_is_needless_where_the_data_sets_are_named(command) -> None:
    done = command("attend --q in.h5:/q --k in.h5:/k --v in.h5:/v -o out.h5")
    assert (done.code, command("verify out.h5").code) == (0, 0)
    assert command("plan --q in.h5:/q --k in.h5:/k --v in.h5:/v").code == 0
    refused = command("plan --q in.h5:/q")
    assert refused.code == 2
    assert "required: QKV.h5, or --k and --v" in refused.err


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 budgets"), (1, "1 budget"), (2, "2 budgets"), (1234, "1,234 budgets")]
)
def test_plurals(count, text) -> None:
    assert counted(count, "budget") == text


# ---- what is mistyped

MISTYPED = [
    ("atend in.h5", "invalid choice: 'atend'; .*did you mean attend"),
    ("verfy out.h5", "did you mean verify"),
    ("attend in.h5 -o x.h5 --memroy 1G", "unknown option --memroy; did you mean --memory"),
    ("attend in.h5 --ouput x.h5", "unknown option --ouput; did you mean --out"),
    ("plan in.h5 --hostmemory=1G", "unknown option --hostmemory; did you mean --host-memory"),
    ("plan in.h5 --cover cqss", "--cover: found 'cqss'; .*Did you mean cqs"),
    ("plan in.h5 --dtype flaot16", "--dtype: found 'flaot16'; .*Did you mean float16"),
    ("plan in.h5 --layout bhdn", "--layout: .*Did you mean bnhd"),
    ("plan in.h5 --device cud", "--device: .*Did you mean cuda"),
    ("plan in.h5 --device cuda:h20", "--device: .*Did you mean cuda:h200"),
    ("make m.h5 --tokens 9 --chunk-tokens 3 --compression gzp", "--compression: .*Did you mean gzip"),
    ("completion bsh", "invalid choice: 'bsh'; .*did you mean bash"),
]


@pytest.mark.parametrize(("line", "says"), MISTYPED, ids=[case[0] for case in MISTYPED])
def test_what_was_meant_is_suggested(line, says, command) -> None:
    done = command(line)
    assert (done.code, done.out) == (2, "")
    assert re.search(says, done.err), done.err


def test_what_is_like_nothing_gets_no_suggestion(command) -> None:
    for line in ("xyz", "plan in.h5 --zzz 3", "plan in.h5 --layout w"):
        done = command(line)
        assert done.code == 2
        assert "id you mean" not in done.err


# ---- help


@pytest.mark.parametrize("name", ALL)
def test_help_has_a_description_examples_and_exit_codes(name, command) -> None:
    text = command(f"{name} --help").out
    described = COMMANDS[name]
    assert described.description.splitlines()[0] in text
    assert f"cqsa {name}" in text.partition("examples:")[2]
    for code in ("1    a verification", "2    an error", "3    a job stopped", "130", "141", "143"):
        assert code in text.partition("exit codes:")[2]


@pytest.mark.parametrize("name", ALL)
def test_every_option_with_a_value_says_its_default(name) -> None:
    for action in build_parser().commands[name].actions:
        assert action.help
        if action.option_strings and action.nargs != 0:
            assert "default: " in action.help or "(required)" in action.help, action.option_strings
            if isinstance(action.default, (int, float)):
                assert f"(default: {action.default:g})" in action.help


@pytest.mark.parametrize("name", ALL)
def test_examples_parse(name) -> None:
    for line in COMMANDS[name].examples.splitlines():
        words = line.partition(" > ")[0].split()
        if words[0] == "cqsa":
            assert build_parser().parse_args(words[1:]).command == name


def test_the_first_help_lists_every_command(command) -> None:
    text = command("--help").out
    for name, described in COMMANDS.items():
        assert name in text
        assert " ".join(described.summary.split()) in " ".join(text.split())
    assert "exit codes:" in text


# ---- completion


def completed(script: str, line: str) -> list[str]:
    """What bash offers at the end of ``line``."""
    words = line.split(" ")
    ask = f"COMP_WORDS=({' '.join(words)} {'' if words[-1] else chr(34) * 2}); COMP_CWORD={len(words) - 1}; _cqsa"
    done = subprocess.run(
        ["bash", "-c", f'{script}\n{ask}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(command) -> None:
    script = command("completion bash").out
    assert set(completed(script, "cqsa ")) == {*ALL, "--help", "--version"}
    assert completed(script, "cqsa ver") == ["verify"]
    assert completed(script, "cqsa plan --mem") == ["--memory"]
    assert {"--overwrite", "--restart", "-o"} <= set(completed(script, "cqsa attend -"))
    assert completed(script, "cqsa attend in.h5 --cover r") == ["rectangular"]
    assert "cuda:h200" in completed(script, "cqsa plan in.h5 --device cuda:h2")
    assert completed(script, "cqsa completion f") == ["fish"]
    assert completed(script, "cqsa info i") == ["in.h5"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_takes_its_script(shell, command) -> None:
    done = command(f"completion {shell}")
    assert (done.code, done.err) == (0, "")
    for name in (*ALL, "memory", "rectangular", "bfloat16"):
        assert name in done.out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.out, text=True, check=True)
