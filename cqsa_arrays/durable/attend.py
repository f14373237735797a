"""Running a job: begun or taken up again, its free lanes in turn, finished by whoever completes the last one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

from ..engine import OutputResults, Progress, RunReport, run
from ..engine.schedule import Position, Schedule
from ..errors import START_OVER, DeviceMemoryError, JobBusyError, StorageError
from ..planner import Plan, output_piece_rows
from ..storage import OutputFile, check_target
from .checkpoint import Lane, LaneCheckpoint
from .folder import FINISH, SETUP, JobFolder
from .job import JobFact, drop, open_job, remove_remains
from .ledger import Ledger
from .lock import Lock
from .merge import merge_lanes
from .record import read_lane, read_rows, runner
from .setup import Setup
from .states import lane_lock, open_lane_states, remove_states
from .stop import Stop

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Opened:
    """A job that this process works on."""

    setup: Setup
    folder: JobFolder
    ledger: Ledger
    output: OutputFile
    fact: JobFact
    plan: Plan

    @property
    def directory(self) -> str:
        """Where the states are."""
        return self.fact.directory(self.folder)

    @property
    def end(self) -> Position:
        """Where every lane ends."""
        return Schedule(self.plan.groups, self.plan.build_cover()).end

    def unfinished(self) -> list[int]:
        """The lanes that have not come to their end."""
        return [lane for lane in range(self.plan.lanes) if read_lane(self.ledger, lane).position != self.end]


def attend(setup: Setup, stop: Stop) -> RunReport:
    """Begin or take up the job of ``setup``, run the lanes that no other process runs, and finish it if none is left.

    Raises JobStopped where ``stop`` asks for it, and JobBusyError where other processes still run lanes; then and after
    any other error, what was committed is kept for the next run.
    """
    folder = JobFolder(setup.out)
    if setup.restart:
        check_target(setup.out, setup.output.inputs, overwrite=setup.overwrite, of_job=True)
        drop(folder)
    if not folder.exists:
        if os.path.lexists(setup.out) and not setup.overwrite:
            remove_remains(folder)
        check_target(setup.out, setup.output.inputs, overwrite=setup.overwrite, of_job=True)
    try:
        return _attend(setup, folder, stop)
    except DeviceMemoryError as error:  # met before anything is computed
        if not _is_new(folder):
            raise
        drop(folder)
        return attend(replace(setup, plan=setup.smaller(setup.plan, error), restart=False), stop)


def _is_new(folder: JobFolder) -> bool:
    """Whether nothing was committed yet."""
    with closing(Ledger(folder.ledger)) as ledger:
        return not ledger.facts("lane/")


def _attend(setup: Setup, folder: JobFolder, stop: Stop) -> RunReport:
    with _opened(setup, folder) as opened:
        if opened is None:  # an earlier run was interrupted after the file had got its name
            return RunReport(0.0, 0, 0, 0)
        done = sum(read_lane(opened.ledger, lane).pairs for lane in range(opened.plan.lanes))
        with closing(setup.progress(done)) as progress:
            report = _run_lanes(opened, stop, progress)
        busy = [f"lane {lane} is computed by {runner(opened.ledger, lane)}" for lane in opened.unfinished()]
        if busy:
            raise JobBusyError(
                f"{setup.out}: what this process could do is done; {' and '.join(busy)}; the last one finishes the file"
            )
        _finish(opened)
    return report


@contextmanager
def _opened(setup: Setup, folder: JobFolder) -> Iterator[Opened | None]:
    """The job, begun or taken up; None where it is complete already. Files are closed at the end, and kept."""
    folder.make()
    with ExitStack() as stack:
        lock = folder.lock(SETUP, PATIENCE_S)
        if lock is None:
            raise JobBusyError(f"{setup.out}: another process is beginning this job")
        with lock:
            found = open_job(setup, folder, stack)
        yield None if found is None else Opened(setup, folder, *found)


def _run_lanes(opened: Opened, stop: Stop, progress: Progress) -> RunReport:
    """Run the lanes that nobody else runs, in turn, until there is none; what that took."""
    report = RunReport(0.0, 0, 0, 0)
    tried: set[int] = set()
    while True:
        ran = False
        for number in opened.unfinished():
            if number in tried:
                continue
            # Somebody who only looks holds it for a moment.
            lock = Lock.take(lane_lock(opened.directory, opened.fact.key, number), patience_s=1.0)
            if lock is None:
                continue
            with lock:
                tried.add(number)
                if number in opened.unfinished():  # not done by another process meanwhile
                    opened.ledger.commit({f"runner/{number}": {"pid": os.getpid(), "host": os.uname().nodename}})
                    report, ran = report + _run_lane(opened, number, stop, progress), True
        if not ran:
            return report


def _run_lane(opened: Opened, number: int, stop: Stop, progress: Progress) -> RunReport:
    record, plan, setup = read_lane(opened.ledger, number), opened.plan, opened.setup
    _check_rows(opened, number, record.finished)
    with ExitStack() as stack:
        states = stack.enter_context(closing(open_lane_states(opened.directory, opened.fact.key, plan, number)))
        states.restore(record.versions)
        lane = Lane(number, plan, opened.ledger, states, opened.output, setup.check_inputs)
        checkpoint = stack.enter_context(closing(LaneCheckpoint(lane, record, opened.end, stop)))
        results = stack.enter_context(closing(_results(plan, opened.output)))
        report = run(plan, setup.inputs, results, progress, checkpoint, number)
    done = read_lane(opened.ledger, number).pairs - record.pairs
    return replace(report, flops=plan.problem.flops * done // max(1, plan.problem.pairs))


def _results(plan: Plan, output: OutputFile) -> OutputResults:
    pieces = output_piece_rows(plan.problem, plan.chosen.heads)
    return OutputResults(output, pieces, plan.chosen.residency.threads, None)


def _check_rows(opened: Opened, lane: int, expected: int) -> None:
    """The rows that earlier runs have finished are in the file as they were written."""
    for number, rows, checksum in read_rows(opened.ledger, lane, expected):
        group = opened.plan.groups[number]
        if opened.output.checksum(group.batch, group.heads, rows) != checksum:
            raise StorageError(
                f"{opened.setup.out}.part: rows {rows.start} to {rows.stop - 1} are not what was committed: the file is"
                f" damaged. {START_OVER}"
            )


def _finish(opened: Opened) -> None:
    """Put the lanes together, give the file its name, forget the job. What is interrupted here is done again."""
    try:
        lock = opened.folder.lock(FINISH, PATIENCE_S)
    except StorageError:
        if opened.folder.exists:
            raise
        return  # another process has finished it, meanwhile
    if lock is None:
        raise JobBusyError(f"{opened.setup.out}: another process is finishing this job")
    with lock:
        if not opened.folder.exists:  # by another process, meanwhile
            return
        if opened.plan.lanes_meet:
            with closing(_results(opened.plan, opened.output)) as results:
                merge_lanes(opened.plan, opened.ledger, opened.directory, opened.fact.key, results)
        opened.setup.check_inputs()
        opened.output.finish()
        remove_states(opened.directory, opened.fact.key, opened.plan.lanes)
        opened.folder.remove()
