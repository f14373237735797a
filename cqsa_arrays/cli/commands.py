"""The subcommands of ``cqsa``: each takes the parsed arguments, prints, and says whether it succeeded."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict

from .. import api
from ..comparison import compare as compare_arrays
from ..durable import Stop
from ..durable import status as job_status
from ..errors import ArgumentError
from ..job import Request, prepared
from ..options import Options
from ..partial import verify_partial
from ..recomputation import compare_with_device
from ..resumable import attend as run_job
from ..resumable import resumed
from ..storage import InputSpec, dataset, describe, make_inputs
from ..units import format_bytes, format_seconds
from ..verification import verify as verify_file
from .signals import stopped_by_signals


def attend(arguments: Namespace) -> bool:
    """Compute and write, or go on with it; print a summary."""
    _run(_request(arguments, progress=not arguments.quiet), arguments)
    return True


def resume(arguments: Namespace) -> bool:
    """Go on with an unfinished job."""
    arguments.out = arguments.path
    options = Options(progress=not arguments.quiet)
    _run(resumed(arguments.path, device=arguments.device, memory=arguments.memory, options=options), arguments)
    return True


def _run(request: Request, arguments: Namespace) -> None:
    """Run a durable job that signals and the limit of time stop where everything is committed."""
    with prepared(request) as job, stopped_by_signals(Stop(arguments.max_time)) as stop:
        output, report = run_job(job, stop)
        if arguments.json:
            print(json.dumps({"out": arguments.out, **asdict(report), "plan": job.plan.to_dict()}))
        elif not arguments.quiet:
            print(f"{arguments.out}: /out {output.layout}{output.shape} {output.dtype.name}, and /lse")
            print(
                f"{format_seconds(report.elapsed_s)}, {report.rate / 1e9:.1f} GFLOP/s, {job.plan.cover_name} cover,"
                f" read {format_bytes(report.input_read_bytes)},"
                f" moved {format_bytes(report.state_moved_bytes)} of states,"
                f" held at most {format_bytes(job.plan.memory_bytes)} on {job.plan.device}"
            )
            print(f"check it: cqsa verify {arguments.out}")


def status(arguments: Namespace) -> bool:
    """Print how far a job is."""
    found = job_status(arguments.path)
    print(found.to_json() if arguments.json else found)
    return True


def plan(arguments: Namespace) -> bool:
    """Print the plan."""
    with prepared(_request(arguments, progress=False)) as job:
        print(job.plan.to_json() if arguments.json else job.plan)
    return True


def verify(arguments: Namespace) -> bool:
    """Print the error report of an output file."""
    check = verify_partial if arguments.partial else verify_file
    report = check(arguments.path, rows=arguments.rows, seed=arguments.seed, tolerance=arguments.tolerance)
    print(report.to_json() if arguments.json else report)
    return report.passed


def compare(arguments: Namespace) -> bool:
    """Print the error report of one data set against another, or of an output file against another device."""
    if (arguments.reference is None) == (arguments.against is None):
        found = "both a reference and --against" if arguments.against else "no reference"
        raise ArgumentError("reference", found, "B.h5:/out, or --against cpu", "cqsa compare out.h5 --against cpu")
    if arguments.against is not None:
        compared = compare_with_device(arguments.result, arguments.against, rows=arguments.rows, seed=arguments.seed)
        print(compared.to_json() if arguments.json else compared)
        return compared.passed
    result = dataset(arguments.result, argument="result", follow_links=arguments.follow_links)
    reference = dataset(arguments.reference, argument="reference", follow_links=arguments.follow_links)
    report = compare_arrays(result, reference, tolerance=arguments.tolerance)
    print(report.to_json() if arguments.json else report)
    return report.passed


def make(arguments: Namespace) -> bool:
    """Write synthetic inputs."""
    from tqdm import tqdm

    names = (
        "tokens", "key_tokens", "batch", "heads", "head_dim", "value_dim", "dtype", "layout", "seed", "scale", "shared",
        "chunk_tokens", "compression",
    )  # fmt: skip
    spec = InputSpec(**{name: getattr(arguments, name) for name in names})
    with tqdm(desc="make", unit="B", unit_scale=True, disable=None) as bar:

        def show(written: int, total: int) -> None:
            bar.total = total
            bar.update(written - bar.n)

        make_inputs(arguments.path, spec, overwrite=arguments.overwrite, progress=show)
    return info(arguments)


def info(arguments: Namespace) -> bool:
    """Print what a file holds."""
    found = describe(arguments.path)
    print(found.to_json() if arguments.json else found)
    return True


def demo(arguments: Namespace) -> bool:
    """Run the demonstration on real data."""
    from ..demo import run_demo

    report = run_demo(
        arguments.directory, samples=arguments.samples, memory=arguments.memory, keep=arguments.keep, progress=True
    )
    print(report.to_json() if arguments.json else report)
    return report.passed


def _request(arguments: Namespace, *, progress: bool) -> Request:
    """What ``attend`` and ``plan`` were asked for."""
    if arguments.causal and arguments.offset is not None:
        raise ArgumentError("--causal", "both --causal and --offset", "one of them", "--offset 0 is --causal.")
    options = Options(
        host_memory=arguments.host_memory, scratch=arguments.scratch, cover=arguments.cover, chunks=arguments.chunks,
        threads=arguments.threads, overwrite=getattr(arguments, "overwrite", True), progress=progress, durable=True,
        lanes=arguments.lanes, checkpoint_s=arguments.checkpoint, restart=getattr(arguments, "restart", False),
        follow_links=arguments.follow_links,
    )  # fmt: skip
    q, k, v = (getattr(arguments, name) or f"{arguments.input}:/{name}" for name in "qkv")
    mask = None if arguments.offset is None else api.causal(arguments.offset)
    return Request(
        q=q, k=k, v=v, causal=arguments.causal, mask=mask, scale=arguments.scale, layout=arguments.layout,
        memory=arguments.memory, device=arguments.device, dtype=arguments.dtype, out=arguments.out,
        options=options,
    )  # fmt: skip
