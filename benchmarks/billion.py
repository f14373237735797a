"""A job of 2^30 tokens for real: planned, killed after a while, resumed, stopped by --max-time, verified so far.

    python benchmarks/billion.py [--device cpu] [--seconds 60] [--directory DIR] [--results benchmarks/results]

q = k = v is one data set of 8 float16 numbers a token (16 GiB), made once; full attention in 2 GiB. Nobody waits for
its end: asked is that it is bounded, loses nothing and knows how long it will take.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from report import machine, store, table

from cqsa_arrays.durable import JobStatus, status
from cqsa_arrays.units import format_seconds

COMMAND = [sys.executable, "-m", "cqsa_arrays"]
BASELINE_TOKENS = 1000


def run(*argv: str) -> float:
    """Seconds that a command took; it must succeed."""
    begun = time.perf_counter()
    done = subprocess.run([*COMMAND, *argv], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", flush=True)
    return time.perf_counter() - begun


@dataclass(frozen=True)
class Watched:
    """A command that was watched: exit code, seconds, peaks of its resident pages and of the GPU's memory in MiB."""

    code: int
    elapsed_s: float
    resident: float
    device: float


def watched(*argv: str, kill_after: float | None = None) -> Watched:
    """Run a command, and kill it after so many seconds."""
    begun, peak, device, idle = time.perf_counter(), 0.0, 0.0, device_mib()
    with subprocess.Popen([*COMMAND, *argv]) as process:
        while process.poll() is None:
            peak, device = max(peak, resident_mib(process.pid)), max(device, device_mib() - idle)
            if kill_after is not None and time.perf_counter() - begun > kill_after:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.2)
    return Watched(process.returncode, time.perf_counter() - begun, peak, device)


def device_mib() -> float:
    """Memory of the first GPU in use, by the driver; 0 where there is none."""
    if shutil.which("nvidia-smi") is None:
        return 0.0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout)


def resident_mib(process: int) -> float:
    """Pages of the process that are resident now: its own, shared and mapped ones."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (FileNotFoundError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def inputs(directory: Path, tokens: int) -> None:
    if not (directory / "qkv.h5").exists():
        shape = ("--tokens", str(tokens), "--head-dim", "8", "--dtype", "float16", "--layout", "nd", "--shared")
        run("make", "qkv.h5", *shape)
    if not (directory / "small.h5").exists():
        run(
            "make",
            "small.h5",
            "--tokens",
            str(BASELINE_TOKENS),
            "--head-dim",
            "8",
            "--dtype",
            "float16",
            "--layout",
            "nd",
        )


def rate_between(first: JobStatus, second: JobStatus) -> float:
    """Pairs a second of what was computed between two looks."""
    return (second.done_pairs - first.done_pairs) / (second.computed_s - first.computed_s)


def rows(device: str, memory: str, seconds: float) -> dict[str, object]:
    where = ("--device", device)
    planned_s = run("plan", "qkv.h5", "--memory", memory, *where)
    small = ("attend", "small.h5", "-o", "small-out.h5", "--memory", memory, "--quiet", "--overwrite", *where)
    baseline = watched(*small)
    first = watched("attend", "qkv.h5", "-o", "out.h5", "--memory", memory, "--quiet", *where, kill_after=seconds)
    killed = status("out.h5")
    print(killed, flush=True)
    second = watched("resume", "out.h5", "--quiet", "--max-time", f"{seconds}s")
    stopped = status("out.h5")
    print(stopped, flush=True)
    verified_s = run("verify", "out.h5", "--partial", "--rows", "64")
    left, measured = killed.left_s or 0.0, (stopped.pairs - killed.done_pairs) / rate_between(killed, stopped)
    found = {
        "device": device, "budget": memory, "plan s": round(planned_s, 2), "killed after s": round(first.elapsed_s, 1),
        "exit codes": f"{first.code}, {second.code}", "computed s, committed": round(killed.computed_s, 1),
        "resumed to s": round(stopped.computed_s, 1), "GFLOP/s": round(rate(stopped) / 1e9, 1),
        "left, estimated": format_seconds(left), "left, measured": format_seconds(measured),
        "ratio": round(left / measured, 3), "asked": "0.90 to 1.10",
        "peak MiB": round(max(first.resident, second.resident)), "of them baseline MiB": round(baseline.resident),
        "partial verify": f"passed, {verified_s:.0f} s",
    }  # fmt: skip
    if first.device:
        found |= {"GPU MiB": round(max(first.device, second.device)), "of them context MiB": round(baseline.device)}
    return found


def rate(found: JobStatus) -> float:
    """Floating-point operations a second over all of the job so far."""
    return found.flops / found.pairs * found.done_pairs / found.computed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two runs")
    parser.add_argument("--directory", help="for the files; a qkv.h5 there is used (default: temporary)")
    parser.add_argument("--results", default="benchmarks/results")
    arguments = parser.parse_args()
    results = Path(arguments.results).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(arguments.directory or temporary)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        )
        os.chdir(directory)
        inputs(directory, arguments.tokens)
        found = [{"tokens": arguments.tokens, **rows(arguments.device, arguments.memory, arguments.seconds)}]
    table(found)
    store(str(results / f"billion_{arguments.device.partition(':')[0]}.json"), {"machine": machine(), "rows": found})


if __name__ == "__main__":
    main()
