"""Jobs that can be resumed: from arguments to a durable run, and from the record of an unfinished one to arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from . import arguments
from . import job as jobs
from .durable import OutputSpec, Setup, Stop, stored_request
from .durable import attend as run_durably
from .engine import Progress, ProgressBar, RunReport, Silent, make_ready
from .errors import ArgumentError, CqsaError, DeviceMemoryError, StorageError
from .job import Job, Request, as_durable, input_paths, kernel_name, output_attributes, smaller_plan
from .options import Options
from .planner import Plan, mask_from_dict, mask_to_dict, take_over
from .storage import dataset_in
from .units import parse_seconds

# Options that are those of the job, whoever resumes it; the scratch directory is, too, by its absolute path.
KEPT = ("host_memory", "cover", "chunks", "threads", "lanes", "checkpoint_s")


def attend(job: Job, stop: Stop | None = None) -> tuple[Any, RunReport]:
    """As ``job.attend``; a durable job keeps what is committed on any error; ``stop`` may end it by JobStopped."""
    options = job.request.options
    if not options.durable:
        return jobs.attend(job)
    make_ready(job.plan)
    if stop is None:
        stop = Stop(None if options.max_time_s is None else parse_seconds(options.max_time_s, "max_time_s"))
    report = run_durably(_setup(job), stop)
    return dataset_in(os.fspath(job.request.out), "/out", argument="out"), report


def plan_of(job: Job, chosen: Mapping[str, Any], lanes: int) -> Plan:
    """The plan that goes on with what another run ``chosen`` has, by this job's device and budget."""
    problem, options = job.plan.problem, job.request.options
    plan = take_over(problem, job.plan.budget, arguments.machine(options, job.gpu), job.plan.device, chosen)
    plan = plan if job.gpu is None else replace(plan, kernel=kernel_name(problem, job.gpu))
    return as_durable(plan, options, job.gpu, lanes)


def _setup(job: Job) -> Setup:
    """The job as the durable engine takes it."""
    request, problem, inputs = job.request, job.plan.problem, job.inputs
    options, dtype = request.options, arguments.resolve_dtype(problem.result.dtype, inputs.q.dtype)
    spec = OutputSpec(
        arguments.result_shape(inputs), dtype, inputs.q.layout, np.dtype(problem.compute_dtype), output_attributes(job),
        tuple(input_paths(inputs)),
    )  # fmt: skip

    def smaller(plan: Plan, error: DeviceMemoryError) -> Plan:
        return as_durable(smaller_plan(plan, error, job), options, job.gpu)

    def progress(done_pairs: int) -> Progress:
        return ProgressBar(problem.pairs, problem.flops, done_pairs) if options.progress else Silent()

    return Setup(
        out=os.fspath(request.out), inputs=inputs, plan=job.plan, output=spec, request=_stored(job),
        overwrite=options.overwrite, restart=options.restart, moves=request.moves,
        scratch=None if options.scratch is None else os.fspath(options.scratch), take_over=partial(plan_of, job),
        smaller=smaller, progress=progress,
    )  # fmt: skip


def _stored(job: Job) -> dict[str, object]:
    """The request as JSON, for ``resumed``: with files for inputs, and everything that was chosen for them."""
    request, problem, options = job.request, job.plan.problem, job.request.options
    sources = {name: getattr(job.inputs, name).identity for name in "qkv"}
    return {
        "sources": {
            name: [identity["path"], identity["dataset"], getattr(job.inputs, name).layout.name]
            for name, identity in sources.items()
            if "path" in identity and "dataset" in identity
        },
        "mask": mask_to_dict(problem.mask),
        "scale": problem.scale,
        "memory": _plain(request.memory),
        "device": job.plan.device,
        "dtype": problem.result.dtype,
        "options": {name: _plain(getattr(options, name)) for name in KEPT}
        | {"scratch": None if options.scratch is None else os.path.abspath(options.scratch)},
    }


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python, for JSON."""
    return value.item() if isinstance(value, np.generic) else value


def resumed(out: str, *, device: str | None, memory: int | str | None, options: Options) -> Request:
    """The request of the unfinished job of ``out``, as it was stored; of ``options`` progress and the limit of time.

    Raises ArgumentError where there is none or its inputs were no files, StorageError where its record is damaged or
    its states are gone.
    """
    stored, overwrite = stored_request(out)
    try:
        if len(stored["sources"]) < 3:
            remedy = "Make the call again that began it, with the same arrays."
            raise ArgumentError("out", f"a job of arrays in memory, {out}", "a job of files", remedy)
        q, k, v = (dataset_in(*stored["sources"][n][:2], layout=stored["sources"][n][2], argument=n) for n in "qkv")
        chosen = replace(
            options, durable=True, overwrite=overwrite, restart=False,
            **{name: stored["options"][name] for name in (*KEPT, "scratch")},
        )  # fmt: skip
        return Request(
            q=q, k=k, v=v, mask=mask_from_dict(stored["mask"]), scale=stored["scale"],
            memory=stored["memory"] if memory is None and device is None else memory,
            device=device or stored["device"], dtype=stored["dtype"], out=out, options=chosen, moves=device is not None,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CqsaError):
            raise
        raise StorageError(f"{out}.job: its record is damaged ({error!r}). Start the job over.") from error
