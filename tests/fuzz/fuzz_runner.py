"""Plays fuzz cases in child processes: a crash or a hang kills only the child, and the case is named."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import resource
import select
import shutil
import signal
import stat
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cqsa_arrays.cli import trial
from cqsa_arrays.cli.main import main

ADDRESS_SPACE_BYTES = 8 << 30
"""Of a child: a damaged size that is taken at its word fails there, not on the machine."""

BATCH = 200
"""Cases of one child."""

MTIME_NS = 1_700_000_000_000_000_000
"""Of every file before a command runs: cases must not depend on the clock, and a change shows."""

MOST_BYTES = 1 << 24
"""Of a file that is compared byte by byte: some odd ones are mostly holes."""

COMMANDS = ("info", "plan", "attend", "verify", "compare")
HDF5_FAILURES = ("HDF5 does not come back", "HDF5 crashes")
USAGE_CODE = 2
Contents = dict[str, bytes | str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one command printed and ended with; ``escaped`` is the traceback of what should not have come out."""

    code: int
    out: str
    err: str
    escaped: str = ""


class Session:
    """The commands of one case, run in its folder; ``problems`` are promises that were not kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, *argv: str, out: str | None = None) -> Outcome:
        """One command; only ``out`` may be new or changed after it, and only where it succeeds."""
        before = contents(self.folder)
        outcome = run_here([*argv], self.folder)
        after = contents(self.folder)
        if outcome.code == 0 and out is not None:
            name = os.path.normpath(out)
            before.pop(name, None), after.pop(name, None)
        self.codes[f"{argv[0] if argv[0] in COMMANDS else 'other'}: {outcome.code}"] += 1
        for failure in HDF5_FAILURES:
            self.codes[failure] += failure in outcome.err
        said = [*faults(argv, outcome), *changes(before, after)]
        self.problems += [f"{list(argv)!r}: {one}" for one in said]
        return outcome


def contents(folder: Path) -> Contents:
    """Names in ``folder``, with the bytes of regular files and the kinds of others."""
    found: Contents = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            facts = path.lstat()
            small = stat.S_ISREG(facts.st_mode) and facts.st_size < MOST_BYTES
            found[str(path.relative_to(folder))] = path.read_bytes() if small else f"mode {facts.st_mode:o}"
    return found


def changes(before: Contents, after: Contents) -> list[str]:
    """What was made, removed or changed."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name!r} was {'made' if name not in before else 'changed or removed'}" for name in names]


def faults(argv: tuple[str, ...], outcome: Outcome) -> list[str]:
    """Which promises about exit code and messages ``outcome`` breaks."""
    if outcome.escaped:
        return [f"escaped: {outcome.escaped}"]
    lines = [line for line in outcome.err.splitlines() if not line.startswith("cqsa: compiling")]
    if outcome.code not in (0, 1, 2):
        return [f"exit code {outcome.code}: {outcome.err!r}"]
    if outcome.code != USAGE_CODE:
        return [f"exit code {outcome.code} with {outcome.err!r} on standard error"] if lines else []
    if lines and lines[0].startswith("usage: cqsa"):
        return [] if ": error: " in outcome.err else [f"usage without an error: {outcome.err!r}"]
    found = []
    if len(lines) != 1 or not lines[0].startswith(f"cqsa {argv[0]}: "):
        found.append(f"not one line of error: {outcome.err!r}")
    elif not lines[0].isprintable():
        found.append(f"unprintable error: {lines[0]!r}")
    if outcome.out:
        found.append(f"an error after output: {outcome.out[:200]!r}")
    return found


def run_here(argv: list[str], folder: Path) -> Outcome:
    """``cqsa`` in this process, with its standard output and error in files as the system sees them."""
    streams = [open(f"{folder}.{name}", "w+b") for name in ("out", "err")]  # noqa: SIM115
    kept = [os.dup(1), os.dup(2)]
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
    escaped, code = "", 0
    try:
        with (
            io.TextIOWrapper(os.fdopen(os.dup(1), "wb"), "utf-8", write_through=True) as out,
            io.TextIOWrapper(os.fdopen(os.dup(2), "wb"), "utf-8", "backslashreplace", write_through=True) as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                code = main(argv)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 99
            except BaseException:  # noqa: BLE001 - whatever escapes is what is looked for
                escaped, code = traceback.format_exc(), 99
    finally:
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
    texts = []
    for stream in streams:
        with stream:
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "backslashreplace"))
    return Outcome(code, *texts, escaped)


@dataclass(frozen=True, slots=True)
class Fault:
    """A broken promise: play it again with ``--only index``."""

    index: int
    kind: str
    problem: str


@dataclass(slots=True)
class Summary:
    """What a run of cases came to."""

    cases: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)


Play = Callable[[Session, np.random.Generator], None]


@dataclass(frozen=True, slots=True)
class Fuzz:
    """How cases are made: case ``index`` is of kind ``index % len(plays)`` and depends on it and ``seed`` alone."""

    plays: dict[str, Play]
    seed: int
    folder: Path
    limit_s: float

    def kind(self, index: int) -> str:
        return list(self.plays)[index % len(self.plays)]

    def play(self, index: int) -> tuple[Counter[str], list[str]]:
        """Case ``index`` in a fresh folder, in this process."""
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        session = Session(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            self.plays[self.kind(index)](session, np.random.default_rng([self.seed, index]))
        return session.codes, session.problems


def run_cases(fuzz: Fuzz, indices: Iterable[int], *, report: Callable[[str], None]) -> Summary:
    """Play the cases ``indices``, a batch of them in each child."""
    waiting, summary = list(indices), Summary()
    while waiting:
        batch, done = waiting[:BATCH], 0
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(fuzz, batch, writer)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as results:
            done = _collect(fuzz, batch, results, summary, child, report)
        waiting = waiting[done:]
    return summary


def _child(fuzz: Fuzz, batch: list[int], writer: int) -> None:
    """Play the cases of ``batch`` and leave the process; a line of JSON for each."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    trial.CPU_SECONDS = 1
    code = 1
    try:
        with open(fuzz.folder / "stack.txt", "w") as stack:
            faulthandler.enable(stack)
            for index in batch:
                stack.seek(0), stack.truncate()
                faulthandler.dump_traceback_later(fuzz.limit_s * 0.9, file=stack)
                codes, problems = fuzz.play(index)
                faulthandler.cancel_dump_traceback_later()
                os.write(writer, json.dumps([codes, problems]).encode() + b"\n")
            faulthandler.disable()
        code = 0
    except BaseException:  # noqa: BLE001 - of the fuzzer itself
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _collect(
    fuzz: Fuzz, batch: list[int], results: io.RawIOBase, summary: Summary, child: int, report: Callable[[str], None]
) -> int:
    """Take the results of ``child`` as they come; how many cases of ``batch`` are dealt with."""
    done, text, deadline = 0, b"", time.monotonic() + fuzz.limit_s
    fault = ""
    while done < len(batch):
        ready, _, _ = select.select([results], [], [], max(0.0, deadline - time.monotonic()))
        piece = results.read(1 << 16) if ready else b""
        if not piece:
            if not ready:
                os.kill(child, signal.SIGKILL)
                fault = f"hangs: over {fuzz.limit_s} s"
            break
        *lines, text = (text + piece).split(b"\n")
        for line in lines:
            codes, problems = json.loads(line)
            _note(fuzz, batch[done], codes, problems, summary, report)
            done += 1
            deadline = time.monotonic() + fuzz.limit_s
    _, status = os.waitpid(child, 0)
    if done < len(batch):
        code = os.waitstatus_to_exitcode(status)
        fault = fault or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"the fuzzer failed: {code}")
        stack = (fuzz.folder / "stack.txt").read_text()
        _note(fuzz, batch[done], {}, [f"{fault}\n{stack}"], summary, report)
        done += 1
    return done


def _note(
    fuzz: Fuzz, index: int, codes: dict[str, int], problems: list[str], summary: Summary, report: Callable[[str], None]
) -> None:
    summary.cases[fuzz.kind(index)] += 1
    summary.codes.update(codes)
    for problem in problems:
        summary.faults.append(Fault(index, fuzz.kind(index), problem))
        report(f"case {index} ({fuzz.kind(index)}): {problem}")
