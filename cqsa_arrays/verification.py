"""Proof of an output file: sampled rows against float64 attention of the inputs that the file names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from .arguments import check_depth, compute_dtype, whole_number
from .comparison import ErrorReport, compare_rows
from .durable import Depth, Finder, read_inputs, require_finished
from .errors import ArgumentError
from .masks import Mask
from .planner import mask_from_dict
from .ranges import Range
from .reference import TokenBlocks, reference_rows, sample_rows
from .storage import DiskArray, Locking, TokenSource, dataset_in, describe

NOTHING_NAMED: Mapping[str, Any] = MappingProxyType({})


def verify(
    path: str | os.PathLike[str],
    *,
    rows: int | None = 256,
    seed: int = 0,
    tolerance: float | None = None,
    locking: Locking = None,
    check_inputs: str = "sampled",
    q: Any = None,
    k: Any = None,
    v: Any = None,
) -> ErrorReport:
    """Compare sampled rows of an output file with float64 attention of its inputs, computed without the kernels.

    ``path`` is a file that ``attention(out=...)`` or ``cqsa attend`` wrote; it names its inputs, mask and scale.
    ``rows`` tokens (None: all) are drawn with ``seed``, the first and the last always among them, and checked in every
    batch and head; ``tolerance`` replaces what is allowed for the output: the dtype's bound on the relative Frobenius
    error, and what large scores lose in any arithmetic of that precision. ``locking=False`` opens files on disks that
    have no locks; inputs are by default opened as the run did.

    The inputs are looked for where they were as seen from the output, then where they were given as seen from the
    working directory; ``q``, ``k`` and ``v`` ("file.h5:/q" or arrays of ``cqsa.open``) say where one is now. What they
    hold must be what it was: by a hash of sampled blocks, which notices every change of a file's size and every change
    that touches one of the blocks, or with ``check_inputs="full"`` by one of everything, if the output has one
    (``Options.check_inputs``).

    Returns an ErrorReport; ``report.passed`` says whether every error is within its tolerance. Rows whose scores are so
    large that rounding them may change the result by over 1 % are ``report.undetermined``, never passed. Raises
    ArgumentError for a file that is no output, StorageError where the inputs are not found or have changed since.
    """
    if rows is not None:
        rows = whole_number(rows, "rows", 1, "None checks all rows; 256 find any systematic error.")
    seed = whole_number(seed, "seed", 0, "Leave it out for 0.")
    path = os.fspath(path)
    check_depth(check_inputs)
    named = {"q": q, "k": k, "v": v}
    found = opened_inputs(path, locking, named, "full" if check_inputs == "full" else "sampled")
    with ExitStack() as stack:
        q, k, v = (stack.enter_context(closing(array.source())) for array in found.arrays)
        out, lse = opened_outputs(path, q, v, locking)
        tokens = q.shape[2]
        sampled = np.arange(tokens) if rows is None else sample_rows(tokens, rows, seed)
        arithmetic = compute_dtype(q.dtype)
        reference = reference_rows(q, k, v, sampled, mask=found.mask, scale=found.scale, arithmetic=arithmetic)
        got_out, got_lse = (read_rows(array, sampled, stack) for array in (out, lse))
        dtype = judged_dtype(out.dtype, q.dtype, found.device)
        seed_used = None if rows is None else seed
        return compare_rows(got_out, got_lse[..., 0], reference, dtype, seed=seed_used, tolerance=tolerance)


@dataclass(frozen=True, slots=True)
class NamedInputs:
    """What an output file was made of: the arrays q, k and v, mask and scale, and where it was computed."""

    arrays: tuple[DiskArray, DiskArray, DiskArray]
    mask: Mask
    scale: float
    device: str


def opened_inputs(
    path: str, locking: Locking = None, named: Mapping[str, Any] = NOTHING_NAMED, depth: Depth = "sampled"
) -> NamedInputs:
    """The inputs that the output file ``path`` knows, where they are ``named`` or found, compared to that ``depth``.

    Raises ArgumentError for a file that is no output, StorageError where the inputs are not found or have changed.
    """
    require_finished(path)
    attributes = describe(path, locking=locking).attributes
    try:
        stored = json.loads(str(attributes["inputs"]))
        known = read_inputs(stored)
        mask, scale = mask_from_dict(json.loads(str(attributes["mask"]))), float(str(attributes["scale"]))
    except (KeyError, ValueError, RecursionError) as error:  # JSON may be nested without an end
        expected = "an output of cqsa attend, whose attributes name its inputs"
        raise ArgumentError(
            "path", f"{path} without them ({error})", expected, "To compare arrays use compare."
        ) from error
    q, k, v = (
        Finder(path, "verify", _locking(stored[name], locking), depth).find(name, known[name], named.get(name))
        for name in "qkv"
    )
    return NamedInputs((q, k, v), mask, scale, _device(attributes.get("plan")))


def opened_outputs(path: str, q: TokenSource, v: TokenSource, locking: Locking = None) -> tuple[DiskArray, DiskArray]:
    """/out and /lse of the output file ``path``; ArgumentError where they cannot be those of its inputs."""
    out, lse = (dataset_in(path, f"/{name}", locking=locking, argument="path") for name in ("out", "lse"))
    for array, dim in ((out, v.shape[3]), (lse, 1)):
        shape, expected = array.stored.logical_shape, (*q.shape[:3], dim)
        if shape != expected:
            found = f"{array.stored.label} of logical shape {shape}"
            raise ArgumentError("path", found, f"{expected}, as its inputs give", "It was changed: compute it again.")
    return out, lse


def _device(plan: object) -> str:
    """Where the file was computed; "" where it does not say."""
    try:
        found = json.loads(str(plan))
    except (ValueError, RecursionError):
        return ""
    return str(found.get("device", "")) if isinstance(found, dict) else ""


def judged_dtype(output: np.dtype, inputs: np.dtype, device: str) -> str:
    """The dtype whose tolerance holds: a wide output of narrower arithmetic is as exact as the arithmetic.

    On any ``device`` but a CPU 16-bit inputs meet weights of 16 bits.
    """
    weights = compute_dtype(inputs) if device == "cpu" else inputs.name
    return min(output.name, compute_dtype(inputs), weights, key=lambda name: _EXACTNESS.index(name))


_EXACTNESS = ("bfloat16", "float16", "float32", "float64")


def _locking(stored: Mapping[str, object], asked: Locking) -> Locking:
    """How an input is opened: as asked for, else as the run did."""
    remembered = stored.get("locking")
    if asked is None and (isinstance(remembered, bool) or remembered == "best-effort"):
        return remembered
    return asked


def read_rows(array: DiskArray, rows: np.ndarray, stack: ExitStack) -> np.ndarray:
    """The chosen tokens of all batches and heads, (B, H, R, dim), in float64."""
    return rows_of(stack.enter_context(closing(array.source())), rows)


def rows_of(source: TokenBlocks, rows: np.ndarray) -> np.ndarray:
    """The same of blocks wherever they are kept."""
    batch, heads, _, dim = source.shape
    found = np.empty((batch, heads, len(rows), dim))
    for i, row in enumerate(rows.tolist()):
        source.read(Range(0, batch), Range(0, heads), Range(row, row + 1), found[:, :, i : i + 1])
    return found
