"""Jobs for the tests of durability: small ones of every kind, and runs of them as processes that can be killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from cqsa_arrays.cli import main
from cqsa_arrays.storage import InputSpec, make_inputs


@dataclass(frozen=True)
class Case:
    """A kind of job: what the inputs are and which options it runs with."""

    name: str
    spec: InputSpec
    options: tuple[str, ...]
    files: tuple[str, ...] = field(default=("out.h5",))


def _spec(tokens: int, heads: int, dim: int, dtype: str = "float32", layout: str = "bhnd", batch: int = 1) -> InputSpec:
    return InputSpec(tokens=tokens, heads=heads, head_dim=dim, dtype=dtype, layout=layout, batch=batch, seed=1)


# On one thread, so that several runs fit two processors; every step is committed.
_ALWAYS = ("--threads", "1", "--checkpoint", "0", "--quiet", "--device", "cpu")
CASES = [
    Case("cqs in memory", _spec(2000, 3, 16), ("--causal", "--chunks", "7")),
    Case("cqs on disk", _spec(2000, 2, 8, "float64"), ("--chunks", "7", "--memory", "1250KiB")),
    Case("rectangular", _spec(2500, 2, 16, "float16"), ("--causal", "--cover", "rectangular", "--memory", "1200KiB")),
    Case("heads together", _spec(1500, 4, 8, layout="bnhd", batch=2), ("--chunks", "3")),
    Case("lanes of cqs", _spec(1500, 2, 16), ("--causal", "--chunks", "7", "--lanes", "3")),
    Case("lanes of tiles", _spec(2500, 2, 16), ("--cover", "rectangular", "--memory", "1300KiB", "--lanes", "2")),
]


def command(case: Case, *more: str) -> list[str]:
    """``cqsa attend`` of a case, in the working directory."""
    return ["attend", "qkv.h5", "-o", "out.h5", *_ALWAYS, *case.options, *more]


def make(case: Case) -> None:
    """The inputs of a case in the working directory."""
    make_inputs("qkv.h5", case.spec)


def digest(path: str | Path = "out.h5") -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def unbroken(case: Case) -> str:
    """The hash of the output of a run without any interruption; the output itself is removed."""
    assert run(command(case)) == 0
    found = digest()
    os.remove("out.h5")
    assert sorted(os.listdir()) == ["qkv.h5"]
    return found


def run(argv: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Exit code of ``cqsa``, or minus the signal that killed it, as a process of its own; ``before`` runs in it."""
    return wait(start(argv, before))


def start(argv: list[str], before: Callable[[], None] = lambda: None, said: str = "run.log") -> int:
    """A process with ``cqsa argv`` that prints to ``said``, in a copy of this one: a tenth of a second, not one."""
    sys.stdout.flush()
    sys.stderr.flush()
    printed = open(said, "w", buffering=1)  # noqa: SIM115 - before the copy, which may be killed at once
    process = os.fork()
    if process:
        printed.close()
        return process
    code = 70
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.stdout = sys.stderr = printed
        before()
        code = main(argv)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 70
    except BaseException:  # noqa: BLE001 - whatever it is, the copy must not go on as a second test
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Its exit code, or minus the signal; the log is removed where nothing went wrong."""
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and os.path.exists("run.log"):
        os.remove("run.log")
    return code


def run_and_read(argv: list[str]) -> str:
    """What a run that succeeds has printed."""
    process = start(argv)
    _, status = os.waitpid(process, 0)
    assert status == 0, log()
    said = log()
    os.remove("run.log")
    return said


def log() -> str:
    """What the last run that did not succeed has printed."""
    return Path("run.log").read_text()


def slow() -> None:
    """Every read takes a while: before a run that others are to meet."""
    usual = os.preadv

    def late(*arguments):
        time.sleep(0.02)
        return usual(*arguments)

    os.preadv = late


def stuck() -> None:
    """The first read for a lane takes a minute: before a run that others are to meet, and that is killed."""
    usual = os.preadv

    def late(*arguments):
        if glob("out.h5.job/*/lane-0.claim-*"):
            time.sleep(60)
        return usual(*arguments)

    os.preadv = late


def kill_after(process: int, seconds: float) -> int:
    """SIGKILL after a while, if it still runs; its exit code."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))
    os.kill(process, signal.SIGKILL)
    return wait(process)


class Killed:
    """Kills the process at the ``at``-th call of a system function that changes what is on the disk.

    ``how``: before the call, after it, or in the middle of a write.
    """

    NAMES = (
        "pwrite", "write", "fsync", "replace", "rename", "link", "remove", "unlink", "mkdir", "makedirs", "rmdir",
        "posix_fallocate", "open",
    )  # fmt: skip

    def __init__(self, at: int, how: str) -> None:
        self.at, self._how, self.count = at, how, 0

    def __call__(self) -> None:
        """Put it in place."""
        from cqsa_arrays.durable.claims import Worker

        self.process = os.getpid()
        for name in self.NAMES:
            setattr(os, name, self._around(getattr(os, name), halves=name in ("pwrite", "write")))
        Worker._beat = lambda worker: None  # at a time of its own: steps would not be counted alike

    def _around(self, usual: Callable, halves: bool = False) -> Callable:
        def call(*arguments, **named):
            if os.getpid() != self.process:  # of a child that only looks at the inputs
                return usual(*arguments, **named)
            self.count += 1
            if self.count == self.at:
                try:
                    if self._how == "half" and halves:
                        descriptor, data, *position = arguments
                        usual(descriptor, data[: len(data) // 2], *position)
                    elif self._how == "after":
                        usual(*arguments, **named)
                finally:
                    os.kill(os.getpid(), signal.SIGKILL)
            return usual(*arguments, **named)

        return call


class Fault:
    """At the ``at``-th call of ``os.<name>`` does something first, or instead; the calls before and after are usual."""

    def __init__(self, name: str, at: int, what: Callable, always: bool = False) -> None:
        self._name, self._at, self._what, self._always, self._count = name, at, what, always, 0

    def __call__(self) -> None:
        usual = getattr(os, self._name)

        def call(*arguments, **named):
            self._count += 1
            if self._count == self._at or (self._always and self._count > self._at):
                return self._what(usual, *arguments, **named)
            return usual(*arguments, **named)

        setattr(os, self._name, call)


class KilledAtCommit:
    """Kills the process when the ``at``-th commit of its job is made; 0: when the first one is about to be."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self) -> None:
        from cqsa_arrays.durable.attempt import Attempt

        usual = Attempt.commit

        def commit(*arguments, **named) -> None:
            if self._left:
                usual(*arguments, **named)
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

        Attempt.commit = commit


HOWS = ("before", "half", "after")


def steps_of(case: Case) -> int:
    """How many steps of a run change the disk: it is killed at the last of them, which is found by halving."""
    low, high = 1, 2
    while run(command(case), Killed(high, "before")) != 0:
        _clean()
        low, high = high, 2 * high
    _clean()
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if run(command(case), Killed(middle, "before")) == 0 else (middle, high)
        _clean()
    return low


def _clean() -> None:
    """Only the inputs stay."""
    for name in set(os.listdir()) - {"qkv.h5"}:
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)


def killed_at(case: Case, expected: str, at: int, how: str) -> bool:
    """Kill a run at its ``at``-th step, and let another go on; False where there are fewer steps. Asserts the bytes."""
    code = run(command(case), Killed(at, how))
    if code == 0:
        os.remove("out.h5")
        return False
    assert code == -signal.SIGKILL, log()
    assert run(command(case)) == 0, f"{how} step {at}: {log()}"
    assert digest() == expected, f"{how} step {at}"
    os.remove("out.h5")
    assert sorted(set(os.listdir()) - {"run.log"}) == ["qkv.h5"], f"{how} step {at}"
    return True


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """``path`` as the working directory."""
    before = os.getcwd()
    path.mkdir(parents=True, exist_ok=True)
    os.chdir(path)
    try:
        yield path
    finally:
        os.chdir(before)
