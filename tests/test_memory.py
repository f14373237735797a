"""The budget is kept: measured resident memory of whole jobs in fresh processes, against the budget and the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import environment

from cqsa_arrays.storage import InputSpec, make_inputs

PEAK = Path(__file__).with_name("peak.py")
MIB = 1 << 20
# How far below the bound a peak may stay: 5 %, or this where a budget is small beside the process's own pages.
SLACK_BYTES = 12 * MIB

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to measure peaks")


@dataclass(frozen=True, slots=True)
class Job:
    """An input file, a budget and a cover; ``budget`` "1/5" is a share of the file."""

    name: str
    inputs: InputSpec
    budget: str
    cover: str = "auto"

    @property
    def file_bytes(self) -> int:
        itemsize = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[self.inputs.dtype]
        return itemsize * sum(b * h * n * d for b, h, n, d in self.inputs.shapes.values())

    @property
    def budget_bytes(self) -> int:
        share, _, of = self.budget.partition("/")
        return self.file_bytes * int(share) // int(of) if of else int(share) * MIB


def job(name: str, budget: str, cover: str = "auto", **inputs: object) -> Job:
    return Job(name, InputSpec(**inputs), budget, cover)


JOBS = [
    job("float32, a fifth, cqs", "1/5", "cqs", tokens=5_000, heads=12),
    job("float32, a fifth, rectangular", "1/5", "rectangular", tokens=5_000, heads=12),
    job("float32, one head", "8", tokens=15_000),
    job("float32, one head, states on disk", "8", "cqs", tokens=15_000, head_dim=32, value_dim=64),
    job("float32, D 128", "24", tokens=6_000, heads=4, head_dim=128),
    job("float32, more keys", "1/5", tokens=2_000, key_tokens=30_000, heads=4),
    job("float32, room for everything", "256", tokens=6_000, heads=4),
    job("float32, many keys at once", "256", "cqs", tokens=500, key_tokens=130_000, head_dim=128),
    job("float32, nd layout", "2/3", tokens=12_000, head_dim=96, layout="nd"),
    job("float16 bnhd", "16", tokens=6_000, heads=6, dtype="float16", layout="bnhd"),
    job("float16 bnhd, two fifths", "2/5", tokens=2_000, heads=32, dtype="float16", layout="bnhd"),
    job("bfloat16", "10", "rectangular", tokens=8_000, heads=4, dtype="bfloat16"),
    job("bfloat16 nhd, cqs", "24", "cqs", tokens=6_000, heads=4, dtype="bfloat16", layout="nhd"),
    job("float64, D 128", "1/2", tokens=4_000, heads=4, head_dim=128, dtype="float64"),
    job("float64, D 128, states on disk", "13", "cqs", tokens=6_000, heads=2, head_dim=128, dtype="float64"),
    job("float32 gzip", "1/2", "cqs", tokens=5_000, heads=8, chunk_tokens=1000, compression="gzip"),
    job("float16 gzip bnhd", "20", tokens=5_000, heads=8, dtype="float16", layout="bnhd", chunk_tokens=500,
        compression="gzip"),
    job("float32, one token a chunk", "8", tokens=4_000, head_dim=16, chunk_tokens=1),
]  # fmt: skip


@pytest.mark.parametrize("one", JOBS, ids=[one.name for one in JOBS])
def test_peak_stays_in_the_budget_and_near_the_plan(one, tmp_path):
    make_inputs(tmp_path / "in.h5", one.inputs)
    argv = [sys.executable, PEAK, "in.h5", "out.h5", str(one.budget_bytes), one.cover]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(json.dumps({"name": one.name, "file": one.file_bytes, **found}))
    assert found["plan"] <= found["budget"] == one.budget_bytes
    assert found["peak"] <= found["plan"]
    assert found["plan"] - found["peak"] <= max(0.05 * found["peak"], SLACK_BYTES)
