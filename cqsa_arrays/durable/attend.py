"""Running a job: begun or taken up again, its free lanes in turn, finished by whoever finds all of them done."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace

from ..engine import OutputResults, Progress, RunReport, run
from ..engine.schedule import Position, Schedule
from ..errors import ArgumentError, CqsaError, DeviceMemoryError, StorageError
from ..planner import Plan, output_piece_rows
from ..storage import OutputFile, RawFile, check_target
from .attempt import Attempt, forget, link_done, new_attempt, newest, newest_now, remove_unneeded
from .checkpoint import Lane, LaneCheckpoint
from .claims import Claims, Observer, Worker, read_worker
from .ending import (
    HIDDEN_S,
    POLL_S,
    JobEnded,
    check_unended,
    drop,
    end,
    give_name,
    leave,
    living,
    remove_remains,
    require_over,
)
from .fact import current
from .finished import is_result_of
from .folder import LOOKS, JobFolder, Picture
from .job import Opened, open_job
from .journal import Extent, Journal, PagedFile
from .merge import merge_lanes
from .pages import Pages
from .record import LaneRecord
from .records import damaged, sync_directory
from .setup import Setup
from .states import attempts_over, attempts_with_states, heirs_of
from .stop import Stop

NOTHING = RunReport(0.0, 0, 0, 0)


class Overtaken(Exception):
    """Another process has taken the lane over, or has gone on with it."""


class Outdated(Exception):
    """What a checkpoint names is no longer there, for its writer has gone on."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: what it did, and who goes on with the rest, for people; nobody where the job is finished."""

    report: RunReport
    others: tuple[str, ...] = ()


def attend(setup: Setup, stop: Stop) -> Ended:
    """Begin or take up the job of ``setup``, run the lanes that no other process runs, and finish it if all are done.

    Where the output is there already, of the same problem and inputs, nothing is left to do, unless it is to be written
    over. Raises JobStopped where ``stop`` asks for it; then and after any other error, what was committed is kept for
    the next run.
    """
    stop.check()
    folder = JobFolder(setup.out)
    folder.refuse_inputs(setup.output.inputs)
    try:
        _clear_the_way(setup, folder, stop)
        return _attend(setup, folder, stop)
    except JobEnded:
        return Ended(NOTHING, () if os.path.exists(setup.out) else ("the end is computed by another process",))
    except OSError as error:
        anew = setup.overwrite or setup.restart
        if not (anew or os.path.isdir(folder.path)) and is_result_of(
            setup
        ):  # others went on while this one stood still
            return Ended(NOTHING)
        if isinstance(error, CqsaError):
            raise
        raise StorageError(
            f"{error.filename or folder.path}: {error.strerror}. A job keeps its record there."
        ) from error
    except ArgumentError:
        if setup.restart or setup.overwrite or folder.exists or not is_result_of(setup):
            raise
        return Ended(NOTHING)
    except DeviceMemoryError as error:  # met before anything is computed
        if not _is_new(folder) or any(living(folder, Observer(folder.path))):
            raise
        drop(folder, stop, overwrite=setup.overwrite)
        return attend(replace(setup, plan=setup.smaller(setup.plan, error), restart=False, resumes=False), stop)


def _clear_the_way(setup: Setup, folder: JobFolder, stop: Stop) -> None:
    """Drop the job that is there, if that was asked for. Raises ArgumentError where the output may not be made."""
    if setup.restart:
        check_target(setup.out, setup.output.inputs, overwrite=setup.overwrite, of_job=True)
        drop(folder, stop, overwrite=setup.overwrite)
    if not folder.exists:
        if setup.resumes:
            require_over(folder)
        if os.path.lexists(setup.out) and not setup.overwrite:
            remove_remains(folder)
        check_target(setup.out, setup.output.inputs, overwrite=setup.overwrite, of_job=True)


def _is_new(folder: JobFolder) -> bool:
    """Whether nothing was committed yet."""
    fact = current(folder)
    if fact is None:
        return True
    try:
        picture = fact.paths(folder).look()
    except FileNotFoundError:  # another process has just ended it
        return False
    return not picture.done and not picture.checkpoints


def _attend(setup: Setup, folder: JobFolder, stop: Stop) -> Ended:
    with ExitStack() as stack:
        watch = Observer(folder.path)
        stack.callback(leave, folder, watch)
        worker = stack.enter_context(Worker(folder))
        list(living(folder, watch))  # who stands still from now on until the end is gone then
        return _work(open_job(setup, folder, Claims(folder.path, worker, watch), stop, stack), stop)


def _work(opened: Opened, stop: Stop) -> Ended:
    with _unless_ended(opened):
        done = _done_pairs(opened, stop)
        with closing(opened.setup.progress(done)) as progress:
            ended = _run_lanes(opened, stop, progress)
    return ended if ended.others else replace(ended, others=_finish(opened, stop))


@contextmanager
def _unless_ended(opened: Opened) -> Iterator[None]:
    """What was to be read or written may be gone because another process has finished the job: then JobEnded."""
    try:
        yield
    except OSError:
        check_unended(opened.folder, opened.fact, opened.output)
        raise


def _done_pairs(opened: Opened, stop: Stop) -> int:
    """The visible pairs that all lanes have done."""
    picture, pairs = opened.paths.look(), 0
    for lane in {*picture.done, *picture.checkpoints}:
        stop.check()
        if lane < opened.plan.lanes:
            pairs += _newest(opened, lane, picture).pairs
    return pairs


def _newest(opened: Opened, lane: int, picture: Picture | None = None) -> LaneRecord:
    """The newest checkpoint of a lane; the one that another process has removed meanwhile had a newer one."""
    found = newest_now(opened.paths, opened.plan, lane, _look(opened) if picture is None else picture)
    if found is None:
        raise _restless(opened, lane)
    return found


def _restless(opened: Opened, lane: int) -> StorageError:
    check_unended(opened.folder, opened.fact, opened.output)
    return StorageError(f"{opened.paths.directory}: files of lane {lane} come and go. Is the disk in order?")


def _run_lanes(opened: Opened, stop: Stop, progress: Progress) -> Ended:
    """Run the lanes that nobody else runs, in turn, until there is none."""
    report = NOTHING
    while True:
        picture = _look(opened)
        left = [lane for lane in range(opened.plan.lanes) if lane not in picture.done]
        ran = False
        for lane in left:
            stop.check()
            if opened.claims.take(f"lane-{lane}", picture):
                claim = picture.claims.get(f"lane-{lane}", 0) + 1
                with suppress(Overtaken):
                    report, ran = report + _run_lane(opened, lane, claim, stop, progress), True
                    if not os.path.exists(opened.paths.done(lane)):
                        raise _restless(opened, lane)
        if not left:
            return Ended(report)
        if not ran:
            others = _others(opened, [f"lane-{lane}" for lane in left], picture)
            if others is not None:
                return Ended(report, others)
            time.sleep(POLL_S)


def _look(opened: Opened) -> Picture:
    try:
        return opened.paths.look()
    except FileNotFoundError:
        check_unended(opened.folder, opened.fact, opened.output)
        raise


def _others(opened: Opened, shares: list[str], picture: Picture) -> tuple[str, ...] | None:
    """Who has claimed the shares that are left; None where it is not known yet that all of them live."""
    names = {share: opened.claims.holder(share, picture.claims.get(share, 1)) for share in shares}
    if opened.claims.worker in names.values() or any(opened.watch.is_gone(name) for name in set(names.values())):
        return None
    if not all(opened.watch.was_seen_moving(name) for name in names.values()):
        return None
    found = []
    for share, name in names.items():
        with suppress(FileNotFoundError):
            what = share.replace("-", " ") if share != "finish" else "the end"
            found.append(f"{what} is computed by {read_worker(opened.folder.path, name)[0] or 'another process'}")
    return tuple(found)


def _run_lane(opened: Opened, lane: int, claim: int, stop: Stop, progress: Progress) -> RunReport:
    end = Schedule.of(opened.plan).end
    paths = opened.paths
    for _ in range(LOOKS):
        # Whoever claims it first finds nothing: to list the files of all lanes for each would take for ever.
        # Who is over must be known before what they did last is looked for.
        over = attempts_over(paths, lane) if claim > 1 else frozenset()
        picture = _look(opened) if claim > 1 else Picture()
        try:
            record = newest(paths, opened.plan, lane, picture)
            if lane in picture.done:
                return NOTHING
            if record.position == end:
                link_done(paths, lane, picture, record)
                remove_unneeded(paths, opened.plan, lane, attempts_with_states(paths, lane))
                return NOTHING
        except FileNotFoundError:  # it has gone on: record and picture must be of one moment
            continue
        if claim > 1:
            sync_directory(paths.directory)  # what is seen may be lost with the power as long as it is not on the disk
        forget(paths, lane, picture, over - {record.attempt, *heirs_of(paths, lane, record.attempt, over)})
        attempt = Attempt(paths, opened.plan, record, claim, over)
        with suppress(Outdated):
            return _attempt(opened, attempt, claim, end, stop, progress)
    raise _restless(opened, lane)


def _attempt(opened: Opened, attempt: Attempt, claim: int, end: Position, stop: Stop, progress: Progress) -> RunReport:
    plan, setup, record = opened.plan, opened.setup, attempt.record
    with closing(_reopened(opened)) as output_now:
        _pages(opened, [record]).check(output_now, plan.chosen.residency.threads, stop.check)

    def check() -> None:
        setup.check_inputs()
        # Nobody ends a job one of whose lanes is computed by a process that has not stood still.
        check_unended(opened.folder, opened.fact, opened.output, HIDDEN_S if opened.claims.may_be_lost else 0.0)
        check_mine()

    def check_mine() -> None:
        if not opened.claims.is_mine(f"lane-{record.lane}", claim):
            raise Overtaken

    with ExitStack() as stack:
        try:
            stack.enter_context(attempt)
        except OSError:
            if _newest(opened, record.lane) == record:
                raise
            raise Outdated from None
        output = opened.output.through(PagedFile(opened.output.file, attempt.journal))
        checkpoint = stack.enter_context(closing(LaneCheckpoint(Lane(plan, attempt, opened.output, check), end, stop)))
        results = stack.enter_context(closing(_results(plan, output)))
        try:
            report = run(plan, setup.inputs, results, progress, checkpoint, record.lane)
        except OSError:  # of files that whoever has overtaken this one has removed
            check_mine()
            raise
        done = attempt.record.pairs - record.pairs
    return replace(report, flops=plan.problem.flops * done // max(1, plan.problem.pairs))


def _reopened(opened: Opened) -> RawFile:
    """The output as it is now: what is open for long may be what it was, on a network file system."""
    return RawFile(opened.paths.output, opened.output.file.label, write=True)


def _results(plan: Plan, output: OutputFile) -> OutputResults:
    pieces = output_piece_rows(plan.problem, plan.chosen.heads)
    return OutputResults(output, pieces, plan.chosen.residency.threads, None)


def _pages(opened: Opened, records: list[LaneRecord], *more: Extent) -> Pages:
    """What the journals of some lanes say of the output."""
    extents = [extent for record in records for extent in record.journals]
    return Pages([*extents, *more], opened.paths.journal, opened.output.place)


def _finish(opened: Opened, stop: Stop) -> tuple[str, ...]:
    """Put the lanes together and give the file its name; who does it, where that is another process."""
    while True:
        picture = _look(opened)
        with _unless_ended(opened):
            mine = opened.claims.take("finish", picture)
        if mine:
            break
        others = _others(opened, ["finish"], picture)
        if others is not None:
            return others
        stop.check()
        time.sleep(POLL_S)
    if not opened.output.file.is_at(opened.paths.finished):
        with _unless_ended(opened):
            _complete(opened, picture, stop)
    give_name(opened.folder, opened.fact, overwrite=opened.setup.overwrite or opened.fact.overwrite)
    end(opened.folder, opened.fact)
    return ()


def _complete(opened: Opened, picture: Picture, stop: Stop) -> None:
    """Everything that lanes have left comes to its place, is looked at, and put on the disk. It may be done again."""
    plan, output = opened.plan, opened.output
    records = []
    for lane in range(plan.lanes):
        stop.check()
        records.append(newest(opened.paths, plan, lane, picture))
        if records[-1].position != Schedule.of(plan).end:
            raise damaged(opened.paths.done(lane), "it is not at the end of the lane")
    merged: list[Extent] = []
    if plan.lanes_meet:
        name = new_attempt(picture.claims.get("finish", 0) + 1)
        with closing(Journal(opened.paths.journal(name), name)) as journal:
            with closing(_results(plan, output.through(PagedFile(output.file, journal)))) as results:
                merge_lanes(plan, records, opened.paths, results, stop)
            merged.append(journal.seal())
    pages = _pages(opened, records, *merged)
    if pages.size_bytes != (expected := sum(len(rows.place) for rows in output.data_sets)):
        raise damaged(opened.paths.directory, f"its lanes have written {pages.size_bytes} bytes of {expected}")
    output.sync()
    with closing(_reopened(opened)) as output_now:
        pages.check(output_now, plan.chosen.residency.threads, stop.check)
        pages.compose(output_now, os.fstat(output_now.descriptor).st_size, stop.check)
        opened.setup.check_inputs()
        output_now.sync()
