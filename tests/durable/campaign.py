"""Kills jobs at random instants until they are done, many times over, and compares every byte with an unbroken run.

    python tests/durable/campaign.py [--kills 1000] [--seed 0] [--device cpu] [--directory /tmp/campaign]

Prints a line a job and one in all; the exit code says whether a byte was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from durable_cases import (
    CASES,
    HOWS,
    Case,
    KilledAtCommit,
    command,
    digest,
    folder,
    kill_after,
    killed_at,
    log,
    make,
    run,
    start,
    unbroken,
)

# A job that is killed so often runs to its end then: every kind gets its share.
MOST = 25


def kill_until_done(case: Case, expected: str, seconds: float, rng: random.Random, most: int) -> tuple[int, int, bool]:
    """One job from its begin to its end: kills, runs, and whether the output is what it should be."""
    kills = runs = 0
    while kills < most:
        runs += 1
        code = kill_after(start(command(case)), rng.uniform(0, 0.6 * seconds))
        # Killed when its output had its name already: the command finds it, and it is looked at below.
        if code == 0 or (code == 2 and "found out.h5, which exists" in log()):
            break
        if code != -9:
            print(f"{case.name}: exit code {code}: {log()}", flush=True)
            return kills, runs, False
        kills += 1
    else:
        runs += 1
        if run(command(case)) != 0:
            print(f"{case.name}: the last run failed: {log()}", flush=True)
            return kills, runs, False
    right = digest() == expected
    left = sorted(name for name in os.listdir() if name not in ("qkv.h5", "out.h5", "run.log"))
    if left or not right:
        print(f"{case.name}: {'wrong bytes' if not right else f'left behind: {left}'}", flush=True)
    os.remove("out.h5")
    return kills, runs, right and not left


def campaign(kills: int, seed: int, directory: Path, cases: list[Case]) -> dict[str, object]:
    """Rounds over all cases until so many kills were survived; what was done, and how often a byte was wrong."""
    rng, total, runs, jobs, wrong = random.Random(seed), 0, 0, 0, 0
    expected: dict[str, tuple[str, float]] = {}
    for case in cases:
        with folder(directory / case.name.replace(" ", "-")):
            make(case)
            run(command(case))  # compiles and warms
            os.remove("out.h5")
            begun = time.monotonic()
            assert run(command(case)) == 0, log()
            expected[case.name] = digest(), time.monotonic() - begun
            os.remove("out.h5")
    while total < kills:
        for case in cases:
            with folder(directory / case.name.replace(" ", "-")):
                found, seconds = expected[case.name]
                more, ran, right = kill_until_done(case, found, seconds, rng, min(MOST, kills - total))
            total, runs, jobs, wrong = total + more, runs + ran, jobs + 1, wrong + (not right)
            if total >= kills:
                break
        print(f"{total} kills, {runs} runs, {jobs} jobs, {wrong} of them wrong", flush=True)
    what = "SIGKILL at random instants, then resumed"
    return {"what": what, "times": total, "runs": runs, "jobs": jobs, "wrong": wrong}


def every_step(case: Case, directory: Path) -> dict[str, object]:
    """Kills at every step that changes the disk, before, amid and after it, and lets another run go on."""
    steps = 0
    with folder(directory / f"steps-{case.name.replace(' ', '-')}"):
        make(case)
        expected = unbroken(case)
        for how in HOWS:
            steps += next(at for at in count(1) if not killed_at(case, expected, at, how)) - 1
    print(f"{case.name}: killed at each of {steps} steps, no byte wrong", flush=True)
    what = f"SIGKILL before, amid and after each call that changes the disk: {case.name}"
    return {"what": what, "times": steps, "runs": 2 * steps, "jobs": steps, "wrong": 0}


def flipped_ledgers(count: int, seed: int, directory: Path) -> dict[str, object]:
    """Flips bytes of the ledger of an unfinished job: noticed, or without any effect."""
    case, rng, noticed, wrong = CASES[0], random.Random(seed), 0, 0
    with folder(directory / "ledgers"):
        make(case)
        expected = unbroken(case)
        assert run(command(case), KilledAtCommit(5)) == -signal.SIGKILL
        shutil.copytree("out.h5.job", "kept.job")
        shutil.copy2("out.h5.part", "kept.part")
        whole = Path("kept.job/ledger.sqlite").read_bytes()
        for number in range(count):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            Path("out.h5.job/ledger.sqlite").write_bytes(data)
            code = run(command(case))
            if not (code == 0 and digest() == expected) and not (code == 2 and "Traceback" not in log()):
                print(f"ledger {number}: exit code {code}: {log() if code else 'wrong bytes'}", flush=True)
                wrong += 1
            noticed += code == 2
            for name in ("out.h5", "run.log"):
                Path(name).unlink(missing_ok=True)
            shutil.rmtree("out.h5.job", ignore_errors=True)
            shutil.copytree("kept.job", "out.h5.job")
            shutil.copy2("kept.part", "out.h5.part")
    print(f"{count} ledgers with flipped bytes: {noticed} noticed, the others without effect", flush=True)
    what = f"bytes of the ledger flipped: {noticed} times noticed, else without effect"
    return {"what": what, "times": count, "runs": count, "jobs": count, "wrong": wrong}


def on_device(case: Case, device: str) -> Case:
    """``case`` there; its budget is one of the CPU."""
    options = list(case.options)
    if device != "cpu" and "--memory" in options:
        at = options.index("--memory")
        del options[at : at + 2]
    return Case(case.name, case.spec, (*options, "--device", device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", action="store_true", help="kill at every step that changes the disk, too")
    parser.add_argument("--ledgers", type=int, default=0, help="so many ledgers with flipped bytes, too")
    parser.add_argument("--results", help="file to store what was done in, as JSON")
    parser.add_argument("--directory", help="where to work (default: temporary)")
    arguments = parser.parse_args()
    cases = [on_device(case, arguments.device) for case in CASES]
    directory = Path(arguments.directory or tempfile.mkdtemp(prefix="cqsa-campaign-"))
    rows = []
    try:
        rows.append(campaign(arguments.kills, arguments.seed, directory, cases))
        rows += [every_step(case, directory) for case in cases if arguments.steps]
        rows += [flipped_ledgers(arguments.ledgers, arguments.seed, directory)] if arguments.ledgers else []
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory)
    if arguments.results:
        sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
        from report import machine, store

        store(arguments.results, {"machine": machine(), "rows": rows})
    sys.exit(1 if any(row["wrong"] for row in rows) else 0)


if __name__ == "__main__":
    main()
