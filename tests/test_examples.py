"""The examples run as people run them: from any directory, without arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "compare.py": ("float64 in", "float32 in", "float16 in", "PASSED", "FAILED: relative Frobenius error"),
    "on_disk.py": ("48.01 MiB", "of 24 MiB (memory='24MiB')", "memory-mapped>", "PASSED: relative Frobenius error"),
    "pipeline.py": ("ndarray (4, 3000, 64) float32", "sees only itself: True", "12,000 keys at once: PASSED"),
}


def run_example(name, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_every_example_is_known():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, tmp_path):
    done = run_example(name, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    missing = [text for text in EXPECTED[name] if text not in done.stdout]
    assert missing == [], done.stdout
    assert os.listdir(tmp_path) == []


def test_compare_example_fails_only_where_it_says_so(tmp_path):
    output = run_example("compare.py", tmp_path).stdout
    assert (output.count("PASSED"), output.count("FAILED")) == (3, 1)
