"""The examples run as people run them: from any directory, without arguments."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "compare.py": ("float64 in", "float32 in", "float16 in", "PASSED", "FAILED: relative Frobenius error"),
    "on_disk.py": ("24.01 MiB", "of 12 MiB (memory='12MiB')", "memory-mapped>", "PASSED: relative Frobenius error"),
    "pipeline.py": ("ndarray (4, 3000, 64) float32", "sees only itself: True", "12,000 keys at once: PASSED"),
}


@pytest.fixture(scope="module")
def run_example(tmp_path_factory):
    """What an example came to, which is run once, and the folder in which it ran."""
    return cache(lambda name: run_in(tmp_path_factory.mktemp("example"), name))


def run_in(folder, name):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120), folder


def test_every_example_is_known():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, run_example):
    done, folder = run_example(name)
    assert (done.returncode, done.stderr) == (0, "")
    missing = [text for text in EXPECTED[name] if text not in done.stdout]
    assert missing == [], done.stdout
    assert os.listdir(folder) == []


def test_compare_example_fails_only_where_it_says_so(run_example):
    output = run_example("compare.py")[0].stdout
    assert (output.count("PASSED"), output.count("FAILED")) == (3, 1)
