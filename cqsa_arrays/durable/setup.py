"""What a job is made of, as its caller knows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..engine import Inputs, Progress
from ..errors import DeviceMemoryError
from ..planner import Plan, Problem, mask_to_dict
from ..storage import Layout, Shape4
from .inputs import KnownInput
from .watch import Watch


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
    ``request`` is what it takes to make the setup again, for JSON. ``moves``: the job may go to another device;
    ``resumes``: it is there, or it was, and none is begun.
    ``smaller(plan, error)`` gives a plan for what a device has left. ``progress(pairs)`` shows what is done. ``watch``
    has what is known of the inputs.
    """

    out: str
    inputs: Inputs
    watch: Watch
    plan: Plan
    output: OutputSpec
    request: Mapping[str, object]
    overwrite: bool
    restart: bool
    moves: bool
    resumes: bool
    scratch: str | None
    take_over: Callable[[Mapping[str, Any], int], Plan]
    smaller: Callable[[Plan, DeviceMemoryError], Plan]
    progress: Callable[[int], Progress]

    def check_inputs(self) -> None:
        """Raise StorageError where the file of an input no longer holds what it did."""
        self.watch.check()


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


def mark_of(plan: Plan, inputs: Mapping[str, KnownInput]) -> str:
    """A name of what is computed, of which data, by which plan: that of the same job in any folder, at any time."""
    problem = plan.problem
    nameless = {name: replace(getattr(problem, name), description="") for name in ("q", "k", "v", "result")}
    identity = replace(plan, problem=replace(problem, **nameless)).identity
    contents = {name: one.content for name, one in inputs.items()}
    return hashlib.sha256(json.dumps([identity, contents], sort_keys=True).encode()).hexdigest()[:16]
