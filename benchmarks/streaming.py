"""From an HDF5 file under a tight budget: beside the same job in memory, cover beside cover, and memory held.

    python benchmarks/streaming.py file    [--tokens 131072]  from a cold file in a tenth of the bytes, and in memory
    python benchmarks/streaming.py covers  [--tokens 32768]   both covers on one job, states in memory and on disk
    python benchmarks/streaming.py memory                     peak resident memory beside plan and budget
    python benchmarks/streaming.py plan                       the plan of a job of a million tokens

Files lie in --directory and are put out of the page cache before each run. Results are stored in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from report import machine, store, table

import cqsa_arrays as cqsa
from cqsa_arrays.storage import InputSpec, make_inputs
from cqsa_arrays.units import format_bytes

MIB = 1 << 20
PEAK = Path(__file__).parent.parent / "tests" / "peak.py"


def forget(path: Path) -> None:
    """Put a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def from_file(directory: Path, tokens: int, repeats: int) -> Iterator[dict[str, object]]:
    """Seconds from a cold file under a tenth of the tensors' bytes, beside seconds in memory, in turn."""
    source, out = directory / "bench.h5", directory / "bench-out.h5"
    make_inputs(source, InputSpec(tokens=tokens, heads=4), overwrite=True)
    stored = cqsa.open(source)
    q, k, v = (np.array(x) for x in (stored.q, stored.k, stored.v))
    budget = (q.nbytes + k.nbytes + v.nbytes) // 10
    options = cqsa.Options(overwrite=True)
    for causal in (True, False):
        plan = cqsa.plan(stored.q, stored.k, stored.v, causal=causal, memory=budget, out=out, options=options)
        seconds, difference = [], 0.0
        for _ in range(repeats):
            start = time.perf_counter()
            expected = cqsa.attention(q, k, v, causal=causal)
            middle = time.perf_counter()
            forget(source)
            begin = time.perf_counter()
            found = cqsa.attention(stored.q, stored.k, stored.v, causal=causal, memory=budget, out=out, options=options)
            seconds.append((middle - start, time.perf_counter() - begin))
            difference = max(difference, float(np.abs(np.asarray(found) - expected).max()))
        in_memory, streamed = (median(column) for column in zip(*seconds, strict=True))
        yield {
            "N": tokens, "mask": "causal" if causal else "full", "budget": format_bytes(budget),
            "cover": plan.cover_name, "in memory s": round(in_memory, 2), "from file s": round(streamed, 2),
            "ratio": round(median(b / a for a, b in seconds), 3), "asked": 1.10, "largest difference": difference,
        }  # fmt: skip
    source.unlink()
    out.unlink()


def covers(directory: Path, tokens: int, repeats: int) -> Iterator[dict[str, object]]:
    """Both covers forced on one job: seconds, bytes moved, and how far the results are from float64 rows."""
    source, out = directory / "bench.h5", directory / "bench-out.h5"
    make_inputs(source, InputSpec(tokens=tokens, heads=4), overwrite=True)
    command = [sys.executable, "-m", "cqsa_arrays", "attend", str(source), "-o", str(out), "--overwrite", "--json"]
    for mask, memory in [(m, b) for m in ("causal", "full") for b in ("24MiB", "10MiB")]:
        for cover in ("cqs", "rectangular"):
            flags = ["--cover", cover, "--memory", memory, *(["--causal"] if mask == "causal" else [])]
            reports = []
            for _ in range(repeats):
                forget(source)
                reports.append(json.loads(subprocess.run([*command, *flags], check=True, capture_output=True).stdout))
            chosen = reports[0]["plan"]["chosen"]
            yield {
                "N": tokens, "mask": mask, "budget": memory, "cover": cover, "parts": chosen["query_parts"],
                "states": "on disk" if chosen["states"] == "disk" else "in memory",
                "seconds": round(median(r["elapsed_s"] for r in reports), 2),
                "read": format_bytes(reports[0]["input_read_bytes"]),
                "states moved": format_bytes(reports[0]["state_moved_bytes"]),
                "planned read": format_bytes(chosen["traffic"]["input_read_bytes"]),
                "error": cqsa.verify(out, rows=64).frobenius,
            }  # fmt: skip
    source.unlink()
    out.unlink()


# (tokens, heads, head dim, dtype, layout, chunk tokens or None, budget in MiB, cover)
MEMORY_CASES = (
    (40000, 4, 64, "float32", "bhnd", None, 12, "auto"),
    (40000, 4, 64, "float32", "bhnd", None, 40, "auto"),
    (40000, 4, 64, "float32", "bhnd", None, 200, "auto"),
    (40000, 4, 64, "float32", "bhnd", None, 12, "cqs"),
    (16000, 8, 128, "float64", "bhnd", None, 37, "auto"),
    (16000, 8, 128, "float64", "bnhd", None, 64, "auto"),
    (60000, 2, 64, "float16", "bnhd", None, 16, "auto"),
    (60000, 2, 64, "bfloat16", "bhnd", None, 8, "auto"),
    (300000, 1, 8, "float32", "nd", None, 6, "auto"),
    (131072, 1, 64, "float32", "nd", None, 10, "auto"),
    (20000, 4, 64, "float32", "bhnd", 1000, 20, "auto"),
    (131072, 4, 64, "float32", "bhnd", None, 300, "auto"),
)


def memory(directory: Path) -> Iterator[dict[str, object]]:
    """Peak resident memory that a job adds to its process, beside the plan's bound and the budget."""
    source, out = directory / "bench.h5", directory / "bench-out.h5"
    for tokens, heads, dim, dtype, layout, chunk, budget, cover in MEMORY_CASES:
        spec = InputSpec(
            tokens=tokens, heads=heads, head_dim=dim, dtype=dtype, layout=layout, chunk_tokens=chunk,
            compression="gzip" if chunk else None,
        )  # fmt: skip
        make_inputs(source, spec, overwrite=True)
        command = [sys.executable, str(PEAK), str(source), str(out), f"{budget}MiB", cover]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        tensors = 3 * tokens * heads * dim * (8 if dtype == "float64" else 4 if dtype == "float32" else 2)
        yield {
            "N": tokens, "H": heads, "D": dim, "dtype": dtype, "layout": layout, "file MiB": round(tensors / MIB, 1),
            "budget MiB": budget, "plan MiB": round(found["plan"] / MIB, 2), "peak MiB": round(found["peak"] / MIB, 2),
            "cover": found["cover"], "parts": found["parts"],
        }  # fmt: skip
    source.unlink()
    out.unlink()


def plan(directory: Path) -> str:
    """The plan of 2^20 tokens and 8 heads in 512 MiB; the file is a hole, for planning reads no data."""
    import h5py

    source = directory / "qkv.h5"
    with h5py.File(source, "w") as file:
        for name in "qkv":
            early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple((8, 1 << 20, 64))
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, space, early)
    stored = cqsa.open(source)
    call = {"causal": True, "memory": "512MiB", "out": "out.h5", "options": cqsa.Options(durable=True)}
    text = str(cqsa.plan(stored.q, stored.k, stored.v, **call))
    source.unlink()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("file", "covers", "memory", "plan"))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("."))
    arguments = parser.parse_args()
    if arguments.what == "plan":
        Path("benchmarks/results/plan.txt").write_text(f"{plan(arguments.directory)}\n")
        return
    measured = {
        "file": lambda: from_file(arguments.directory, arguments.tokens or 131072, arguments.repeats),
        "covers": lambda: covers(arguments.directory, arguments.tokens or 32768, arguments.repeats),
        "memory": lambda: memory(arguments.directory),
    }
    rows = table(measured[arguments.what]())
    store(f"benchmarks/results/{arguments.what}.json", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
