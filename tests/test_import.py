"""Importing is light, and everything that is promised is there."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
from command_line import environment

import cqsa_arrays

HEAVY = {"cupy", "numba", "llvmlite", "h5py", "matplotlib", "tqdm", "ml_dtypes"}
IMPORT_S = 0.3
RUNS = 5

REPORT = """
import json, sys, time
start = time.perf_counter()
import {module}
elapsed_s = time.perf_counter() - start
print(json.dumps([elapsed_s, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def imported(module: str, **changes: str) -> tuple[float, set[str]]:
    """Seconds that ``import module`` takes in a fresh process, and the packages that are there afterwards."""
    code = [sys.executable, "-c", REPORT.format(module=module)]
    done = subprocess.run(code, env=environment(**changes), capture_output=True, text=True, check=True)
    elapsed_s, packages = json.loads(done.stdout)
    return elapsed_s, set(packages)


def test_import_loads_nothing_heavy():
    _, packages = imported("cqsa_arrays")
    assert "cqsa_arrays" in packages
    assert not packages & HEAVY


def test_a_heavy_import_would_be_seen(tmp_path):
    """The test above can fail: a module that imports h5py is caught by it."""
    (tmp_path / "heavy_module.py").write_text("import cqsa_arrays, h5py\n")
    _, packages = imported("heavy_module", PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}")
    assert packages & HEAVY == {"h5py"}


def test_import_is_quick():
    """The best of several: a machine may be slow for a moment, but not each time. NumPy's own import counts."""
    times_s = [imported("cqsa_arrays")[0] for _ in range(RUNS)]
    assert min(times_s) <= IMPORT_S, times_s


def test_the_help_of_the_command_loads_nothing_heavy():
    code = "import sys; from cqsa_arrays.cli.parser import build_parser; build_parser().format_help()"
    code += "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & HEAVY


def test_every_public_name_resolves():
    assert sorted(cqsa_arrays.__all__) == sorted(set(cqsa_arrays.__all__))
    assert set(cqsa_arrays.__all__) <= set(dir(cqsa_arrays))
    for name in cqsa_arrays.__all__:
        assert getattr(cqsa_arrays, name) is not None
    assert {"attention", "statistics", "merge", "plan", "open", "compare", "verify"} <= set(cqsa_arrays.__all__)


@pytest.mark.parametrize("first", ["attention", "statistics", "compare", "verify"])
def test_no_public_name_is_hidden_by_a_module(first):
    """A submodule takes its name in the package when it is imported: no public name may be one of a submodule's."""
    code = f"import cqsa_arrays as cqsa; cqsa.{first}, cqsa.verify\n"
    code += "print(*(name for name in cqsa.__all__ if type(getattr(cqsa, name)).__name__ == 'module'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_unknown_names_are_attribute_errors():
    assert isinstance(cqsa_arrays, types.ModuleType)
    with pytest.raises(AttributeError, match="module 'cqsa_arrays' has no attribute 'atention'"):
        cqsa_arrays.atention  # noqa: B018
