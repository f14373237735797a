"""A job of 2^30 tokens for real: planned, killed after a while, resumed, stopped by --max-time, verified so far.

    python benchmarks/billion.py [--device cpu] [--seconds 60] [--directory DIR] [--results benchmarks/results]

q = k = v is one data set of 8 float16 numbers a token (16 GiB), made once; full attention in 2 GiB. Nobody waits for
its end: asked is that it is bounded, loses nothing and knows how long it will take.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
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


def watched(*argv: str, kill_after: float | None = None) -> tuple[int, float, float]:
    """Exit code, seconds and peak resident MiB of a command, which is killed after so many seconds."""
    begun, peak = time.perf_counter(), 0.0
    with subprocess.Popen([*COMMAND, *argv]) as process:
        while process.poll() is None:
            peak = max(peak, resident_mib(process.pid))
            if kill_after is not None and time.perf_counter() - begun > kill_after:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.1)
    return process.returncode, time.perf_counter() - begun, peak


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
    _, _, baseline = watched(
        "attend", "small.h5", "-o", "small-out.h5", "--memory", memory, "--quiet", "--overwrite", *where
    )
    job = ("attend", "qkv.h5", "-o", "out.h5", "--memory", memory, "--quiet", *where)
    code, ran_s, peak = watched(*job, kill_after=seconds)
    killed = status("out.h5")
    print(killed, flush=True)
    again, _, peak_again = watched("resume", "out.h5", "--quiet", "--max-time", f"{seconds}s")
    stopped = status("out.h5")
    print(stopped, flush=True)
    verified_s = run("verify", "out.h5", "--partial", "--rows", "64")
    measured_left = (stopped.pairs - killed.done_pairs) / rate_between(killed, stopped)
    return {
        "device": device, "budget": memory, "plan s": round(planned_s, 2), "killed after s": round(ran_s, 1),
        "exit codes": f"{code}, {again}", "computed s, committed": round(killed.computed_s, 1),
        "resumed to s": round(stopped.computed_s, 1), "GFLOP/s": round(rate(stopped) / 1e9, 1),
        "left, estimated": format_seconds(killed.left_s or 0.0), "left, measured": format_seconds(measured_left),
        "ratio": round((killed.left_s or 0.0) / measured_left, 3), "asked": "0.90 to 1.10",
        "peak MiB": round(max(peak, peak_again)), "of them baseline MiB": round(baseline),
        "partial verify": f"passed, {verified_s:.0f} s",
    }  # fmt: skip


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
