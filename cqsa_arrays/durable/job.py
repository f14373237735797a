"""A job is begun, or taken up again: the same that was asked for, of the same inputs."""

from __future__ import annotations

import logging
import os
import secrets
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from ..errors import START_OVER, ArgumentError, StorageError
from ..planner import Plan
from ..storage import PART_SUFFIX, OutputFile, check_target, remove_leftover
from ..version import __version__
from ..wording import Call, Choice, Phrase
from .claims import Claims, Observer
from .ending import HIDDEN_S, POLL_S, JobEnded, bury, end, make_way, require_nobody, require_over, was_finished
from .fact import JobFact, choice, current
from .folder import LOOKS, OF_JOB, JobFolder, JobPaths, clear, look
from .inputs import KnownInput, read_known_inputs
from .records import damaged, link_once, sync_directory, write_record
from .setup import Setup, mark_of, problem_facts
from .states import require_room
from .stop import Stop

logger = logging.getLogger("cqsa_arrays")


class Displaced(Exception):
    """Another process took this one for gone, and has removed what it was making."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A job that this process works on."""

    setup: Setup
    folder: JobFolder
    paths: JobPaths
    claims: Claims
    watch: Observer
    output: OutputFile
    fact: JobFact
    plan: Plan


def stored_request(out: str) -> tuple[dict[str, Any], dict[str, KnownInput], bool]:
    """What the unfinished job of ``out`` was asked for, of which inputs, and whether it may replace a file."""
    folder = JobFolder(out)
    fact = require_job(folder)
    fact.require_scratch(folder)
    return fact.request, read_known_inputs(fact.inputs, out), fact.overwrite


def require_job(folder: JobFolder) -> JobFact:
    """The job of the folder; ArgumentError where there is none, StorageError where its record cannot be right."""
    for _ in range(LOOKS):
        folder.require()
        if (fact := current(folder)) is not None:  # else it has ended, and another may be begun
            return fact
    raise StorageError(f"{folder.record} comes and goes. Is the disk in order?")


def open_job(setup: Setup, folder: JobFolder, claims: Claims, stop: Stop, stack: ExitStack) -> Opened:
    """The job in ``folder``, or a new one; ``stack`` closes its output.

    Raises JobEnded where another process has finished it.
    """
    while True:
        stop.check()
        fact = current(folder)
        if fact is None and setup.resumes:
            require_over(folder)
        if fact is None:
            _begin(setup, folder, claims, stop)
            continue
        paths = fact.paths(folder)
        if not _is_there(paths):
            if not _is_over(folder, fact, stop):
                continue
            dropped = os.path.exists(paths.dropped)
            finished = not dropped and was_finished(setup.out, fact) and _is_same(setup, fact)
            end(folder, fact)
            if finished:
                raise JobEnded
            check_target(setup.out, setup.output.inputs, overwrite=setup.overwrite, of_job=True)
            continue
        return _opened(setup, folder, fact, claims.within(paths.directory), stack, stop)


def _is_there(paths: JobPaths) -> bool:
    return any(map(os.path.exists, (paths.output, paths.finished)))


def _is_over(folder: JobFolder, fact: JobFact, stop: Stop) -> bool:
    """Whether the job, whose output is not there, was finished or dropped; False where it is to be looked at again.

    Raises StorageError where the output is gone although neither was done. Its name may be one that is not seen yet.
    """
    paths, until = fact.paths(folder), time.monotonic() + HIDDEN_S
    while not (os.path.exists(paths.dropped) or was_finished(folder.out, fact)):
        now = current(folder)
        if now is None or now.key != fact.key:
            return True
        if _is_there(paths):
            return False
        if time.monotonic() > until:
            raise StorageError(f"{paths.output}: the unfinished output is gone. ", START_OVER)
        stop.check()
        time.sleep(POLL_S)
    return True


def _opened(setup: Setup, folder: JobFolder, fact: JobFact, claims: Claims, stack: ExitStack, stop: Stop) -> Opened:
    fact.require_scratch(folder)
    # The output may have its name already: whoever gave it that was killed before it could forget the other one.
    overwrite = setup.overwrite or fact.overwrite or was_finished(setup.out, fact)
    check_target(setup.out, setup.output.inputs, overwrite=overwrite, of_job=True)
    _check_same(setup, fact)
    paths, plan = fact.paths(folder), _plan_of(setup, folder, fact)
    if plan.device != fact.device:
        fact = _move(setup, folder, fact, plan, claims, stop)
    try:
        output = OutputFile.reopen(
            setup.out, shape=setup.output.shape, dtype=setup.output.dtype, layout=setup.output.layout,
            lse_dtype=setup.output.lse_dtype, marks={"job": fact.mark},
            part=paths.output if os.path.exists(paths.output) else paths.finished,
        )  # fmt: skip
    except StorageError:
        if was_finished(setup.out, fact):
            raise JobEnded from None
        raise
    stack.callback(output.keep)
    _show_part(folder, paths)
    return Opened(setup, folder, paths, claims, claims.watch, output, fact, plan)


def _move(setup: Setup, folder: JobFolder, fact: JobFact, plan: Plan, claims: Claims, stop: Stop) -> JobFact:
    """The job as one of another device, which must not be computed meanwhile."""
    require_nobody(folder, stop, "device", plan.device, claims.worker)
    fact, paths = fact.moved(plan, setup.request), fact.paths(folder)
    prepared = f"{paths.moved(fact.moves)}.new-{secrets.token_hex(4)}"
    write_record(prepared, fact.facts())
    first = link_once(prepared, paths.moved(fact.moves))
    with suppress(FileNotFoundError):
        os.remove(prepared)
    if not first:
        raise StorageError(f"{setup.out}: the job was moved to another device by another process.")
    sync_directory(paths.directory)
    return fact


def _begin(setup: Setup, folder: JobFolder, claims: Claims, stop: Stop) -> None:
    """Make the job, or wait for another process that does."""
    while not folder.exists:
        if claims.take("begin", look(folder.path)):
            _publish(setup, folder)
            return
        stop.check()
        time.sleep(POLL_S)


def _publish(setup: Setup, folder: JobFolder) -> None:
    """Allocate everything, and then give the record its name, which makes it a job. On an error nothing is left."""
    check_target(setup.out, setup.output.inputs, overwrite=setup.overwrite, of_job=True)
    fact = _fact(setup)
    paths = fact.paths(folder)
    with ExitStack() as undo:
        undo.callback(bury, paths.directory)
        try:
            _make(setup, folder, fact)
            remove_leftover(setup.out + PART_SUFFIX)
            if not (make_way(folder, paths.directory) and link_once(paths.record, folder.record)):
                return  # another process was faster
        except Displaced:
            return
        except FileNotFoundError:
            if os.path.exists(paths.record):
                raise
            return  # displaced after it was made
        undo.pop_all()
    sync_directory(folder.path)
    sync_directory(os.path.dirname(folder.path))
    try:
        check_target(setup.out, setup.output.inputs, overwrite=setup.overwrite, of_job=True)
    except ArgumentError:  # another job has finished meanwhile, whose output must stay
        with suppress(FileNotFoundError):
            os.rename(paths.output, paths.dropped)
        end(folder, fact)
        raise


def _make(setup: Setup, folder: JobFolder, fact: JobFact) -> None:
    """The directory of the job with its output and record, all on the disk."""
    spec, directory = setup.output, folder.of(fact.key)
    new = JobPaths(f"{directory}.new", fact.key, "")
    with ExitStack() as undo:
        with suppress(FileExistsError):  # the first reply was lost
            os.mkdir(new.directory)
        undo.callback(clear, new.directory, OF_JOB)
        try:
            OutputFile.create(
                setup.out, shape=spec.shape, dtype=spec.dtype, layout=spec.layout, lse_dtype=spec.lse_dtype,
                attributes={**spec.attributes, "job": fact.mark}, overwrite=setup.overwrite, inputs=spec.inputs,
                part=new.output,
            ).keep()  # fmt: skip
            require_room(fact.states or new.directory, setup.plan)
            write_record(new.record, fact.facts())
            sync_directory(new.directory)
            os.rename(new.directory, directory)
        except OSError:
            if os.path.isdir(new.directory):
                raise
            raise Displaced from None
        undo.pop_all()


def _fact(setup: Setup) -> JobFact:
    plan, known = setup.plan, setup.watch.known
    return JobFact(
        mark=mark_of(plan, known), key=secrets.token_hex(8), package=__version__, identity=plan.identity,
        device=plan.device, lanes=plan.lanes, chosen=choice(plan),
        problem=problem_facts(plan.problem, setup.output.layout),
        inputs={name: one.record for name, one in known.items()}, request=dict(setup.request),
        states=os.path.abspath(setup.scratch) if setup.scratch else "", overwrite=setup.overwrite,
        pairs=plan.problem.pairs, flops=plan.problem.flops, begun=time.time(),
    )  # fmt: skip


def _show_part(folder: JobFolder, paths: JobPaths) -> None:
    """Give the output the name beside its own that people look for; nothing depends on it."""
    with suppress(OSError):  # a disk without links, or it is there
        os.link(paths.output, folder.out + PART_SUFFIX)


def _is_same(setup: Setup, fact: JobFact) -> bool:
    """Whether the job that has ended is the one that was asked for."""
    try:
        _check_same(setup, fact)
    except (ArgumentError, StorageError):
        return False
    return True


def _check_same(setup: Setup, fact: JobFact) -> None:
    """The unfinished job is the one that was asked for, of inputs that are what they were."""
    if fact.package != __version__:
        raise StorageError(
            f"{setup.out}: an unfinished job of cqsa_arrays {fact.package}; this is {__version__}, whose results may"
            " differ in the last bits. Go on with that version. ", START_OVER,
        )  # fmt: skip
    asked = problem_facts(setup.plan.problem, setup.output.layout)
    for name, value in asked.items():
        if fact.problem.get(name) != value:
            found, expected = _shown(value), f"{_shown(fact.problem.get(name))}, as in the unfinished job"
            raise ArgumentError(name, found, f"{expected} of {setup.out}", START_OVER)
    setup.watch.require_same(read_known_inputs(fact.inputs, setup.out), setup.out)
    if setup.plan.device != fact.device and not setup.moves:
        move = Call("resume", setup.out, (Choice("device", setup.plan.device),))
        remedy = Phrase.of("To move it there: ", move, ". ", START_OVER)
        raise ArgumentError("device", setup.plan.device, f"{fact.device}, as in the unfinished job", remedy)
    if setup.plan.lanes != fact.lanes and not setup.moves:
        raise ArgumentError("lanes", setup.plan.lanes, f"{fact.lanes}, as in the unfinished job", START_OVER)


def _shown(value: object) -> str:
    if isinstance(value, dict):  # a mask
        return ", ".join(str(part) if name == "kind" else f"{name} {part}" for name, part in value.items())
    return " ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _plan_of(setup: Setup, folder: JobFolder, fact: JobFact) -> Plan:
    """The plan that goes on with what is there: that of this call if it is the same."""
    if setup.plan.identity == fact.identity and setup.plan.chosen.states == fact.chosen["states"]:
        return setup.plan
    try:
        plan = setup.take_over(fact.chosen, fact.lanes)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise damaged(folder.record, f"its plan lacks something ({error!r})") from error
    moved = f" on {plan.device}: from here on, its bits are those of that device" if fact.device != plan.device else ""
    logger.info("going on with the plan that the job was begun with%s", moved)
    return plan
