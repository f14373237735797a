"""The options of each subcommand.

The name of an option's value (``dest``) is the argument that it becomes in Python: messages find it by that.
"""

from __future__ import annotations

from collections.abc import Callable

from ..gpu_models import MODELS
from . import values
from .suggesting import Parser

FLOATS = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("bhnd", "bnhd", "hnd", "nhd", "nd")
COVERS = ("auto", "cqs", "rectangular")
DEVICES = ("auto", "cpu", "cuda")
CHECKS = ("sampled", "full")
SHELLS = ("bash", "zsh", "fish")


def attend(parser: Parser) -> None:
    """Options of ``cqsa attend``."""
    _problem(parser)
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT.h5",
        help="HDF5 file to write: /out, and the log-sum-exp as /lse (required)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.add_argument("--restart", action="store_true", help="drop an unfinished job of this output and begin anew")
    _run(parser)
    _check_inputs(parser, "how to know the inputs again")
    _locking(parser)
    _json(parser)


def resume(parser: Parser) -> None:
    """Options of ``cqsa resume``."""
    parser.add_argument("out", metavar="OUT.h5", help="the output that the job writes")
    parser.add_argument(
        "--device", words=DEVICES[1:], metavar="DEVICE", help="go on there: cpu, cuda, cuda:1, ... (default: as begun)"
    )
    parser.add_argument("--memory", metavar="SIZE", help="another budget (default: that of the job)")
    _run(parser)
    _elsewhere(parser)
    _check_inputs(parser, "how to compare the inputs with those of the job")
    _locking(parser)
    _json(parser)


def status(parser: Parser) -> None:
    """Options of ``cqsa status``."""
    parser.add_argument("out", metavar="OUT.h5", help="the output that the job writes, or has written")
    _json(parser)


def plan(parser: Parser) -> None:
    """Options of ``cqsa plan``."""
    _problem(parser, models=True)
    parser.add_argument(
        "-o", "--out", default="out.h5", metavar="OUT.h5",
        help="the output that attend would write (default: out.h5); it is not made",
    )  # fmt: skip
    _locking(parser)
    _json(parser)


def verify(parser: Parser) -> None:
    """Options of ``cqsa verify``."""
    parser.add_argument("path", metavar="OUT.h5", help="the output of cqsa attend")
    parser.add_argument(
        "--rows",
        type=values.rows,
        default=256,
        metavar="N",
        help='tokens to check in each head, or "all" (default: 256)',
    )
    _seed(parser, "seed of the sample of rows (default: 0)")
    _tolerance(parser)
    parser.add_argument(
        "--partial", action="store_true", help="of an unfinished job: its rows against the keys that they have seen"
    )
    _elsewhere(parser)
    _check_inputs(parser, "how to compare the inputs with those of the run")
    _locking(parser)
    _json(parser)


def compare(parser: Parser) -> None:
    """Options of ``cqsa compare``."""
    parser.add_argument("result", metavar="A.h5:/out", help="a data set, or an output file with --against")
    parser.add_argument("reference", metavar="B.h5:/out", nargs="?", help="the data set that it should equal")
    parser.add_argument(
        "--against", words=DEVICES[1:], dest="device", metavar="DEVICE",
        help="instead of a reference: compute rows of the output file again on cpu, cuda, cuda:1, ... (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=values.whole, default=256, metavar="N", help="rows to compute --against (default: 256)"
    )
    _seed(parser, "seed of where those rows begin (default: 0)")
    _tolerance(parser)
    parser.add_argument(
        "--layout", words=LAYOUTS, metavar="LAYOUT",
        help=f"of both data sets: {_listed(LAYOUTS)} (default: their attribute, or by rank)",
    )  # fmt: skip
    _follow_links(parser)
    _locking(parser)
    _json(parser)


def make(parser: Parser) -> None:
    """Options of ``cqsa make``."""
    add = parser.add_argument
    add("path", metavar="QKV.h5", help="HDF5 file to write: /q, /k and /v")
    add("--tokens", type=values.whole, required=True, metavar="N", help="query tokens, and key tokens (required)")
    add("--key-tokens", type=values.whole, metavar="N", help="key tokens (default: as many as query tokens)")
    add("--batch", type=values.whole, default=1, metavar="N", help="batch entries (default: 1)")
    add("--heads", type=values.whole, default=1, metavar="N", help="heads (default: 1)")
    add("--head-dim", type=values.whole, default=64, metavar="N", help="elements of a vector (default: 64)")
    add("--value-dim", type=values.whole, metavar="N", help="elements of a value (default: as --head-dim)")
    add(
        "--dtype",
        words=FLOATS,
        type=values.dtype,
        default="float32",
        metavar="TYPE",
        help=f"{_listed(FLOATS)} (default: float32)",
    )
    add("--layout", words=LAYOUTS, default="bhnd", metavar="LAYOUT", help=f"{_listed(LAYOUTS)} (default: bhnd)")
    _seed(parser, "equal seeds give equal numbers (default: 0)")
    add("--scale", type=values.number, default=1.0, metavar="X", help="standard deviation (default: 1)")
    add("--shared", action="store_true", help="one data set under the names /q, /k and /v")
    add("--chunk-tokens", type=values.whole, metavar="N", help="tokens of a chunk (default: contiguous data sets)")
    add("--compression", words=("gzip", "lzf"), metavar="FILTER", help="of chunks: gzip or lzf (default: none)")
    add("--overwrite", action="store_true", help="replace an existing file")
    _locking(parser)
    _json(parser)


def info(parser: Parser) -> None:
    """Options of ``cqsa info``."""
    parser.add_argument("path", metavar="FILE.h5", help="an HDF5 file")
    _locking(parser)
    _json(parser)


def demo(parser: Parser) -> None:
    """Options of ``cqsa demo``."""
    parser.add_argument("--directory", default=".", metavar="DIR", help="for the plot and the files (default: here)")
    parser.add_argument(
        "--samples", type=values.whole, metavar="N", help="use only the first samples (default: all 108,000)"
    )
    parser.add_argument("--memory", default="64MiB", metavar="SIZE", help="budget (default: 64MiB)")
    parser.add_argument("--keep", action="store_true", help="keep the HDF5 files of the run")
    _json(parser)


def completion(parser: Parser) -> None:
    """Options of ``cqsa completion``."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=_listed(SHELLS))


COMMANDS: dict[str, Callable[[Parser], None]] = {
    "attend": attend, "resume": resume, "status": status, "plan": plan, "verify": verify, "compare": compare,
    "make": make, "info": info, "demo": demo, "completion": completion,
}  # fmt: skip


def _problem(parser: Parser, *, models: bool = False) -> None:
    """What is to be computed, and in which way; ``models``: also for GPUs that are not here."""
    _inputs(parser)
    _resources(parser, models)
    _way(parser)
    _follow_links(parser)


def _inputs(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "input", nargs="?", metavar="QKV.h5", help="file with /q, /k and /v (not needed with all of --q, --k and --v)"
    )  # fmt: skip
    for name in "qkv":
        add(f"--{name}", metavar="FILE.h5:/PATH", help=f"the data set of {name} (default: /{name} of QKV.h5)")
    add("--causal", action="store_true", help="query i sees the keys j <= i")
    add(
        "--offset", type=values.whole, metavar="N", help="query i sees the keys j <= i + N (default: it sees all keys)"
    )  # fmt: skip
    add("--scale", type=values.number, metavar="X", help="factor of the scores q.k (default: 1/sqrt(D))")
    add(
        "--layout", words=LAYOUTS, metavar="LAYOUT",
        help=f"{_listed(LAYOUTS)} (default: the data sets' attribute, or by rank)",
    )  # fmt: skip
    add(
        "--dtype", words=FLOATS, type=values.dtype, metavar="TYPE",
        help=f"of the output: {_listed(FLOATS)} (default: that of q)",
    )  # fmt: skip


def _resources(parser: Parser, models: bool) -> None:
    """What may be used."""
    add = parser.add_argument
    devices = (*DEVICES, *(f"cuda:{key}" for key in MODELS)) if models else DEVICES
    named = ", or a model that is not here: cuda:h200, cuda:a100, ..." if models else ""
    add("--memory", metavar="SIZE", help="budget, such as 512MiB or 1G (default: half of the device's memory)")
    add(
        "--device", words=devices, default="auto", metavar="DEVICE",
        help=f"auto (a GPU if there is one), cpu, cuda, cuda:1, ...{named} (default: auto)",
    )  # fmt: skip
    add("--host-memory", metavar="SIZE", help="bound on host memory (default: half of it beside a GPU)")
    add("--scratch", metavar="DIR", help="for states that do not fit in memory (default: that of OUT.h5)")
    add("--threads", type=values.whole, metavar="N", help="threads (default: every processor)")


def _way(parser: Parser) -> None:
    """How the work is divided and saved."""
    add = parser.add_argument
    add("--cover", words=COVERS, default="auto", metavar="COVER", help=f"{_listed(COVERS)} (default: auto)")
    add("--chunks", type=values.whole, metavar="N", help="chunks of the CQS cover (default: chosen by the plan)")
    add(
        "--lanes", type=values.whole, default=1, metavar="N",
        help="shares that processes may compute at once (default: 1)",
    )  # fmt: skip
    add(
        "--checkpoint", dest="checkpoint_s", type=values.seconds, metavar="TIME",
        help="time between commits, such as 10min (default: planned)",
    )  # fmt: skip


def _run(parser: Parser) -> None:
    parser.add_argument(
        "--max-time", dest="max_time_s", type=values.seconds, metavar="TIME",
        help="stop after this time, such as 90s or 8h, with everything committed (default: no limit)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")


def _elsewhere(parser: Parser) -> None:
    for name in "qkv":
        text = f"where {name} is now (default: where it was, as seen from OUT.h5, or as it was named)"
        parser.add_argument(f"--{name}", metavar="FILE.h5:/PATH", help=text)


def _check_inputs(parser: Parser, text: str) -> None:
    parser.add_argument(
        "--check-inputs", words=CHECKS, default="sampled", metavar="DEPTH",
        help=f"{text}: sampled (64 blocks of 16 tokens) or full (everything is read once more) (default: sampled)",
    )  # fmt: skip


def _seed(parser: Parser, text: str) -> None:
    parser.add_argument("--seed", type=values.whole, default=0, metavar="N", help=text)


def _tolerance(parser: Parser) -> None:
    text = "relative Frobenius error to allow (default: by element type)"
    parser.add_argument("--tolerance", type=values.tolerance, metavar="X", help=text)


def _locking(parser: Parser) -> None:
    parser.add_argument(
        "--locking", type=values.locking, words=tuple(values.LOCKING), metavar="WHETHER",
        help="lock HDF5 files while they are open: on, off (for disks that have no locks) or best-effort "
        "(default: as HDF5 chooses)",
    )  # fmt: skip


def _follow_links(parser: Parser) -> None:
    text = "follow external links in the input to files outside its folder, too"
    parser.add_argument("--follow-links", action="store_true", help=text)


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
