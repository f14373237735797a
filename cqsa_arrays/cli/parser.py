"""The command line: subcommands, options and their help."""

from __future__ import annotations

import argparse
import math
from typing import TypeAlias

from ..errors import ArgumentError
from ..units import parse_seconds
from ..version import __version__

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``cqsa``."""
    parser = argparse.ArgumentParser(
        prog="cqsa", description="Exact attention over HDF5 arrays larger than memory, in a promised amount of memory."
    )
    parser.add_argument("--version", action="version", version=f"cqsa_arrays {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    attend = commands.add_parser("attend", help="compute attention of /q, /k, /v of a file into another file")
    _add_problem(attend)
    attend.add_argument("-o", "--out", required=True, metavar="OUT.h5", help="HDF5 file to write: /out and /lse")
    attend.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    attend.add_argument("--restart", action="store_true", help="drop an unfinished job of this output, begin anew")
    _add_run(attend)

    resume, status = _add_resume(commands), _add_status(commands)

    plan = commands.add_parser("plan", help="show what attend would do, without reading any data")
    _add_problem(plan)
    plan.add_argument("-o", "--out", default="out.h5", metavar="OUT.h5", help="the output that attend would write")

    verify = commands.add_parser("verify", help="check an output file against float64 attention of its inputs")
    verify.add_argument("path", metavar="OUT.h5")
    verify.add_argument("--rows", type=_rows, default=256, metavar="N", help='tokens to check, or "all" (default 256)')
    verify.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    verify.add_argument("--tolerance", type=_tolerance, help="relative Frobenius error to allow (default: by dtype)")
    verify.add_argument("--partial", action="store_true", help="an unfinished job: rows against the keys seen so far")

    compare = commands.add_parser(
        "compare", help="error report of one data set against another, or of an output file against another device"
    )
    compare.add_argument("result", metavar="A.h5:/out")
    compare.add_argument("reference", metavar="B.h5:/out", nargs="?", help="what it should be")
    compare.add_argument(
        "--against", metavar="DEVICE", help="instead: compute rows of the output file again on cpu or cuda"
    )
    compare.add_argument("--rows", type=int, default=256, metavar="N", help="rows for --against (default 256)")
    compare.add_argument("--seed", type=int, default=0, help="seed of where they begin (default 0)")
    compare.add_argument("--tolerance", type=_tolerance, help="relative Frobenius error to allow (default: by dtype)")
    _add_follow_links(compare)

    make = commands.add_parser("make", help="write synthetic /q, /k, /v of any size")
    _add_make(make)

    info = commands.add_parser("info", help="show what a file holds and how it would be read")
    info.add_argument("path", metavar="FILE.h5")

    demo = commands.add_parser("demo", help="denoise a real electrocardiogram by all-pairs attention")
    demo.add_argument("--directory", default=".", help="where to write the plot and work files (default: here)")
    demo.add_argument("--samples", type=int, help="use only the first samples of the recording")
    demo.add_argument("--memory", default="64MiB", help="budget (default 64MiB)")
    demo.add_argument("--keep", action="store_true", help="keep the HDF5 files of the run")

    for command in (attend, resume, status, plan, verify, compare, make, info, demo):
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _add_resume(commands: Commands) -> argparse.ArgumentParser:
    resume = commands.add_parser("resume", help="go on with an unfinished job where it was committed last")
    resume.add_argument("path", metavar="OUT.h5", help="the output of the job")
    resume.add_argument("--device", help="go on there: cpu, cuda, ... (default: where the job was begun)")
    resume.add_argument("--memory", help="another budget (default: that of the job)")
    _add_run(resume)
    return resume


def _add_status(commands: Commands) -> argparse.ArgumentParser:
    status = commands.add_parser("status", help="show how far an unfinished job is, running or not")
    status.add_argument("path", metavar="OUT.h5", help="the output of the job")
    return status


def _add_problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="QKV.h5", help="HDF5 file with the data sets /q, /k and /v")
    for name in "qkv":
        parser.add_argument(f"--{name}", metavar="FILE.h5:/PATH", help=f"another data set for {name}")
    parser.add_argument("--memory", help="budget, for example 512MiB (default: half of the machine's memory)")
    parser.add_argument("--causal", action="store_true", help="query i sees the keys j <= i")
    parser.add_argument("--offset", type=int, help="query i sees the keys j <= i + OFFSET")
    parser.add_argument("--scale", type=float, help="factor of q.k (default 1/sqrt(D))")
    parser.add_argument("--layout", help="bhnd, bnhd, hnd, nhd or nd (default: the data sets' attribute, or by rank)")
    parser.add_argument("--dtype", help="element type of the output (default: that of q)")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one (default auto)"
    )
    parser.add_argument("--host-memory", help="another bound on host memory; the smaller one counts on the CPU")
    parser.add_argument("--scratch", help="directory for states that do not fit in memory (default: the output's)")
    parser.add_argument("--cover", default="auto", help="auto, cqs or rectangular (default auto)")
    parser.add_argument("--chunks", type=int, help="number of chunks of the CQS cover (default: chosen)")
    parser.add_argument("--threads", type=int, help="threads (default: every processor)")
    parser.add_argument("--lanes", type=int, default=1, help="shares that several processes may compute (default 1)")
    parser.add_argument("--checkpoint", type=_seconds, metavar="TIME", help="time between commits (default: planned)")
    _add_follow_links(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-time", type=_seconds, metavar="TIME", help='stop after, with all committed: "90s", "8h"')
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def _add_follow_links(parser: argparse.ArgumentParser) -> None:
    help_text = "follow external links in the input to files outside its folder, too"
    parser.add_argument("--follow-links", action="store_true", help=help_text)


def _add_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="QKV.h5")
    parser.add_argument("--tokens", type=int, required=True, help="query tokens, and key tokens unless --key-tokens")
    parser.add_argument("--key-tokens", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--value-dim", type=int)
    parser.add_argument("--dtype", default="float32", help="float16, bfloat16, float32 or float64 (default float32)")
    parser.add_argument("--layout", default="bhnd", help="bhnd, bnhd, hnd, nhd or nd (default bhnd)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="standard deviation (default 1)")
    parser.add_argument("--shared", action="store_true", help="one data set under the names /q, /k and /v")
    parser.add_argument("--chunk-tokens", type=int, help="write chunked data sets of this many tokens a chunk")
    parser.add_argument("--compression", help="gzip or lzf, for chunked data sets")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _rows(text: str) -> int | None:
    try:
        return None if text == "all" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r}: expected a whole number or "all"') from error


def _seconds(text: str) -> float:
    try:
        return parse_seconds(text, "time")
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _tolerance(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found >= 0:  # NaN, too
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, at least 0")
    return found
