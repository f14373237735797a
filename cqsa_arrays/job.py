"""One call from arguments to result: a request becomes a job (sources and a plan), a job becomes an array or a file."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import arguments
from .block_statistics import BlockStatistics
from .buffers import allocate
from .devices import Gpu
from .durable import KnownInput, describe_inputs
from .engine import Inputs, OutputResults, Progress, ProgressBar, RunReport, Silent, StatisticsResults, make_ready, run
from .errors import ArgumentError, BudgetError, DeviceMemoryError
from .kernels.cuda.variants import variant_for
from .masks import Mask
from .options import Options
from .planner import (
    Budget,
    Plan,
    Problem,
    Result,
    choose,
    durability,
    mask_to_dict,
    output_piece_rows,
)
from .storage import (
    ArraySink,
    Check,
    DiskArray,
    Locking,
    OutputFile,
    Sink,
    check_like,
    check_name,
    dataset_in,
    like,
    output_staging_bytes,
    taker,
    target_of,
    unhindered,
)
from .units import format_bytes, parse_seconds
from .version import __version__
from .wording import Choice

logger = logging.getLogger("cqsa_arrays")
# Of what a device has left, when it turned out to be less than planned: the driver itself needs a little.
FREE_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of ``attention``, as they were passed."""

    q: Any
    k: Any
    v: Any
    causal: bool = False
    mask: Mask | None = None
    scale: float | None = None
    layout: str | None = None
    memory: int | str | None = None
    device: str = "auto"
    dtype: Any = None
    out: Any = None
    options: Options = field(default_factory=Options)
    moves: bool = False  # an unfinished job may go on on another device
    resumes: bool = False  # no job is begun
    dry_run: bool = False  # only the plan is wanted

    @property
    def locking(self) -> Locking:
        """How files are opened: as the options say, or else as an input was."""
        opened = (one.locking for one in (self.q, self.k, self.v) if isinstance(one, DiskArray))
        return next((one for one in (self.options.locking, *opened) if one is not None), None)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: its open sources, the GPU that computes (None: the CPU does) and the plan."""

    request: Request
    inputs: Inputs
    gpu: Gpu | None
    plan: Plan
    began: float  # when the call did, of time.monotonic()


@contextmanager
def prepared(request: Request, *, as_statistics: bool = False) -> Iterator[Job]:
    """The job of ``request``; its sources are closed at the end. Nothing is computed or written.

    Raises ArgumentError, BudgetError, DeviceError and StorageError for what cannot be done.
    """
    began = time.monotonic()
    arguments.check_options(request.options)
    arguments.check_durable(request.options, request.out)
    arguments.check_layout(request.layout)
    if isinstance(request.out, (str, os.PathLike)):
        arguments.check_out_path(request.out)
        request = replace(request, out=target_of(os.fspath(request.out)))
        check_name(request.out)
    with ExitStack() as stack:
        sources = []
        for name in "qkv":
            source = arguments.open_source(getattr(request, name), name, request.layout, request.options)
            sources.append(stack.enter_context(closing(source)))
        inputs = Inputs(*sources)
        arguments.check_inputs(inputs)
        if request.options.durable:
            arguments.check_durable_inputs(inputs)
        gpu = arguments.computing_device(request.device, sources, request.out, dry_run=request.dry_run)
        result = _statistics_result(inputs) if as_statistics else _result(inputs, request)
        result = _placed(result, gpu, _stays(request))
        mask = arguments.resolve_mask(request.causal, request.mask)
        scale = arguments.resolve_scale(request.scale, inputs.q.shape[3], arguments.compute_dtype(inputs.q.dtype))
        problem = arguments.build_problem(inputs, result, mask, scale, gpu)
        budget = arguments.resolve_budget(request.memory, request.options, request.out, gpu)
        plan = _plan(problem, budget, request.options, gpu)
        plan = as_durable(plan, request.options, gpu) if request.options.durable else plan
        job = Job(request, inputs, gpu, plan, began)
        if request.out is None and not as_statistics:
            check_like(_empty(job, (1, 1, 1, 1), _dtype(job)), request.q)
        yield job


def as_durable(plan: Plan, options: Options, gpu: Gpu | None, lanes: int | None = None) -> Plan:
    """``plan`` as one of a job that can be resumed."""
    rates, lanes = arguments.machine(options, gpu).rates, int(options.lanes if lanes is None else lanes)
    interval_s = None if options.checkpoint_s is None else parse_seconds(options.checkpoint_s, "checkpoint_s")
    return replace(plan, durability=durability(plan.problem, plan.chosen, rates, lanes, interval_s))


def _placed(result: Result, gpu: Gpu | None, stays: bool) -> Result:
    """``result`` on the computing device, if it stays there; states are accumulated in it only where it is."""
    if gpu is None:
        return result
    return replace(result, on_device=stays, holds_states=result.holds_states and stays)


def _stays(request: Request) -> bool:
    """Whether the result is an array on the device: the caller's ``out``, or a new one beside queries there."""
    model = request.q if request.out is None else request.out
    return hasattr(model, "__cuda_array_interface__")


def _plan(problem: Problem, budget: Budget, options: Options, gpu: Gpu | None) -> Plan:
    machine, chunks = arguments.machine(options, gpu), arguments.resolve_chunks(options)
    try:
        plan = choose(
            problem, budget, machine, cover=options.cover, chunks=chunks, device=gpu.name if gpu else "cpu",
            durable=options.durable,
        )  # fmt: skip
        return plan if gpu is None else replace(plan, kernel=kernel_name(problem, gpu))
    except BudgetError as error:
        # Statistics have no other place; an output has.
        if problem.result.place != "new array" or problem.result.row_scalars:
            raise
        size = format_bytes(problem.output_bytes)
        place = Choice("out", "out.h5")
        raise BudgetError(error.phrase, " Or pass ", place, f": then the result, {size}, is not in memory.") from None


def kernel_name(problem: Problem, gpu: Gpu) -> str:
    """What computes on ``gpu``, for people."""
    return str(variant_for(problem.q.dtype, problem.head_dim, problem.value_dim, gpu.capability, problem.scale))


def _statistics_result(inputs: Inputs) -> Result:
    compute = arguments.compute_dtype(inputs.q.dtype)
    return Result(compute, np.dtype(compute).itemsize, "new array", 2, 0, "statistics in memory", True)


def _result(inputs: Inputs, request: Request) -> Result:
    """Where the output goes and of what type it is."""
    shape, layout, out = arguments.result_shape(inputs), inputs.q.layout, request.out
    if isinstance(out, np.ndarray) or hasattr(out, "__cuda_array_interface__"):
        if not isinstance(out, np.ndarray) and type(out).__module__.partition(".")[0] != "cupy":
            remedy = "Pass cupy.asarray(out), which is the same memory."
            raise ArgumentError("out", f"type {type(out).__name__} on a GPU", "a CuPy array there", remedy)
        arguments.check_out_array(out, layout.physical_shape(shape), layout, inputs)
        if request.dtype is not None and arguments.resolve_dtype(request.dtype, out.dtype) != out.dtype:
            raise ArgumentError("dtype", repr(request.dtype), f"{out.dtype}, as out has", "Leave dtype out.")
        aligned = out.flags.aligned if isinstance(out, np.ndarray) else True
        home = out.dtype.name == arguments.compute_dtype(inputs.q.dtype) and aligned
        return Result(out.dtype.name, out.dtype.itemsize, "array", 0, 0, "the array given as out=", home)
    dtype = arguments.resolve_dtype(request.dtype, inputs.q.dtype)
    if out is None:
        home = dtype.name == arguments.compute_dtype(inputs.q.dtype)
        return Result(dtype.name, dtype.itemsize, "new array", 0, 0, "a new array in memory", home)
    arguments.check_out_path(out)
    staging = output_staging_bytes(shape, dtype, layout)
    return Result(dtype.name, dtype.itemsize, "file", 1, staging, f"{os.path.basename(os.fspath(out))}:/out and /lse")


def attend(job: Job) -> tuple[Any, RunReport]:
    """Run the job; its output (an array like q, ``out``, or the data set /out of the new file) and what it took.

    A file appears under its name only when it is whole; on any error nothing of it is left.
    """
    request, problem, inputs = job.request, job.plan.problem, job.inputs
    layout, shape = inputs.q.layout, arguments.result_shape(inputs)
    dtype = _dtype(job)
    make_ready(job.plan)
    if problem.result.place == "file":
        with OutputFile.create(
            request.out, shape=shape, dtype=dtype, layout=layout, lse_dtype=np.dtype(problem.compute_dtype),
            attributes=output_attributes(job, known_inputs(job)), overwrite=request.options.overwrite,
            inputs=input_paths(inputs),
        ) as file:  # fmt: skip
            report = _run(job, _output_results(job, file, None))
            file.finish()
        return dataset_in(os.fspath(request.out), "/out", locking=request.locking, argument="out"), report
    given = problem.result.place == "array"
    array = request.out if given else _empty(job, layout.physical_shape(shape), dtype)
    plain = array if hasattr(array, "__cuda_array_interface__") else array.view(np.ndarray)  # not a matrix, say
    home = layout.logical(plain) if problem.result.holds_states else None
    report = _run(job, _output_results(job, ArraySink(plain, None, layout), home))
    return (array if given else like(array, request.q)), report


def collect_statistics(job: Job) -> BlockStatistics:
    """Run the job and keep the states of all rows, without the axes that q's layout leaves out."""
    shape = arguments.result_shape(job.inputs)
    with _on_device(job) as xp:
        results = StatisticsResults(shape[:3], shape[3], job.plan.problem.compute_dtype, xp)
    _run(job, results)
    found, rows = results.statistics, job.inputs.q.layout.lse_shape(shape)
    return BlockStatistics(found.acc.reshape(*rows, shape[3]), found.m.reshape(rows), found.l.reshape(rows))


@contextmanager
def _on_device(job: Job) -> Iterator[Any]:
    """The array module of the result: NumPy, or CuPy on the computing GPU where the result stays there."""
    if job.gpu is None or not job.plan.problem.result.on_device:
        yield np
        return
    import cupy

    with cupy.cuda.Device(job.gpu.index):
        yield cupy


def _dtype(job: Job) -> np.dtype:
    """The element type of the output."""
    return arguments.resolve_dtype(job.plan.problem.result.dtype, job.inputs.q.dtype)


def _empty(job: Job, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """The new array of a result."""
    with _on_device(job) as xp:
        if xp is np and taker(job.request.q) is not None:
            return allocate(shape, dtype)  # in pages of its own: JAX copies what is not aligned to 64 bytes
        return xp.empty(shape, dtype)


def _output_results(job: Job, sink: Sink, home: np.ndarray | None) -> OutputResults:
    return OutputResults(
        sink, output_piece_rows(job.plan.problem, job.plan.chosen.heads), job.plan.chosen.residency.threads, home
    )


def _run(job: Job, results: OutputResults | StatisticsResults) -> RunReport:
    problem = job.plan.problem
    progress: Progress = ProgressBar(problem.pairs, problem.flops) if job.request.options.progress else Silent()
    with closing(progress), closing(results):
        plan = job.plan
        while True:
            try:
                return run(plan, job.inputs, results, progress)
            except DeviceMemoryError as error:  # met before anything is computed
                plan = smaller_plan(plan, error, job)


def smaller_plan(plan: Plan, error: DeviceMemoryError, job: Job) -> Plan:
    """A plan for what the device has left now; DeviceMemoryError where that is no less than what was planned."""
    left = int(error.free_bytes * FREE_SHARE)
    if left >= plan.memory_bytes:
        raise error
    budget = replace(plan.budget, memory_bytes=left, origin=f"what {plan.device} had left")
    smaller = _plan(plan.problem, budget, job.request.options, job.gpu)
    logger.info("%s Going on with a smaller plan of %s.", error, format_bytes(smaller.memory_bytes))
    return smaller


def input_paths(inputs: Inputs) -> list[str]:
    """The files that were read, also those that only led to others."""
    paths = []
    for identity in (source.identity for source in (inputs.q, inputs.k, inputs.v)):
        linked_from = identity.get("linked_from", [])
        paths += [
            identity.get("path"),
            identity.get("opened_as"),
            *(linked_from if isinstance(linked_from, list) else []),
        ]
    return [path for path in paths if isinstance(path, str)]


def known_inputs(job: Job, check: Check = unhindered) -> dict[str, KnownInput]:
    """What is to be remembered of the inputs of a job that writes a file; ``check`` may raise to stop a long look."""
    request = job.request
    given = {name: getattr(request, name) for name in "qkv"}
    full = request.options.check_inputs == "full"
    return describe_inputs(job.inputs, os.fspath(request.out), given=given, full=full, check=check)


def output_attributes(job: Job, known: Mapping[str, KnownInput]) -> dict[str, object]:
    """What ``verify`` needs to find the inputs again, and how the file was made: the same bytes in every folder."""
    locking = {} if job.request.locking is None else {"locking": job.request.locking}
    problem, plan = job.plan.problem, job.plan
    return {
        "creator": f"cqsa_arrays {__version__}",
        "inputs": {name: {**one.attributes, **locking} for name, one in known.items()},
        "mask": mask_to_dict(problem.mask),
        "scale": problem.scale,
        "plan": replace(plan, budget=replace(plan.budget, scratch=None)).to_dict(),
    }
