"""Jobs that can be resumed: from arguments to a durable run, and from the record of an unfinished one to arguments."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from . import arguments
from . import job as jobs
from .durable import Depth, Finder, OutputSpec, Setup, Stop, Watch, stopped_by, stored_request
from .durable import attend as run_durably
from .engine import Progress, ProgressBar, RunReport, Silent, make_ready
from .errors import START_OVER, ArgumentError, CqsaError, DeviceMemoryError, JobBusyError, JobStopped, StorageError
from .job import Job, Request, as_durable, input_paths, kernel_name, known_inputs, output_attributes, smaller_plan
from .options import Options
from .planner import Plan, mask_from_dict, mask_to_dict, take_over
from .storage import dataset_in, target_of
from .units import parse_seconds

# Options that are those of the job, whoever resumes it; the scratch directory is, too, by its absolute path.
KEPT = ("host_memory", "cover", "chunks", "threads", "lanes", "checkpoint_s")

# Of the processes that go on with a job so many are named.
MOST_NAMED = 4

NOTHING_NAMED: Mapping[str, Any] = MappingProxyType({})
NO_SIGNALS: Mapping[int, str] = {}
CTRL_C = {int(signal.SIGINT): "interrupted"}


def attend(job: Job, stop: Stop | None = None, signals: Mapping[int, str] = NO_SIGNALS) -> tuple[Any, RunReport]:
    """As ``job.attend``; a durable job keeps what is committed on any error; ``stop`` may end it by JobStopped.

    ``signals``, each with its reason, ask for that. Without a ``stop`` Ctrl-C does, and the limit of time of the
    request; then, with everything committed, it is a KeyboardInterrupt as ever.
    """
    options = job.request.options
    if not options.durable:
        return jobs.attend(job)
    make_ready(job.plan)
    if stop is not None:
        return _attend(job, stop, signals)
    limit_s = None if options.max_time_s is None else parse_seconds(options.max_time_s, "max_time_s")
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        return _attend(job, Stop(limit_s, job.began), CTRL_C if usual else NO_SIGNALS)
    except JobStopped as error:
        if str(error) != CTRL_C[signal.SIGINT]:
            raise
        out = os.fspath(job.request.out)
        raise KeyboardInterrupt(f"what is done is committed: call again, or cqsa.resume({out!r})") from None


def _attend(job: Job, stop: Stop, signals: Mapping[int, str]) -> tuple[Any, RunReport]:
    with stopped_by(signals, stop):
        ended = run_durably(_setup(job, stop), stop)
    if ended.others:
        raise JobBusyError(
            f"{job.request.out}: what this process could do is done; {' and '.join(ended.others[:MOST_NAMED])}; the"
            " last one finishes the file"
        )
    return dataset_in(os.fspath(job.request.out), "/out", locking=job.request.locking, argument="out"), ended.report


def plan_of(job: Job, chosen: Mapping[str, Any], lanes: int) -> Plan:
    """The plan that goes on with what another run ``chosen`` has, by this job's device and budget."""
    problem, options = job.plan.problem, job.request.options
    plan = take_over(problem, job.plan.budget, arguments.machine(options, job.gpu), job.plan.device, chosen)
    plan = plan if job.gpu is None else replace(plan, kernel=kernel_name(problem, job.gpu))
    return as_durable(plan, options, job.gpu, lanes)


def output_spec(job: Job, attributes: Mapping[str, object]) -> OutputSpec:
    """The file that the job writes."""
    problem, inputs = job.plan.problem, job.inputs
    dtype = arguments.resolve_dtype(problem.result.dtype, inputs.q.dtype)
    return OutputSpec(
        arguments.result_shape(inputs), dtype, inputs.q.layout, np.dtype(problem.compute_dtype), attributes,
        tuple(input_paths(inputs)),
    )  # fmt: skip


def _setup(job: Job, stop: Stop) -> Setup:
    """The job as the durable engine takes it, with what its inputs hold now."""
    request, problem, inputs = job.request, job.plan.problem, job.inputs
    options = request.options
    watch = Watch(inputs, known_inputs(job, stop.check), locking=request.locking, interrupted=stop.check)

    def smaller(plan: Plan, error: DeviceMemoryError) -> Plan:
        return as_durable(smaller_plan(plan, error, job), options, job.gpu)

    def progress(done_pairs: int) -> Progress:
        return ProgressBar(problem.pairs, problem.flops, done_pairs) if options.progress else Silent()

    return Setup(
        out=os.fspath(request.out), inputs=inputs, watch=watch, plan=job.plan,
        output=output_spec(job, output_attributes(job, watch.known)), request=_stored(job),
        overwrite=options.overwrite, restart=options.restart, moves=request.moves, resumes=request.resumes,
        scratch=None if options.scratch is None else os.fspath(options.scratch), take_over=partial(plan_of, job),
        smaller=smaller, progress=progress,
    )  # fmt: skip


def _stored(job: Job) -> dict[str, object]:
    """The request as JSON, for ``resumed``: everything that was chosen for the inputs."""
    request, problem, options = job.request, job.plan.problem, job.request.options
    return {
        "mask": mask_to_dict(problem.mask),
        "scale": problem.scale,
        "memory": _plain(request.memory),
        "device": job.plan.device,
        "dtype": problem.result.dtype,
        "options": {name: _plain(getattr(options, name)) for name in KEPT}
        | {
            "scratch": None if options.scratch is None else os.path.abspath(options.scratch),
            "locking": request.locking,
        },
    }


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python, for JSON."""
    return value.item() if isinstance(value, np.generic) else value


def resumed(
    out: str,
    *,
    device: str | None,
    memory: int | str | None,
    options: Options,
    named: Mapping[str, Any] = NOTHING_NAMED,
    depth: Depth = "sampled",
) -> Request:
    """The request of the unfinished job of ``out``, as it was stored; of ``options`` progress and the limit of time.

    ``options.locking`` counts more than what the job was begun with, and inputs that are ``named`` more than those that
    are found: where they were as seen from the output, else where they were given. They are compared to that ``depth``;
    the run itself compares more where ``options.check_inputs`` says so.

    Raises ArgumentError where there is none or its inputs were no files, StorageError where an input is not found or
    has changed, its record is damaged or its states are gone.
    """
    stored, known, overwrite = stored_request(out := target_of(out))
    try:
        named = {name: one for name, one in named.items() if one is not None}
        if any(one.dataset is None and name not in named for name, one in known.items()):
            remedy = "Make the call again that began it, with the same arrays."
            raise ArgumentError("out", f"a job of arrays in memory, {out}", "a job of files", remedy)
        locking = stored["options"].get("locking") if options.locking is None else options.locking
        finder = Finder(out, "resume", locking, depth)
        q, k, v = (finder.find(name, known[name], named.get(name)) for name in "qkv")
        chosen = replace(
            options, durable=True, overwrite=overwrite, restart=False, locking=locking,
            **{name: stored["options"][name] for name in (*KEPT, "scratch")},
        )  # fmt: skip
        return Request(
            q=q, k=k, v=v, mask=mask_from_dict(stored["mask"]), scale=stored["scale"],
            memory=stored["memory"] if memory is None and device is None else memory,
            device=device or stored["device"], dtype=stored["dtype"], out=out, options=chosen, moves=device is not None,
            resumes=True,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, CqsaError):
            raise
        raise StorageError(f"{out}.job: its record is damaged ({error!r}). ", START_OVER) from error
