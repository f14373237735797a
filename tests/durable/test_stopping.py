"""When a job stops that was asked to, or whose time is over: soon, with everything committed, wherever it is."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from durable_cases import CASES, KilledAtCommit, command, digest, log, make, run, unbroken, wait

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.durable import Stop, checkpoint, stopped_by
from cqsa_arrays.durable import stop as stopping
from cqsa_arrays.engine import OutputResults
from cqsa_arrays.kernels.cpu.kernel import CpuKernel
from cqsa_arrays.storage import RawFile

CASE = CASES[0]


class Clock:
    """``time`` of a module, simulated: it goes on where ``now`` is changed."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def time(self) -> float:
        return self.now


def test_time_counts_from_the_beginning_of_the_call(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopping, "time", clock)
    stop = Stop(10.0, began=clock.now - 4)
    stop.worked = True
    assert stop.reason_within(5.9) is None
    assert stop.reason_within(6.0) == "the time is over"
    clock.now += 6
    assert stop.reason_within(0.0) == "the time is over"


def test_a_run_computes_something_in_any_time_but_none(monkeypatch) -> None:
    monkeypatch.setattr(stopping, "time", Clock())
    late, none = Stop(1.0, began=0.0), Stop(0.0)
    assert late.reason_within(0.0) is None
    late.worked = True
    assert late.reason_within(0.0) == none.reason_within(0.0) == "the time is over"
    late = Stop(1.0, began=0.0)
    late.ask("terminated")
    assert late.reason_within(0.0) == "terminated"
    with pytest.raises(cqsa.JobStopped, match="terminated"):
        late.check()
    none.check()  # time is no reason not to finish


@pytest.mark.parametrize(("limit_s", "parts"), [(0.5, 1), (5.5, 3), (8.0, 6), (3.5, 1)])
def test_parts_and_the_commit_are_within_the_time(here, monkeypatch, limit_s, parts) -> None:
    """Parts take a second each by the clock, a commit a second and a half: it stops so that its end is in time."""
    clock = Clock()
    for module in (stopping, checkpoint):
        monkeypatch.setattr(module, "time", clock)
    usual, committed, computed = CpuKernel.accumulate, checkpoint.LaneCheckpoint._commit, []

    def accumulate(*arguments, **named) -> None:
        usual(*arguments, **named)
        clock.now += 1.0
        computed.append(clock.now)

    def commit(*arguments) -> None:
        clock.now += 1.5
        committed(*arguments)

    monkeypatch.setattr(CpuKernel, "accumulate", accumulate)
    monkeypatch.setattr(checkpoint.LaneCheckpoint, "_commit", commit)
    monkeypatch.setattr(checkpoint, "Rates", lambda: SimpleNamespace(saved_bytes=700 * 10 * 4 / 1.5))
    q = np.ones((1, 700, 8), "float32")
    call = {"out": "out.h5", "device": "cpu"}
    monkeypatch.setattr("cqsa_arrays.job.time", clock)
    options = Options(chunks=7, durable=True, checkpoint_s=100.0, max_time_s=limit_s)
    with pytest.raises(cqsa.JobStopped, match="the time is over"):
        cqsa.attention(q, q, q, **call, options=options)
    assert len(computed) == parts
    assert clock.now <= 1000 + max(limit_s, 2.5)
    assert cqsa.status("out.h5").done_pairs > 0


def test_a_limit_that_is_too_short_is_no_job_without_an_end(here) -> None:
    q = np.random.default_rng(0).standard_normal((1, 500, 8)).astype("float32")
    expected = cqsa.attention(q, q, q, device="cpu", options=Options(chunks=3))
    options, found, runs = Options(chunks=3, durable=True, max_time_s=1e-6), None, 0
    while found is None and runs < 100:
        runs += 1
        try:
            found = cqsa.attention(q, q, q, out="out.h5", device="cpu", options=options)
        except cqsa.JobStopped:
            continue
    assert runs > 3
    assert found[...].tobytes() == expected.tobytes()


def test_asked_while_finished_rows_are_checked(here) -> None:
    """A job of many finished rows reads them all before it goes on."""
    case = CASES[2]
    make(case)
    expected = unbroken(case)
    assert run(command(case), KilledAtCommit(8)) == -signal.SIGKILL
    stop, looked = Stop(), []
    usual = RawFile.checksum

    def checksum(self, *arguments):
        looked.append(arguments)
        stop.ask("terminated")
        return usual(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RawFile, "checksum", checksum)
        patched.setattr("cqsa_arrays.resumable.Stop", lambda *_: stop)
        with pytest.raises(cqsa.JobStopped, match="terminated"):
            cqsa.resume("out.h5")
    assert len(looked) == 1
    cqsa.resume("out.h5")
    assert digest() == expected


def test_asked_while_lanes_are_merged(here) -> None:
    case = CASES[4]
    make(case)
    expected = unbroken(case)
    stop, taken = Stop(), []
    take = OutputResults.take

    def asked(self, *arguments, **named):
        taken.append(arguments)
        stop.ask("terminated")
        return take(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(OutputResults, "take", asked)
        patched.setattr("cqsa_arrays.cli.commands.Stop", lambda *_: stop)
        with pytest.raises(cqsa.JobStopped, match="terminated"):
            _attend(case)
    assert len(taken) == 1
    assert run(command(case)) == 0, log()
    assert digest() == expected


def _attend(case) -> None:
    """``cqsa attend`` of a case without the command's own handling of errors."""
    from cqsa_arrays.cli import commands
    from cqsa_arrays.cli.parser import build_parser

    arguments = build_parser().parse_args(command(case))
    arguments.began, arguments.termination = time.monotonic(), SimpleNamespace(reason=None)
    commands.attend(arguments)


def interrupted_in_python() -> int:
    """A durable call in Python, in a process of its own, that Ctrl-C stops; 0 if it ends as it should."""
    process = os.fork()
    if process:
        return wait(process)
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        q = np.ones((1, 40_000, 16), "float32")
        _interrupt_when_computing()
        try:
            options = Options(durable=True, threads=1, checkpoint_s="1h")
            cqsa.attention(q, q, q, out="out.h5", device="cpu", options=options)
        except KeyboardInterrupt as error:
            restored = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            code = 0 if restored and "cqsa.resume('out.h5')" in str(error) else 2
    finally:
        os._exit(code)


def _interrupt_when_computing() -> None:
    """Ctrl-C, once there is something to commit."""
    usual = CpuKernel.accumulate

    def accumulate(*arguments, **named) -> None:
        usual(*arguments, **named)
        os.kill(os.getpid(), signal.SIGINT)

    CpuKernel.accumulate = accumulate


def test_ctrl_c_in_python_commits_what_is_done(here) -> None:
    assert interrupted_in_python() == 0
    found = cqsa.status("out.h5")
    assert found.state == "stopped"
    assert 0 < found.done_pairs < found.pairs


def test_a_signal_that_a_library_has_swallowed_is_heard_before_the_job_begins(here) -> None:
    make(CASE)

    def swallowing() -> None:
        """While the inputs are looked at SIGTERM comes, in code that lets no exception out."""
        from cqsa_arrays.cli import trial

        def look(_arguments) -> None:
            with contextlib.suppress(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)

        trial.try_inputs = look

    assert run(command(CASE), swallowing) == 143
    assert "cqsa attend: terminated" in log()
    assert sorted(os.listdir()) == ["qkv.h5", "run.log"]


def test_ctrl_c_is_left_to_those_who_handle_it(here) -> None:
    """A handler of the caller's own, and threads, which have no signals."""
    q, calls, before = np.ones((1, 300, 8), "float32"), [], signal.getsignal(signal.SIGINT)

    def own(number, frame) -> None:
        calls.append(number)

    usual = CpuKernel.accumulate

    def accumulate(*arguments, **named) -> None:
        usual(*arguments, **named)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, own)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(CpuKernel, "accumulate", accumulate)
            cqsa.attention(q, q, q, out="out.h5", device="cpu", options=Options(durable=True))
        assert calls
    finally:
        signal.signal(signal.SIGINT, before)
    options, done = Options(durable=True, overwrite=True), []
    thread = threading.Thread(
        target=lambda: done.append(cqsa.attention(q, q, q, out="out.h5", device="cpu", options=options))
    )
    thread.start()
    thread.join()
    assert len(done) == 1


def test_the_second_signal_does_what_it_did_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop, calls = Stop(), []
    signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        with stopped_by({signal.SIGTERM: "terminated"}, stop):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reason_within(0.0) == "terminated"
            assert not calls
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls
    finally:
        signal.signal(signal.SIGTERM, before)
