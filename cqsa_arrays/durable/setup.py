"""What a job is made of, as its caller knows it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import Inputs, Progress
from ..errors import DeviceMemoryError, StorageError
from ..planner import Plan, Problem, mask_to_dict
from ..ranges import Range
from ..storage import Layout, Shape4, TokenSource

# Tokens of each input whose elements are part of its fingerprint.
SAMPLED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The output file: logical shape, element types, layout and attributes; ``inputs`` are paths never written to."""

    shape: Shape4
    dtype: np.dtype
    layout: Layout
    lse_dtype: np.dtype
    attributes: Mapping[str, object]
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setup:
    """A job to be begun or taken up.

    ``plan`` is that of a new job, ``take_over(chosen, lanes)`` gives the one that goes on with what another run chose.
    ``request`` is what it takes to make the setup again, for JSON. ``moves``: the job may go to another device.
    ``smaller(plan, error)`` gives a plan for what a device has left. ``progress(pairs)`` shows what is done.
    """

    out: str
    inputs: Inputs
    plan: Plan
    output: OutputSpec
    request: Mapping[str, object]
    overwrite: bool
    restart: bool
    moves: bool
    scratch: str | None
    take_over: Callable[[Mapping[str, Any], int], Plan]
    smaller: Callable[[Plan, DeviceMemoryError], Plan]
    progress: Callable[[int], Progress]

    def check_inputs(self) -> None:
        """Raise StorageError where the file of an input is no longer what it was when it was opened."""
        for name in "qkv":
            identity = getattr(self.inputs, name).identity
            if "mtime_ns" not in identity:
                continue
            path = str(identity["path"])
            try:
                found = os.stat(path)
            except OSError as error:
                raise StorageError(f"{name}: {path}: {error.strerror}, while it was read.") from error
            if (found.st_size, found.st_mtime_ns) != (identity["size"], identity["mtime_ns"]):
                raise StorageError(
                    f"{name}: {path} has changed while it was read. What was committed before is kept, and can go on"
                    " only with the file as it was."
                )


def problem_facts(problem: Problem, layout: Layout) -> dict[str, object]:
    """What must be the same for a job to go on, by name."""
    return {
        "q": [list(problem.q.shape), problem.q.dtype],
        "k": [list(problem.k.shape), problem.k.dtype],
        "v": [list(problem.v.shape), problem.v.dtype],
        "dtype": problem.result.dtype,
        "mask": mask_to_dict(problem.mask),
        "scale": problem.scale,
        "layout": layout.name,
    }


def fingerprints(inputs: Inputs) -> dict[str, dict[str, object]]:
    """By name: where each input is, size and time of its file, and a hash of some tokens."""
    sources: dict[str, TokenSource] = {name: getattr(inputs, name) for name in "qkv"}
    return {name: {**source.identity, "sample": _sample(source)} for name, source in sources.items()}


def _sample(source: TokenSource) -> str:
    """SHA-256 of some tokens, evenly spread, in float64: the same for every way of reading them."""
    batch, heads, tokens, dim = source.shape
    found, block = hashlib.sha256(), np.empty((1, 1, 1, dim))
    for i, token in enumerate(np.linspace(0, tokens - 1, SAMPLED_TOKENS).astype(int).tolist()):
        b, h = i % batch, i % heads
        source.read(Range(b, b + 1), Range(h, h + 1), Range(token, token + 1), block)
        found.update(block.tobytes())
    return found.hexdigest()


def mark_of(identity: str, inputs: Mapping[str, object]) -> str:
    """A name of a job that an unbroken run gives, too: its output must be the same bytes."""
    return hashlib.sha256(json.dumps([identity, inputs], sort_keys=True).encode()).hexdigest()[:16]
