"""Runs durable jobs by several clients of a file system with NFS's habits, and compares every byte.

    python tests/durable/nfs_campaign.py [--jobs 20] [--seed 0] [--workers 2] [--only 7] [--keep DIRECTORY]

Each worker is ``python -m cqsa_arrays attend`` in a mount of its own with habits of its own, which it sees at the same
path as all others; half of the jobs have workers that cannot see each other's processes either, as those of several
machines. They are killed, stopped, and cut off at random instants and started again, until the output has its name.
Then all pages on their way arrive, and every byte must be that of an undisturbed run on a plain folder. Prints a line
a job and what was found in all; the exit code says whether a byte was wrong, a job was lost or an alarm was false.
What is drawn repeats with its seed; when it happens does not. PYTHONPATH says which code runs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from nfs_like import Habits, Mount, NfsLike, why_not

# What no run may say, whatever the file system does: the inputs are whole and nobody touches the job's files.
ALARM = re.compile(
    r"damaged|start the job over|begin the job again|was dropped|comes? and go|truncated|Traceback", re.IGNORECASE
)
TOGETHER = ("--threads", "1", "--checkpoint", "0", "--quiet", "--device", "cpu", "--locking", "off")
MADE = ("--tokens", "20000", "--heads", "2", "--head-dim", "16", "--seed", "1")
KINDS = {
    "cqs": (MADE, ("--causal", "--chunks", "7", "--lanes", "3")),
    "tiles": (MADE, ("--cover", "rectangular", "--memory", "16MiB", "--lanes", "4")),
    "one lane": (MADE, ("--causal", "--chunks", "5")),
    "heads": ((*MADE, "--layout", "bnhd", "--dtype", "float64"), ("--chunks", "3", "--lanes", "2")),
}
CODE = {"PYTHONPATH": str(Path(__file__).parents[2]), **os.environ}
CALM_S, END_S = 60.0, 60.0
"""For the last runs of a job that was not done in time; for workers to end when the output is there."""
STUCK = 124


@dataclass
class Found:
    """What became of one job."""

    seconds: float = 0.0
    wrong: str = ""
    lost: str = ""
    disturbed: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    alarms: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return bool(self.wrong or self.lost or self.alarms)


def at_common_path(folder: Path, common: Path, machine: bool, argv: list[str]) -> list[str]:
    """A command that sees ``folder`` as ``common`` and runs there; ``machine``: and no processes but its own."""
    unshare = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    unshare += ["--pid", "--fork", "--kill-child", "--mount-proc"] if machine else []
    inside = 'mount --bind "$1" "$2" && cd "$2" && shift 2 && exec "$@"'
    return [*unshare, "sh", "-c", inside, "sh", str(folder), str(common), sys.executable, "-m", "cqsa_arrays", *argv]


def attend(kind: str) -> list[str]:
    return ["attend", "qkv.h5", "-o", "out.h5", *TOGETHER, *KINDS[kind][1]]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Worker:
    """A process that runs the job in one mount, again and again."""

    def __init__(self, mount: Mount, common: Path, kind: str, machine: bool, log: Path) -> None:
        self.mount, self.log, self._machine = mount, log, machine
        self._argv = at_common_path(mount.path, common, machine, attend(kind))
        self.process: subprocess.Popen | None = None
        self.again, self.resume = 0.0, 0.0  # when it is started, and when what stands still goes on

    def start(self) -> None:
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self._argv, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=CODE
            )

    def signal(self, number: int) -> None:
        """To the process that computes, and not to the one that waits for it outside of its namespace."""
        if self.process is None or self.process.poll() is not None:
            return
        targets = [self.process.pid]
        if self._machine:
            children = Path(f"/proc/{targets[0]}/task/{targets[0]}/children")
            with contextlib.suppress(OSError):
                targets = [int(child) for child in children.read_text().split()] or targets
        for target in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)

    def end(self) -> int:
        """Its exit code, waited for; nothing may stand still."""
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()
            return STUCK

    def go_on(self) -> None:
        self.resume = 0.0
        self.mount.resume()
        self.signal(signal.SIGCONT)


class Job:
    """One job from its begin to its end, by several workers."""

    def __init__(self, nfs: NfsLike, common: Path, kind: str, rng: random.Random, settings: argparse.Namespace) -> None:
        self._nfs, self._rng, self._machine, self.found = nfs, rng, rng.random() < 0.5, Found()
        self._every_s, self._next = rng.choice([1.5, 4.0, 10.0]) / settings.workers, time.monotonic()
        self._limit_s, self._workers = settings.limit, []
        for number in range(settings.workers):
            log, client = nfs.server.parent / f"log-{number}", nfs.client(replace(habits(rng), locks=settings.locks))
            self._workers.append(Worker(client, common, kind, self._machine, log))

    def run(self, expected: str) -> Found:
        begun, out = time.monotonic(), self._nfs.server / "out.h5"
        while not out.exists() and time.monotonic() < begun + self._limit_s:
            self._turn()
        if not out.exists():
            self._calm()
        self.found.seconds = time.monotonic() - begun
        if out.exists():
            self.found.wrong = "" if digest(out) == expected else "wrong when it had its name"
        for worker in self._workers:
            worker.go_on()
            if worker.process is not None:
                self._ended(worker, worker.end())
            worker.mount.stop()  # sends what is left
        if not out.exists():
            self.found.lost = "no output" if not self.found.wrong else "the output is gone"
        elif not self.found.wrong and digest(out) != expected:
            self.found.wrong = "wrong later"
        paths = {str(path.relative_to(self._nfs.server)) for path in self._nfs.server.rglob("*")}
        self.found.left = sorted(paths - {"qkv.h5", "out.h5"})
        return self.found

    def kill(self) -> None:
        """All that still run."""
        for worker in self._workers:
            worker.go_on()
            worker.signal(signal.SIGKILL)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.wait()
                worker.process = None

    def _turn(self) -> None:
        """Start who has ended, let go on whose time has come, and disturb somebody."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.resume and now >= worker.resume:
                worker.go_on()
            if worker.process is None or worker.process.poll() is not None:
                if worker.process is not None:
                    self._ended(worker, worker.process.returncode)
                    worker.process, worker.again = None, now + self._rng.uniform(0, 1)
                if now >= worker.again and not worker.resume:
                    worker.start()
        if now >= self._next:
            self._next = now + self._rng.uniform(0, 2 * self._every_s)
            self._disturb(self._rng.choice(self._workers))
        time.sleep(0.05)

    def _disturb(self, worker: Worker) -> None:
        if worker.resume or worker.process is None:
            return
        what = self._rng.choices(["kill", "stop", "pause", "crash"], [4, 2, 2, 1])[0]
        self.found.disturbed[what] += 1
        if what == "kill":
            worker.signal(signal.SIGKILL)
        elif what == "crash":  # of the machine: what its client has not sent is lost
            worker.signal(signal.SIGKILL)
            worker.mount.crash()
            worker.process.wait()
            worker.mount.restart()
        else:
            worker.signal(signal.SIGSTOP) if what == "stop" else worker.mount.pause()
            worker.resume = time.monotonic() + self._rng.choice([0.5, 2.0, 6.0, 25.0]) * self._rng.random()

    def _ended(self, worker: Worker, code: int) -> None:
        text = worker.log.read_text(errors="replace")
        last = (text.strip().splitlines() or [""])[-1]
        killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL) or last.startswith("unshare: sigprocmask")
        if code != 0 and not killed:  # some unshare cannot end as its process has
            self.found.ends[f"{code}: {re.sub(r'[0-9a-f]{8,}', '#', last)[:150]}"] += 1
        self.found.alarms += [line for line in text.splitlines() if ALARM.search(line)]
        if code == STUCK:
            self.found.alarms.append(f"did not end within {END_S:.0f} s")

    def _calm(self) -> None:
        """The disturbed time is over: one worker alone, with an orderly client, must come to the end."""
        self.kill()
        worker = self._workers[0]
        worker.mount.set(replace(Habits(), stale=True))
        end = time.monotonic() + CALM_S
        while time.monotonic() < end and not (self._nfs.server / "out.h5").exists():
            worker.start()
            self._ended(worker, worker.end())
            time.sleep(1)
        worker.process = None
        self.found.disturbed["calm"] += 1


def habits(rng: random.Random) -> Habits:
    """Of one client: some of the usual, and in half of them errors."""
    failures = [("fsync", "ENOSPC", 0.01), ("fsync", "EIO", 0.01), ("write", "ENOSPC", 0.002), ("close", "EIO", 0.01)]
    return Habits(
        seed=rng.getrandbits(32),
        known_s=rng.choice([(0.0, 0.0), (0.05, 0.5), (0.5, 3.0), (1.0, 10.0)]),
        cached=rng.random() < 0.8,
        write_back_s=rng.choice([None, (0.0, 0.1), (0.1, 5.0), (5.0, 60.0)]),
        whole_pages=rng.random() < 0.8,
        late_after_kill_s=rng.choice([None, (0.0, 2.0), (1.0, 20.0)]),
        lost=rng.choice([0.0, 0.05, 0.3]),
        lost_as_eio=rng.choice([0.0, 0.1]),
        stale=rng.random() < 0.9,
        failures=tuple(failure for failure in failures if rng.random() < 0.2),
    )


def undisturbed(kind: str, directory: Path, common: Path) -> str:
    """Make the input of a kind in a plain folder, and the hash of the output of a run there."""
    directory.mkdir(parents=True)
    for argv in (["make", "qkv.h5", *KINDS[kind][0]], attend(kind)):
        subprocess.run(at_common_path(directory, common, False, argv), check=True, stdout=subprocess.DEVNULL, env=CODE)
    return digest(directory / "out.h5")


def one_job(number: int, arguments: argparse.Namespace, directory: Path, common: Path, known: dict[str, str]) -> Found:
    rng = random.Random(f"{arguments.seed}-{number}")
    kind = rng.choice(list(KINDS))
    plain = directory / "plain" / kind.replace(" ", "-")
    if kind not in known:
        known[kind] = undisturbed(kind, plain, common)
    place = directory / f"job-{number}"
    place.mkdir()
    with NfsLike(place) as nfs:
        shutil.copy2(plain / "qkv.h5", nfs.server)  # with its time, which the output names
        job = Job(nfs, common, kind, rng, arguments)
        try:
            found = job.run(known[kind])
        finally:
            job.kill()
    disturbed = ", ".join(f"{count} {what}" for what, count in sorted(found.disturbed.items())) or "nothing"
    result = found.wrong or found.lost or ("false alarm" if found.alarms else "right")
    print(
        f"job {number} ({kind}): {result}; {found.seconds:.0f} s, {disturbed}; {len(found.left)} names left", flush=True
    )
    for line in [f"alarm: {line}" for line in dict.fromkeys(found.alarms)] + [f"left: {name}" for name in found.left]:
        print(f"    {line}", flush=True)
    if not (arguments.keep and found.bad):
        shutil.rmtree(place)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="clients, each with a process")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for a job; then one is to end it in peace")
    parser.add_argument("--locks", action="store_true", help="files can be locked, by each client for itself")
    parser.add_argument("--only", type=int, help="just the job of this number")
    parser.add_argument("--keep", type=Path, help="work in this folder, and keep the jobs that went wrong")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"FUSE: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing stays mounted
    directory = Path(tempfile.mkdtemp(prefix="cqsa-nfs-", dir=arguments.keep))
    (common := directory / "shared").mkdir()
    numbers = range(arguments.jobs) if arguments.only is None else [arguments.only]
    try:
        known: dict[str, str] = {}
        all_ = [one_job(number, arguments, directory, common, known) for number in numbers]
    finally:
        if not arguments.keep:
            shutil.rmtree(directory)
    ends = sum((found.ends for found in all_), Counter())
    for end, count in ends.most_common(15):
        print(f"{count:4d} runs ended with {end}")
    wrong, lost, alarms = (sum(bool(getattr(found, name)) for found in all_) for name in ("wrong", "lost", "alarms"))
    disturbed = sum(sum(found.disturbed.values()) for found in all_)
    print(f"{len(all_)} jobs, {disturbed} disturbances: {wrong} wrong, {lost} lost, {alarms} with false alarms")
    sys.exit(1 if any(found.bad for found in all_) else 0)


if __name__ == "__main__":
    main()
