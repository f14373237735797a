"""What a ledger says of a whole job, and how one is begun, taken up again and dropped."""

from __future__ import annotations

import logging
import os
import secrets
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import START_OVER, ArgumentError, JobBusyError, StorageError
from ..planner import Plan
from ..storage import PART_SUFFIX, OutputFile, check_target, describe
from ..version import __version__
from .folder import FINISH, SETUP, JobFolder
from .ledger import Ledger
from .lock import Lock
from .setup import Setup, fingerprints, mark_of, problem_facts
from .states import lane_lock, remove_states, reserve_states

logger = logging.getLogger("cqsa_arrays")
# Of a candidate: what another machine must take over for the same cover, chunks and states.
CHOICE = ("cover", "query_parts", "key_parts", "batches", "heads", "states", "tile_tokens", "keys_stay")


@dataclass(frozen=True, slots=True)
class JobFact:
    """The entry "job" of a ledger.

    ``mark`` names the job in its output; ``key`` is part of the names of its files of states, which are in the
    directory ``states`` ("": in the job's folder).
    """

    mark: str
    key: str
    package: str
    identity: str
    device: str
    lanes: int
    chosen: dict[str, Any]
    problem: dict[str, Any]
    inputs: dict[str, Any]
    request: dict[str, Any]
    states: str
    overwrite: bool
    pairs: int
    flops: int
    begun: float

    def directory(self, folder: JobFolder) -> str:
        """Where the states are."""
        return self.states or folder.path

    def require_directory(self, folder: JobFolder) -> None:
        """Raise StorageError where the states are gone with it."""
        if not os.path.isdir(self.directory(folder)):
            raise StorageError(
                f"{self.directory(folder)}: the directory with this job's states is gone. Put it back. {START_OVER}"
            )


def read_fact(ledger: Ledger) -> JobFact:
    """The job of a ledger; StorageError where that says nothing useful."""
    found = ledger.get("job")
    try:
        return JobFact(**found)
    except TypeError as error:
        raise ledger.damaged("it does not say what the job is") from error


def stored_request(out: str) -> tuple[dict[str, Any], bool]:
    """What the unfinished job of ``out`` was asked for, and whether it may replace a file of that name."""
    folder = JobFolder(out)
    folder.require()
    with closing(Ledger(folder.ledger)) as ledger:
        fact = read_fact(ledger)
    fact.require_directory(folder)
    return fact.request, fact.overwrite


def open_job(setup: Setup, folder: JobFolder, stack: ExitStack) -> tuple[Ledger, OutputFile, JobFact, Plan] | None:
    """The job in ``folder``, or a new one; None where its output has its name already. ``stack`` closes the files."""
    if not folder.exists:
        return _begin(setup, folder, stack)
    ledger = stack.enter_context(Ledger(folder.ledger))
    fact = read_fact(ledger)
    if _was_finished(setup.out, fact):
        _remove(folder, fact)
        return None
    fact.require_directory(folder)
    overwrite = setup.overwrite or fact.overwrite
    check_target(setup.out, setup.output.inputs, overwrite=overwrite, of_job=True)
    _check_same(setup, fact)
    plan = _plan_of(setup, ledger, fact)
    if plan.device != fact.device:
        fact = _moved(setup, folder, ledger, fact, plan)
    try:
        output = OutputFile.reopen(
            setup.out, shape=setup.output.shape, dtype=setup.output.dtype, layout=setup.output.layout,
            lse_dtype=setup.output.lse_dtype, marks={"job": fact.mark}, overwrite=overwrite,
        )  # fmt: skip
    except StorageError:
        if folder.exists and not _was_finished(setup.out, fact):
            raise
        return None  # another process has given it its name, meanwhile
    stack.callback(output.keep)
    return ledger, output, fact, plan


def _moved(setup: Setup, folder: JobFolder, ledger: Ledger, fact: JobFact, plan: Plan) -> JobFact:
    """The job as one of another device, which must not be computed meanwhile."""
    with ExitStack() as held:
        _hold_lanes(folder, fact, held)
        request = dict(setup.request)
        fact = replace(fact, device=plan.device, identity=plan.identity, chosen=_choice(plan), request=request)
        ledger.commit({"job": asdict(fact)})
    return fact


def _begin(setup: Setup, folder: JobFolder, stack: ExitStack) -> tuple[Ledger, OutputFile, JobFact, Plan]:
    """Allocate everything; the entry of the ledger, which comes last, makes it a job. On an error nothing is left."""
    from ..storage.create import sync_directory  # h5py comes with it

    plan, spec = setup.plan, setup.output
    forget_attempt(folder)
    with ExitStack() as undo:
        undo.callback(folder.remove)
        inputs = fingerprints(setup.inputs)
        mark, key = mark_of(plan.identity, inputs), secrets.token_hex(8)
        output = OutputFile.create(
            setup.out, shape=spec.shape, dtype=spec.dtype, layout=spec.layout, lse_dtype=spec.lse_dtype,
            attributes={**spec.attributes, "job": mark}, overwrite=setup.overwrite, inputs=spec.inputs, of_job=True,
        )  # fmt: skip
        undo.callback(output.abandon)
        fact = JobFact(
            mark=mark, key=key, package=__version__, identity=plan.identity, device=plan.device, lanes=plan.lanes,
            chosen=_choice(plan), problem=problem_facts(plan.problem, spec.layout), inputs=inputs,
            request=dict(setup.request), states=os.path.abspath(setup.scratch) if setup.scratch else "",
            overwrite=setup.overwrite, pairs=plan.problem.pairs, flops=plan.problem.flops, begun=time.time(),
        )  # fmt: skip
        with Ledger(folder.new_ledger, create=True) as new:
            new.commit({"job": asdict(fact)})
        undo.callback(remove_states, fact.directory(folder), key, plan.lanes)
        reserve_states(fact.directory(folder), key, plan)
        os.replace(folder.new_ledger, folder.ledger)  # with its name the job begins, and with its first entry there
        sync_directory(folder.ledger)
        sync_directory(folder.path)
        undo.pop_all()
    stack.callback(output.keep)
    return stack.enter_context(Ledger(folder.ledger)), output, fact, plan


def forget_attempt(folder: JobFolder) -> None:
    """Remove the states that a run made elsewhere which was killed before its ledger had its name."""
    if os.path.exists(folder.new_ledger):
        # Half a ledger names no states; a directory that is gone holds none.
        with suppress(OSError), Ledger(folder.new_ledger) as left:
            fact = read_fact(left)
            remove_states(fact.directory(folder), fact.key, fact.lanes)


def _choice(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan.chosen, name) for name in CHOICE}


def _check_same(setup: Setup, fact: JobFact) -> None:
    """The unfinished job is the one that was asked for, of inputs that are what they were."""
    if fact.package != __version__:
        raise StorageError(
            f"{setup.out}: an unfinished job of cqsa_arrays {fact.package}; this is {__version__}, whose results may"
            f" differ in the last bits. Go on with that version. {START_OVER}"
        )
    asked = problem_facts(setup.plan.problem, setup.output.layout)
    for name, value in asked.items():
        if fact.problem.get(name) != value:
            found, expected = _shown(value), f"{_shown(fact.problem.get(name))}, as in the unfinished job"
            raise ArgumentError(name, found, f"{expected} of {setup.out}", START_OVER)
    for name, now in fingerprints(setup.inputs).items():
        stored = fact.inputs.get(name, {})
        changed = [key for key, value in now.items() if stored.get(key) != value]
        if changed:
            raise StorageError(
                f"{name}: not the input that the unfinished job of {setup.out} was begun with"
                f" (different: {', '.join(changed)}). Bring that back. {START_OVER}"
            )
    if setup.plan.device != fact.device and not setup.moves:
        remedy = f"To move it there: cqsa resume {setup.out} --device {setup.plan.device}. {START_OVER}"
        raise ArgumentError("device", setup.plan.device, f"{fact.device}, as in the unfinished job", remedy)
    if setup.plan.lanes != fact.lanes and not setup.moves:
        raise ArgumentError("lanes", setup.plan.lanes, f"{fact.lanes}, as in the unfinished job", START_OVER)


def _shown(value: object) -> str:
    return " ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _plan_of(setup: Setup, ledger: Ledger, fact: JobFact) -> Plan:
    """The plan that goes on with what is there: that of this call if it is the same."""
    if setup.plan.identity == fact.identity and setup.plan.chosen.states == fact.chosen.get("states"):
        return setup.plan
    try:
        plan = setup.take_over(fact.chosen, fact.lanes)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ledger.damaged(f"its plan lacks something ({error!r})") from error
    moved = f" on {plan.device}: from here on, its bits are those of that device" if fact.device != plan.device else ""
    logger.info("going on with the plan that the job was begun with%s", moved)
    return plan


def _was_finished(out: str, fact: JobFact) -> bool:
    """Whether the output got its name in a run that ended before it could remove the folder."""
    if os.path.exists(out + PART_SUFFIX) or not os.path.isfile(out):
        return False
    return describe(out).attributes.get("job") == fact.mark


def _remove(folder: JobFolder, fact: JobFact) -> None:
    remove_states(fact.directory(folder), fact.key, fact.lanes)
    folder.remove()


def _hold_lanes(folder: JobFolder, fact: JobFact, held: ExitStack) -> None:
    """Hold the locks of all lanes; JobBusyError where another process computes one."""
    for lane in range(fact.lanes):
        lock = Lock.take(lane_lock(fact.directory(folder), fact.key, lane), patience_s=1.0)
        if lock is None:
            raise JobBusyError(f"{folder.out}: this job is being computed; stop that first")
        held.callback(lock.release)


def remove_remains(folder: JobFolder) -> None:
    """Remove what a run has left that was killed after its output had its name and its ledger was gone."""
    if os.path.isdir(folder.path) and (lock := folder.lock(SETUP)) is not None:
        if not folder.exists:
            forget_attempt(folder)
            folder.remove()
        lock.release()


def drop(folder: JobFolder) -> None:
    """Remove an unfinished job, whatever its state; JobBusyError where a process begins, computes or finishes it."""
    if not os.path.isdir(folder.path):
        return
    folder.make()  # refuses what is no job's
    with ExitStack() as held:
        for name in (SETUP, FINISH):
            lock = folder.lock(name)
            if lock is None:
                raise JobBusyError(f"{folder.out}: this job is being begun or finished; stop that first")
            held.callback(lock.release)
        try:
            with Ledger(folder.ledger) as ledger:
                fact = read_fact(ledger)
        except StorageError as error:
            logger.info("the record of the job is dropped unread: %s", error)
        else:
            if os.path.isdir(fact.directory(folder)):
                _hold_lanes(folder, fact, held)
                remove_states(fact.directory(folder), fact.key, fact.lanes)
        forget_attempt(folder)
        folder.remove()
        with suppress(FileNotFoundError):
            os.remove(folder.out + PART_SUFFIX)
