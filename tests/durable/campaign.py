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
from dataclasses import dataclass, field
from glob import glob
from itertools import count, cycle
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

from cqsa_arrays.cli import main as cqsa
from cqsa_arrays.durable import claims

# A job that is killed so often runs to its end then: every kind gets its share.
MOST = 25


def kill_until_done(case: Case, expected: str, seconds: float, rng: random.Random, most: int) -> tuple[int, int, bool]:
    """One job from its begin to its end: kills, runs, and whether the output is what it should be."""
    kills = runs = 0
    while kills < most:
        runs += 1
        code = kill_after(start(command(case)), rng.uniform(0, 0.6 * seconds))
        if code == 0:
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


# What nobody is to be told of a healthy job.
LIES = ("damaged", "--restart", "no such file", "traceback", "failed", "come and go", "was dropped", "truncated")
LOOKS = (["status", "out.h5", "--json"], ["verify", "out.h5", "--partial", "--rows", "16"])


@dataclass
class Done:
    """What was done to jobs of several processes each, and what was wrong, or said wrongly."""

    jobs: int = 0
    runs: int = 0
    kills: int = 0
    pauses: int = 0
    looks: int = 0
    wrong: list[str] = field(default_factory=list)


def together(case: Case, expected: str, workers: int, rng: random.Random, jobs: int, done: Done | None = None) -> Done:
    """Jobs by so many processes each, of which some are killed, some paused, while others look; every byte compared."""
    done = Done() if done is None else done
    for _ in range(jobs):
        _one_job(case, workers, rng, done)
        if digest() != expected:
            done.wrong.append(f"{case.name}: wrong bytes")
        for name in set(os.listdir()) - {"qkv.h5"}:
            if name not in ("out.h5", "out.h5.job") and not name.endswith(".log"):
                done.wrong.append(f"{case.name}: left behind: {name}")
            shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)
        done.jobs += 1
    return done


def _one_job(case: Case, workers: int, rng: random.Random, done: Done) -> None:
    """From its begin until its output has its name and every process of it has ended."""
    numbers, running, paused = count(), dict[int, tuple[str, list[str]]](), dict[int, float]()

    def begin(argv: list[str]) -> None:
        said = f"{next(numbers)}.log"
        running[start(argv, said=said)] = said, argv
        done.runs += argv[0] == "attend"
        done.looks += argv[0] != "attend"

    harm = 3 * workers
    while running or not os.path.exists("out.h5"):
        working = [pid for pid, (_, argv) in running.items() if argv[0] == "attend"]
        if not os.path.exists("out.h5"):
            while len(working) < workers:
                begin(command(case))
                working = [pid for pid, (_, argv) in running.items() if argv[0] == "attend"]
            if len(running) == len(working):
                begin(list(rng.choice(LOOKS)))
        time.sleep(rng.uniform(0, 0.05))
        for pid in [pid for pid, until in paused.items() if time.monotonic() > until]:
            del paused[pid]
            os.kill(pid, signal.SIGCONT)
        if harm and working:
            victim, harm = rng.choice(working), harm - 1
            if rng.random() < 0.5:
                os.kill(victim, signal.SIGKILL)
            elif victim not in paused:
                os.kill(victim, signal.SIGSTOP)
                paused[victim] = time.monotonic() + rng.uniform(0.5, 2.0) * claims.STALE_S
                done.pauses += 1
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                said, argv = running.pop(pid)
                paused.pop(pid, None)
                _judge(case, os.waitstatus_to_exitcode(status), Path(said).read_text(), argv, done)


def _judge(case: Case, code: int, said: str, argv: list[str], done: Done) -> None:
    """How a process has ended: well, killed by us, or by saying something that is so."""
    if code == -signal.SIGKILL:
        done.kills += 1
        return
    # There is no job yet, or no more; nothing is committed yet.
    so = ("of which no job is unfinished", "nothing is committed yet")
    if code == 0 or (code == 2 and any(text in said for text in so)):
        lie = next((text for text in LIES if text in said.lower()), None) if code == 0 else None
        if lie is None:
            return
    done.wrong.append(f"{case.name}: {' '.join(argv[:2])}: {code}: {said[-300:]}")


def by_several(kills: int, workers: int, seed: int, directory: Path, cases: list[Case]) -> dict[str, object]:
    """Rounds over all cases until so many processes were killed or paused."""
    rng, done = random.Random(seed), Done()
    for case in cycle(cases):
        with folder(directory / f"{workers}-{case.name.replace(' ', '-')}"):
            if not os.path.exists("qkv.h5"):
                make(case)
            together(case, unbroken(case), workers, rng, 5, done)
        print(f"{workers} processes: {done.kills} kills, {done.pauses} pauses, {done.looks} looks, {done.jobs} jobs,"
              f" wrong: {done.wrong}", flush=True)  # fmt: skip
        if done.kills + done.pauses >= kills:
            break
    what = (
        f"{workers} processes a job, SIGKILL {done.kills} times, SIGSTOP beyond the claim's time {done.pauses} times,"
        f" {done.looks} looks meanwhile"
    )
    return {
        "what": what, "times": done.kills + done.pauses, "runs": done.runs, "jobs": done.jobs, "wrong": len(done.wrong)
    }  # fmt: skip


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


def flipped_records(count: int, seed: int, directory: Path) -> dict[str, object]:
    """Flips bytes of the records of an unfinished job: noticed, or without any effect."""
    case, rng, noticed, wrong = CASES[0], random.Random(seed), 0, 0
    with folder(directory / "records"):
        make(case)
        expected = unbroken(case)
        assert run(command(case), KilledAtCommit(5)) == -signal.SIGKILL
        shutil.copytree("out.h5.job", "kept.job")
        names = ["out.h5.job/job", *glob("out.h5.job/*/lane-*.*-*.*")]
        for number in range(count):
            path = Path(names[number % len(names)])
            data = bytearray(path.read_bytes())
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.unlink()  # the record of the job has two names
            path.write_bytes(data)
            code = run(command(case))
            if not (code == 0 and digest() == expected) and not (code == 2 and "Traceback" not in log()):
                print(f"record {number}: exit code {code}: {log() if code else 'wrong bytes'}", flush=True)
                wrong += 1
            noticed += code == 2
            for name in ("out.h5", "run.log"):
                Path(name).unlink(missing_ok=True)
            shutil.rmtree("out.h5.job", ignore_errors=True)
            Path("out.h5.part").unlink(missing_ok=True)
            shutil.copytree("kept.job", "out.h5.job")
    print(f"{count} records with flipped bytes: {noticed} noticed, the others without effect", flush=True)
    what = f"bytes of records flipped: {noticed} times noticed, else without effect"
    return {"what": what, "times": count, "runs": count, "jobs": count, "wrong": wrong}


def warm(case: Case, directory: Path) -> None:
    """Load and compile here what every process would for itself: they are copies of this one."""
    with folder(directory / "warm"):
        make(case)
        assert cqsa(command(case)) == 0
    shutil.rmtree(directory / "warm")


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
    parser.add_argument("--several", type=int, default=0, help="so many kills and pauses of two and of three processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", action="store_true", help="kill at every step that changes the disk, too")
    parser.add_argument("--records", type=int, default=0, help="so many records with flipped bytes, too")
    parser.add_argument("--results", help="file to store what was done in, as JSON")
    parser.add_argument("--directory", help="where to work (default: temporary)")
    arguments = parser.parse_args()
    cases = [on_device(case, arguments.device) for case in CASES]
    directory = Path(arguments.directory or tempfile.mkdtemp(prefix="cqsa-campaign-"))
    rows = []
    try:
        for case in cases:
            warm(case, directory)
        rows.append(campaign(arguments.kills, arguments.seed, directory, cases))
        if arguments.several:
            claims.STALE_S, claims.BEAT_S = 0.5, 0.05
            rows += [by_several(arguments.several, n, arguments.seed, directory, cases) for n in (2, 3)]
            claims.STALE_S, claims.BEAT_S = 20.0, 2.0
        rows += [every_step(case, directory) for case in cases if arguments.steps]
        rows += [flipped_records(arguments.records, arguments.seed, directory)] if arguments.records else []
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
