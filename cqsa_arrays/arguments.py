"""What people pass, checked and turned into a problem: sources, mask, scale, budget. Nothing is computed or written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Number, Real
from typing import Any

import numpy as np

from .devices import Gpu, planned_device, resolve_device
from .engine import Inputs
from .errors import ArgumentError
from .limits import machine_bytes, room_bytes
from .masks import Causal, Full, Mask
from .options import Options
from .planner import COVERS, MOST_LANES, Budget, Machine, Operand, Problem, Rates, Result
from .storage import (
    LAYOUTS,
    DeviceSource,
    HostSource,
    Layout,
    TokenSource,
    as_source,
    check_locking,
    dataset,
    overlaps_itself,
    refuse_mask,
)
from .units import format_bytes, parse_bytes, parse_seconds
from .wording import Choice, Phrase

FLOATS = ("float16", "bfloat16", "float32", "float64")
MAX_HEAD_DIM = 1024
MAX_THREADS = 1 << 16
# Share of the machine's memory that is used where no budget is given: the same call gives the same plan on one machine.
DEFAULT_SHARE = 0.5
# A product of a query and a key of this size times the scale must be a number still: 1024 elements of 2048 each.
MODERATE_SCORE = 2.0**32
_USUAL_SCALE = "Leave it out for 1 / sqrt(head_dim)."


def open_source(array: object, argument: str, layout: str | None, options: Options) -> TokenSource:
    """The source of one input; a text or path names a data set, "file.h5:/q". Raises ArgumentError, StorageError."""
    if isinstance(array, (str, os.PathLike)):
        array = dataset(
            os.fspath(array), layout=layout, argument=argument, locking=options.locking,
            follow_links=options.follow_links,
        )  # fmt: skip
    return as_source(array, argument, layout)


def check_layout(layout: object) -> None:
    """Must be one of the layouts, or None."""
    if layout is not None and layout not in LAYOUTS:
        remedy = "b = batch, h = heads, n = tokens, d = head dim."
        raise ArgumentError("layout", _shown(layout), f"one of {', '.join(LAYOUTS)}", remedy)


def check_inputs(inputs: Inputs) -> None:
    """Shapes and dtypes must fit each other."""
    _check_shapes(inputs)
    _check_types(inputs)


def _check_shapes(inputs: Inputs) -> None:
    axes = ("batch", "heads", "tokens", "head_dim")
    shapes = {"q": inputs.q.shape, "k": inputs.k.shape, "v": inputs.v.shape}
    for name, shape in shapes.items():
        for axis, length in zip(axes, shape, strict=True):
            if length < 1:
                raise ArgumentError(name, f"0 {axis}", f"at least 1 {axis}", "Attention of nothing is not defined.")
        if shape[3] > MAX_HEAD_DIM:
            raise ArgumentError(
                name, f"head_dim {shape[3]}", f"at most {MAX_HEAD_DIM}", "Split the vectors into heads."
            )
    for name, other, same in (("k", "q", (0, 1, 3)), ("v", "k", (0, 1, 2))):
        for i in same:
            if shapes[name][i] != shapes[other][i]:
                raise ArgumentError(
                    name, f"{shapes[name][i]} {axes[i]}", f"{shapes[other][i]} {axes[i]}, as {other} has",
                    Phrase.of(
                        "Shapes are q (batch, heads, Nq, D), k (batch, heads, Nk, D), v (batch, heads, Nk, Dv);"
                        " a wrong ", Choice("layout"), " also leads here.",
                    ),
                )  # fmt: skip


def _check_types(inputs: Inputs) -> None:
    names = [source.dtype.name for source in (inputs.q, inputs.k, inputs.v)]
    if len(set(names)) > 1:
        found = f"q {names[0]}, k {names[1]}, v {names[2]}"
        raise ArgumentError("q, k, v", found, "one dtype", "Convert the others to that of q on purpose.")


def resolve_mask(causal: bool, mask: Mask | None) -> Mask:
    """The mask of ``causal=`` and ``mask=``, of which at most one may be given."""
    if not isinstance(causal, (bool, np.bool_)):
        remedy = "For an offset pass mask=cqsa.causal(offset=...)."
        raise ArgumentError("causal", _shown(causal), "True or False", remedy)
    if mask is None:
        return Causal() if causal else Full()
    if causal:
        raise ArgumentError("causal", "both causal=True and mask=", "one of them", "Leave causal out.")
    if not isinstance(mask, (Causal, Full)):
        raise ArgumentError(
            "mask", _shown(mask), "cqsa.causal(...) or None", "Masks are functions of the row, not arrays."
        )
    return mask


def resolve_scale(scale: float | None, head_dim: int, compute: str) -> float:
    """``scale``, or 1 / sqrt(head_dim).

    Raises ArgumentError for what is no finite number, and where moderate scores would be infinite in ``compute``.
    """
    if scale is None:
        return head_dim**-0.5
    try:
        found = float(scale) if isinstance(scale, Real) and not isinstance(scale, bool) else math.nan
    except OverflowError:  # a whole number beyond every float
        found = math.inf
    if not math.isfinite(found):
        raise ArgumentError("scale", _shown(scale), "a finite number", _USUAL_SCALE)
    largest = float(np.finfo(compute).max) / MODERATE_SCORE / math.log2(math.e)  # kernels take powers of 2
    if abs(found) > largest:
        expected = f"a finite number of at most {largest:.2g} in size: larger ones make scores infinite in {compute}"
        raise ArgumentError("scale", _shown(scale), expected, _USUAL_SCALE)
    return found


def resolve_dtype(dtype: Any, default: np.dtype) -> np.dtype:
    """The element type of the result."""
    if dtype is None:
        return default
    import ml_dtypes

    name = str(dtype).removeprefix("torch.")  # PyTorch's types of elements are none that NumPy knows
    try:
        found = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name if name in FLOATS else dtype)
    except (TypeError, ValueError, SyntaxError) as error:  # NumPy parses text as Python
        raise ArgumentError("dtype", _shown(dtype), f"one of {', '.join(FLOATS)}", "Leave it out for q's.") from error
    if found.name not in FLOATS or not found.isnative:
        raise ArgumentError("dtype", str(found), f"one of {', '.join(FLOATS)}", "Leave it out for q's.")
    return found


def computing_device(device: object, sources: Iterable[TokenSource], out: object, *, dry_run: bool) -> Gpu | None:
    """The GPU that computes, or None for the CPU; arrays on a GPU decide where ``device`` leaves it open.

    In a ``dry_run`` it may be a model that is not here.
    """
    arrays_on = {source.device_index for source in sources if isinstance(source, DeviceSource)}
    if hasattr(out, "__cuda_array_interface__"):
        arrays_on.add(out.device.id if hasattr(out, "device") and hasattr(out.device, "id") else 0)
    return planned_device(device, arrays_on) if dry_run else resolve_device(device, arrays_on)


def check_options(options: object) -> None:
    """Must be an Options object."""
    if not isinstance(options, Options):
        raise ArgumentError("options", type(options).__name__, "cqsa.Options(...)", "Leave it out for the defaults.")
    if options.cover not in COVERS:
        remedy = "'auto' lets the planner choose."
        raise ArgumentError("cover", _shown(options.cover), f"one of {', '.join(COVERS)}", remedy)
    check_locking(options.locking)
    check_depth(options.check_inputs)
    whole_number(options.lanes, "lanes", 1, "Leave it out for one.", MOST_LANES)
    for name in ("checkpoint_s", "max_time_s"):
        if getattr(options, name) is not None:
            parse_seconds(getattr(options, name), name)
    for name, usual in (("lanes", 1), ("max_time_s", None), ("restart", False)):
        if not options.durable and getattr(options, name) != usual:
            found = _shown(getattr(options, name))
            raise ArgumentError(name, found, f"{usual}, or a durable job", "Pass Options(durable=True) and out=.")


def check_depth(asked: object) -> None:
    """How inputs are to be known and compared: "sampled" or "full"."""
    if asked not in ("sampled", "full"):
        remedy = "'full' reads all of the inputs, 'sampled' some blocks."
        raise ArgumentError("check_inputs", _shown(asked), "'sampled' or 'full'", remedy)


def check_durable(options: Options, out: object) -> None:
    """A job that can be resumed writes a file."""
    if options.durable and not isinstance(out, (str, os.PathLike)):
        found = "no out=" if out is None else f"out of type {type(out).__name__}"
        raise ArgumentError("durable", found, "the path of a new file", "Pass out='out.h5', or leave durable out.")


def check_durable_inputs(inputs: Inputs) -> None:
    """Files that a job reads must be ones that it can tell from others, now and in a later run."""
    for name in "qkv":
        identity = getattr(inputs, name).identity
        if "opened_as" in identity:
            place = f"{os.path.basename(str(identity['opened_as']))}:{identity['dataset']}"
            remedy = f"Copy it to a file on a disk, pass {name}[...], or leave durable out."
            expected = "a file on a disk, or an array in memory, for a durable job"
            raise ArgumentError(name, f"{place}, which is in no file of that name", expected, remedy)


def machine(options: Options, gpu: Gpu | None) -> Machine:
    """The threads to use, the page cache to hope for, and whether a GPU computes."""
    if options.threads is not None:
        threads = whole_number(options.threads, "threads", 1, "Leave it out to use every processor.", MAX_THREADS)
    else:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(threads, machine_bytes() // 2, Rates(), gpu is not None)


def resolve_chunks(options: Options) -> int | None:
    """The number of chunks that was asked for."""
    if options.chunks is None:
        return None
    return whole_number(options.chunks, "chunks", 1, "Leave it out to let the planner choose.")


def whole_number(value: Any, argument: str, least: int, remedy: str, most: int | None = None) -> int:
    """``value`` as an int. Raises ArgumentError, naming ``argument``, for other types, below ``least``, above ``most``.

    >>> whole_number(np.int64(3), "chunks", 1, "")
    3
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
        if most is None or int(value) <= most:
            return int(value)
        raise ArgumentError(argument, _shown(value), f"a whole number, at most {most}", remedy)
    raise ArgumentError(argument, _shown(value), f"a whole number, at least {least}", remedy)


def resolve_budget(memory: int | str | None, options: Options, out: Any, gpu: Gpu | None) -> Budget:
    """Bytes that may be held, and where states go that do not fit.

    Where the CPU computes, the smaller of ``memory`` and ``host_memory`` counts; a GPU has ``memory`` for itself, and
    its host half of what it has unless ``host_memory`` says otherwise.
    """
    limits = {"memory": memory, "host_memory": options.host_memory}
    given = {name: parse_bytes(value, name) for name, value in limits.items() if value is not None}
    scratch = _scratch(options, out)
    host_total, whose = _host_memory()
    host_bytes = given.pop("host_memory", int(host_total * DEFAULT_SHARE)) if gpu else None
    if given:
        name = min(given, key=lambda name: given[name])
        return Budget(given[name], Choice(name, limits[name]), scratch, host_bytes)
    total, whose = (gpu.total_bytes, f"{gpu.name}'s") if gpu else (host_total, whose)
    return Budget(int(total * DEFAULT_SHARE), f"half of {whose} {format_bytes(total)}", scratch, host_bytes)


def _host_memory() -> tuple[int, str]:
    """Bytes that this process may use, and whose they are."""
    total, room = machine_bytes(), room_bytes()
    return (total, "this machine's") if room is None or total <= room else (room, "what ulimit leaves,")


def _scratch(options: Options, out: Any) -> str | None:
    """The directory for states that do not fit; None: the system's, which is looked for where it is needed."""
    if options.scratch is None:
        return os.path.dirname(os.path.abspath(os.fspath(out))) if isinstance(out, (str, os.PathLike)) else None
    if not isinstance(options.scratch, (str, os.PathLike)) or not os.path.isdir(options.scratch):
        raise ArgumentError("scratch", _shown(options.scratch), "an existing directory", "Make it, or leave it out.")
    return os.fspath(options.scratch)


def build_problem(inputs: Inputs, result: Result, mask: Mask, scale: float, gpu: Gpu | None) -> Problem:
    """The planner's view; the arithmetic is float64 for float64 inputs, else float32."""
    compute = compute_dtype(inputs.q.dtype)
    q, k, v = (_operand(source, compute, gpu) for source in (inputs.q, inputs.k, inputs.v))
    return Problem(q, k, v, result, compute, mask, scale)


def compute_dtype(dtype: np.dtype) -> str:
    """The arithmetic for inputs of ``dtype``."""
    return "float64" if dtype == np.float64 else "float32"


def _operand(source: TokenSource, compute: str, gpu: Gpu | None) -> Operand:
    """A GPU takes elements as they are stored, and uses in place what it holds."""
    in_place = isinstance(source, DeviceSource) if gpu else source.in_place
    read_as = source.dtype if gpu else np.dtype(compute)
    return Operand(
        source.shape, source.dtype.name, source.dtype.itemsize, in_place, source.token_major,
        source.staging_bytes(read_as), source.held_bytes, source.description, not isinstance(source, HostSource),
        source.touched_bytes,
    )  # fmt: skip


def result_shape(inputs: Inputs) -> tuple[int, int, int, int]:
    """(batch, heads, Nq, Dv)."""
    batch, heads, tokens, _ = inputs.q.shape
    return batch, heads, tokens, inputs.v.shape[3]


def check_out_path(out: object) -> None:
    """Must be a path that a file can have: text, neither empty nor with what the system does not take in names."""
    path = os.fspath(out) if isinstance(out, (str, os.PathLike)) else None
    try:
        possible = isinstance(path, str) and path != "" and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        found = ascii(path) if isinstance(path, (str, bytes)) else f"type {type(out).__name__}"
        remedy = "No file can have that name: choose another one." if path else "Leave it out for a new array."
        raise ArgumentError("out", found, "a NumPy or CuPy array, a path or None", remedy)


def check_out_array(out: Any, shape: tuple[int, ...], layout: Layout, inputs: Inputs) -> None:
    """``out`` must be a writable NumPy or CuPy float array of ``shape`` that shares no element with the ``inputs``."""
    refuse_mask(out, "out")
    if out.shape != shape:
        raise ArgumentError("out", f"shape {out.shape}", f"{shape}, layout {layout}", "Pass an array of that shape.")
    if out.dtype.name not in FLOATS or not out.dtype.isnative:
        raise ArgumentError("out", f"dtype {out.dtype}", f"one of {', '.join(FLOATS)}", "Pass a float array.")
    if overlaps_itself(out):
        raise ArgumentError("out", "an array whose elements overlap", "one place for each", "Pass np.empty(...).")
    if any(source.overlaps(out) for source in (inputs.q, inputs.k, inputs.v)):
        raise ArgumentError("out", "memory of an input", "an array of its own", "Inputs are never overwritten.")
    if not isinstance(out, np.ndarray):
        if out.shape[-1] > 1 and out.strides[-1] != out.itemsize:
            raise ArgumentError(
                "out", "an array whose vectors are scattered", "contiguous vectors", "Pass cupy.empty(...)."
            )
        return
    if not out.flags.writeable:
        raise ArgumentError("out", "a read-only array", "a writable one", "Pass an array that may be changed.")
    if isinstance(out, np.memmap):
        raise ArgumentError("out", "a memory map", "an array in memory or a path", "Pass the path of a new HDF5 file.")


def _shown(value: object) -> str:
    """``value`` in an error, on one line: text and numbers as they are written, of everything else its type."""
    return repr(value) if value is None or isinstance(value, (str, Number)) else f"type {type(value).__name__}"
