"""Proof of an output file: sampled rows against float64 attention of the inputs that the file names."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import numpy as np

from .arguments import compute_dtype, whole_number
from .comparison import ErrorReport, Tolerance, compare_rows
from .errors import ArgumentError, StorageError
from .masks import Mask
from .planner import mask_from_dict
from .ranges import Range
from .reference import TokenBlocks, reference_rows, sample_rows
from .storage import DiskArray, TokenSource, dataset_in, describe


def verify(
    path: str | os.PathLike[str], *, rows: int | None = 256, seed: int = 0, tolerance: float | None = None
) -> ErrorReport:
    """Compare sampled rows of an output file with float64 attention of its inputs, computed without the kernels.

    ``path`` is a file that ``attention(out=...)`` or ``cqsa attend`` wrote; it names its inputs, mask and scale.
    ``rows`` tokens (None: all) are drawn with ``seed``, the first and the last always among them, and checked in every
    batch and head; ``tolerance`` replaces the dtype's bound on the relative Frobenius error.

    Returns an ErrorReport; ``report.passed`` says whether every error is within its tolerance. Raises ArgumentError for
    a file that is no output, StorageError where the inputs are gone or have changed since.
    """
    if rows is not None:
        rows = whole_number(rows, "rows", 1, "None checks all rows; 256 find any systematic error.")
    seed = whole_number(seed, "seed", 0, "Leave it out for 0.")
    path = os.fspath(path)
    found = opened_inputs(path)
    with ExitStack() as stack:
        q, k, v = (stack.enter_context(closing(array.source())) for array in found.arrays)
        out, lse = opened_outputs(path, q, v)
        tokens = q.shape[2]
        sampled = np.arange(tokens) if rows is None else sample_rows(tokens, rows, seed)
        reference = reference_rows(q, k, v, sampled, mask=found.mask, scale=found.scale)
        got_out, got_lse = (read_rows(array, sampled, stack) for array in (out, lse))
        dtype = judged_dtype(out.dtype, q.dtype)
        report = compare_rows(got_out, got_lse[..., 0], reference, dtype, seed=None if rows is None else seed)
    return report if tolerance is None else replace(report, tolerance=Tolerance(tolerance, report.tolerance.lse))


@dataclass(frozen=True, slots=True)
class NamedInputs:
    """What an output file says it was made of: the arrays q, k and v, mask and scale."""

    arrays: tuple[DiskArray, DiskArray, DiskArray]
    mask: Mask
    scale: float


def opened_inputs(path: str) -> NamedInputs:
    """The inputs that the output file ``path`` names.

    Raises ArgumentError for a file that is no output, StorageError where the inputs are gone or have changed since.
    """
    attributes = describe(path).attributes
    try:
        named = _named(json.loads(str(attributes["inputs"])))
        mask, scale = mask_from_dict(json.loads(str(attributes["mask"]))), float(str(attributes["scale"]))
    except (KeyError, ValueError, RecursionError) as error:  # JSON may be nested without an end
        expected = "an output of cqsa attend, whose attributes name its inputs"
        raise ArgumentError(
            "path", f"{path} without them ({error})", expected, "To compare arrays use compare."
        ) from error
    q, k, v = (_input(one, name, path) for name, one in zip("qkv", named, strict=True))
    return NamedInputs((q, k, v), mask, scale)


def opened_outputs(path: str, q: TokenSource, v: TokenSource) -> tuple[DiskArray, DiskArray]:
    """/out and /lse of the output file ``path``; ArgumentError where they cannot be those of its inputs."""
    out, lse = (dataset_in(path, f"/{name}", argument="path") for name in ("out", "lse"))
    for array, dim in ((out, v.shape[3]), (lse, 1)):
        shape, expected = array.stored.logical_shape, (*q.shape[:3], dim)
        if shape != expected:
            found = f"{array.stored.label} of logical shape {shape}"
            raise ArgumentError("path", found, f"{expected}, as its inputs give", "It was changed: compute it again.")
    return out, lse


def _named(inputs: object) -> list[dict[str, object]]:
    """What is said of q, k and v; ValueError where it is not what ``attend`` writes."""
    if not isinstance(inputs, dict) or not all(isinstance(inputs.get(name), dict) for name in "qkv"):
        raise ValueError("its attribute inputs does not name q, k and v")
    return [inputs[name] for name in "qkv"]


def judged_dtype(output: np.dtype, inputs: np.dtype) -> str:
    """The dtype whose tolerance holds: a wide output of narrower arithmetic is as exact as the arithmetic."""
    return min(output.name, compute_dtype(inputs), key=lambda name: _EXACTNESS.index(name))


_EXACTNESS = ("bfloat16", "float16", "float32", "float64")


def _input(stored: dict[str, object], name: str, output: str) -> DiskArray:
    """The input that the output was made from; StorageError if it is gone or another."""
    if any(key not in stored for key in ("path", "dataset", "layout")):
        raise ArgumentError(
            "path", f"{name} was an array in memory", "inputs in files", "Compare with compare instead."
        )
    where = str(stored["path"]), str(stored["dataset"])
    array = dataset_in(*where, layout=str(stored["layout"]), argument=name)
    with closing(array.source()) as source:
        identity = source.identity
    changed = [key for key in ("size", "mtime_ns", "shape", "dtype") if identity.get(key) != stored.get(key)]
    if changed:
        raise StorageError(
            f"{output}: its input {stored['path']}:{stored['dataset']} has changed since ({', '.join(changed)});"
            " what was computed can no longer be checked. Compute it again."
        )
    return array


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
