"""The subcommands of ``cqsa``: each takes the parsed arguments, prints, and says whether it succeeded.

Those that judge a result return the verdict: "passed", "undetermined" or "failed".
"""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import closing
from dataclasses import asdict

from .. import api
from ..comparison import Verdict
from ..comparison import compare as compare_arrays
from ..durable import Stop
from ..engine import RunReport
from ..errors import ArgumentError, StorageError, one_line
from ..job import Request, prepared
from ..jobs import finished
from ..jobs import status as job_status
from ..options import Options
from ..partial import verify_partial
from ..planner import Plan
from ..recomputation import compare_with_device
from ..resumable import attend as run_job
from ..resumable import resumed
from ..storage import InputSpec, dataset, describe, make_inputs
from ..units import format_bytes, format_seconds
from ..verification import verify as verify_file
from .completion import script
from .parser import build_parser, input_references
from .signals import REASONS
from .written import BytesWritten


def attend(arguments: Namespace) -> bool:
    """Compute and write, or go on with it; print a summary."""
    _run(_request(arguments, progress=not arguments.quiet), arguments)
    return True


def resume(arguments: Namespace) -> bool:
    """Go on with an unfinished job; of a finished one only say so."""
    options = Options(
        progress=not arguments.quiet, locking=arguments.locking, check_inputs=arguments.check_inputs
    )  # fmt: skip
    named = {name: getattr(arguments, name) for name in "qkv"}
    if (ended := finished(arguments.out)) is None:
        try:
            request = resumed(
                arguments.out, device=arguments.device, memory=arguments.memory, options=options, named=named
            )  # fmt: skip
            _run(request, arguments)
            return True
        except (ArgumentError, StorageError):
            if (ended := finished(arguments.out)) is None:  # else by another process, meanwhile
                raise
    if arguments.json or not arguments.quiet:
        print(ended.to_json() if arguments.json else ended)
    return True


def _run(request: Request, arguments: Namespace) -> None:
    """Run a durable job that signals and the limit of time stop where everything is committed."""
    stop = Stop(arguments.max_time_s, arguments.began)
    with prepared(request) as job:
        if arguments.termination.reason is not None:
            stop.ask(arguments.termination.reason)
        output, report = run_job(job, stop, REASONS)
        if arguments.json:
            print(json.dumps({"out": arguments.out, **asdict(report), "plan": job.plan.to_dict()}))
        elif not arguments.quiet:
            out = one_line(arguments.out)
            print(f"{out}: /out {output.layout}{output.shape} {output.dtype.name}, and /lse")
            print(_what_it_took(report, job.plan))
            print(f"check it: cqsa verify {out}")


def _what_it_took(report: RunReport, plan: Plan) -> str:
    if not report.elapsed_s:
        return "nothing was left to compute (--overwrite computes it anew)"
    return (
        f"{format_seconds(report.elapsed_s)}, {report.rate / 1e9:.1f} GFLOP/s, {plan.cover_name} cover,"
        f" read {format_bytes(report.input_read_bytes)}, moved {format_bytes(report.state_moved_bytes)} of states,"
        f" held at most {format_bytes(plan.memory_bytes)} on {plan.device}"
    )


def status(arguments: Namespace) -> bool:
    """Print how far a job is."""
    found = job_status(arguments.out)
    print(found.to_json() if arguments.json else found)
    return True


def plan(arguments: Namespace) -> bool:
    """Print the plan."""
    with prepared(_request(arguments, progress=False)) as job:
        print(job.plan.to_json() if arguments.json else job.plan)
    return True


def verify(arguments: Namespace) -> Verdict:
    """Print the error report of an output file."""
    check = verify_partial if arguments.partial else verify_file
    report = check(
        arguments.path, rows=arguments.rows, seed=arguments.seed, tolerance=arguments.tolerance,
        locking=arguments.locking, check_inputs=arguments.check_inputs, q=arguments.q, k=arguments.k, v=arguments.v,
    )  # fmt: skip
    print(report.to_json() if arguments.json else report)
    return report.verdict


def compare(arguments: Namespace) -> Verdict:
    """Print the error report of one data set against another, or of an output file against another device."""
    if (arguments.reference is None) == (arguments.device is None):
        found = "both a reference and --against" if arguments.device else "none"
        remedy = "Name what the result should equal, or a device that computes it again."
        raise ArgumentError("reference", found, "a data set, or --against cpu", remedy)
    if arguments.device is not None:
        compared = compare_with_device(
            arguments.result, arguments.device, rows=arguments.rows, seed=arguments.seed, locking=arguments.locking
        )
        print(compared.to_json() if arguments.json else compared)
        return compared.verdict
    result, reference = (
        dataset(
            getattr(arguments, name),
            argument=name,
            layout=arguments.layout,
            locking=arguments.locking,
            follow_links=arguments.follow_links,
        )
        for name in ("result", "reference")
    )
    report = compare_arrays(result, reference, tolerance=arguments.tolerance)
    print(report.to_json() if arguments.json else report)
    return report.verdict


def make(arguments: Namespace) -> bool:
    """Write synthetic inputs."""
    names = (
        "tokens", "key_tokens", "batch", "heads", "head_dim", "value_dim", "dtype", "layout", "seed", "scale", "shared",
        "chunk_tokens", "compression",
    )  # fmt: skip
    spec = InputSpec(**{name: getattr(arguments, name) for name in names})
    with closing(BytesWritten("make", spec.size_bytes)) as progress:
        make_inputs(arguments.path, spec, overwrite=arguments.overwrite, progress=progress)
    return info(arguments)


def info(arguments: Namespace) -> bool:
    """Print what a file holds."""
    found = describe(arguments.path, locking=arguments.locking)
    print(found.to_json() if arguments.json else found)
    return True


def demo(arguments: Namespace) -> Verdict:
    """Run the demonstration on real data."""
    from ..demo import run_demo
    from ..plots import need_no_backend

    need_no_backend()
    report = run_demo(
        arguments.directory, samples=arguments.samples, memory=arguments.memory, keep=arguments.keep, progress=True
    )
    print(report.to_json() if arguments.json else report)
    return report.verdict


def completion(arguments: Namespace) -> bool:
    """Print a script for a shell."""
    print(script(build_parser(), arguments.shell), end="")
    return True


def _request(arguments: Namespace, *, progress: bool) -> Request:
    """What ``attend`` and ``plan`` were asked for."""
    if arguments.causal and arguments.offset is not None:
        raise ArgumentError("causal", "both --causal and --offset", "one of them", "--offset 0 is --causal.")
    options = Options(
        host_memory=arguments.host_memory, scratch=arguments.scratch, cover=arguments.cover, chunks=arguments.chunks,
        threads=arguments.threads, overwrite=getattr(arguments, "overwrite", True), progress=progress, durable=True,
        lanes=arguments.lanes, checkpoint_s=arguments.checkpoint_s, restart=getattr(arguments, "restart", False),
        follow_links=arguments.follow_links, locking=arguments.locking,
        check_inputs=getattr(arguments, "check_inputs", "sampled"),
    )  # fmt: skip
    q, k, v = input_references(arguments).values()
    mask = None if arguments.offset is None else api.causal(arguments.offset)
    return Request(
        q=q, k=k, v=v, causal=arguments.causal, mask=mask, scale=arguments.scale, layout=arguments.layout,
        memory=arguments.memory, device=arguments.device, dtype=arguments.dtype, out=arguments.out,
        options=options, dry_run=arguments.command == "plan",
    )  # fmt: skip
