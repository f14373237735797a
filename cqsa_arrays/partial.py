"""Proof of an unfinished job: rows that are written, and rows whose states are saved, against the keys seen so far."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import numpy as np

from .comparison import ErrorReport, Tolerance, compare_rows
from .durable import Place, SavedLane, read_saved
from .errors import ArgumentError
from .job import Job, prepared
from .masks import Mask
from .options import Options
from .planner import Group
from .ranges import Range
from .reference import reference_rows
from .resumable import plan_of, resumed
from .storage import PART_SUFFIX, TokenSource, dataset_in
from .verification import judged_dtype, rows_of

# Of each lane so many places are looked at.
PLACES = 4
# A plan is taken over to know what was computed, not to compute.
NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class PlaceReport:
    """The rows of one place: finished and in the file, or with their state saved, having seen ``keys`` keys."""

    lane: int
    finished: bool
    group: int
    rows: Range
    keys: int
    report: ErrorReport

    def __str__(self) -> str:
        what = "finished, in the file" if self.finished else f"{self.keys:,} keys seen so far"
        where = f"lane {self.lane}, group {self.group}, rows {self.rows.start:,} to {self.rows.stop - 1:,}"
        return f"{where}: {what}\n{self.report}"


@dataclass(frozen=True, slots=True)
class PartialReport:
    """What ``verify_partial`` found."""

    places: tuple[PlaceReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every error at every place is within its tolerance."""
        return all(place.report.passed for place in self.places)

    def __str__(self) -> str:
        return "\n".join(str(place) for place in self.places)

    def to_json(self) -> str:
        """One JSON object."""
        places = [
            {
                "lane": p.lane, "finished": p.finished, "group": p.group, "rows": [p.rows.start, p.rows.stop],
                "keys": p.keys, "report": json.loads(p.report.to_json()),
            }
            for p in self.places
        ]  # fmt: skip
        return json.dumps({"passed": self.passed, "places": places})


def verify_partial(
    path: str | os.PathLike[str], *, rows: int | None = 256, seed: int = 0, tolerance: float | None = None
) -> PartialReport:
    """Compare sampled rows of the unfinished job of ``path`` with float64 attention over the keys that they have seen.

    A few places of each lane are drawn with ``seed``, with about ``rows`` rows in all: what was finished is read from
    the file, the rest from the saved states. ``tolerance`` replaces the dtype's bound on the relative Frobenius error.
    Raises ArgumentError where there is no unfinished job or nothing was committed yet, StorageError where its files are
    damaged, or change while they are read.
    """
    path, rng, places = os.fspath(path), np.random.default_rng(seed), []
    request = resumed(path, device="cpu", memory=NO_LIMIT, options=Options())
    with prepared(request) as job, ExitStack() as stack:
        for saved in read_saved(path, lambda fact: plan_of(job, fact.chosen, fact.lanes), stack):
            chosen = rng.choice(len(saved.places), min(PLACES, len(saved.places)), replace=False)
            for place in (saved.places[i] for i in sorted(chosen)):
                count = min(len(place.rows), max(1, (rows or 256) // PLACES))
                sampled = np.sort(rng.choice(len(place.rows), count, replace=False)) + place.rows.start
                report = _check(path, job, saved, place, sampled)
                if tolerance is not None:
                    report = replace(report, tolerance=Tolerance(tolerance, report.tolerance.lse))
                keys = sum(map(len, place.keys))
                places.append(PlaceReport(saved.lane, place.finished, place.group.index, place.rows, keys, report))
    if not places:
        remedy = "Wait for the first commit: cqsa status shows it."
        raise ArgumentError("path", f"{path}, of which nothing is committed yet", "a job with something done", remedy)
    return PartialReport(tuple(places))


def _check(path: str, job: Job, saved: SavedLane, place: Place, rows: np.ndarray) -> ErrorReport:
    """The errors of some rows of one place."""
    inputs, problem, keys = job.inputs, job.plan.problem, sorted(place.keys)
    q = _Part(inputs.q, place.group, [Range(0, problem.query_tokens)])
    k, v = (_Part(source, place.group, keys) for source in (inputs.k, inputs.v))
    mask = _SeenMask(problem.mask, keys, problem.key_tokens)
    reference = reference_rows(q, k, v, rows, mask=mask, scale=problem.scale)  # type: ignore[arg-type]
    if not place.finished:
        state = saved.state_of(place, rows)
        narrow = inputs.q.dtype.itemsize == 2  # a wide state of products of narrow weights and values
        dtype = inputs.q.dtype.name if narrow else problem.compute_dtype
        return compare_rows(state.output().astype("f8"), state.lse().astype("f8"), reference, dtype)
    with ExitStack() as stack:
        out, lse = (
            stack.enter_context(closing(dataset_in(path + PART_SUFFIX, f"/{name}", argument="path").source()))
            for name in ("out", "lse")
        )
        got, got_lse = (
            rows_of(_Part(source, place.group, [Range(0, problem.query_tokens)]), rows) for source in (out, lse)
        )
        return compare_rows(got, got_lse[..., 0], reference, judged_dtype(out.dtype, inputs.q.dtype))


class _Part:
    """The heads of one group and some token ranges of a source, as if they were all there is."""

    def __init__(self, source: TokenSource, group: Group, ranges: list[Range]) -> None:
        self._source, self._group, self._ranges = source, group, ranges
        self.shape = (len(group.batch), len(group.heads), sum(map(len, ranges)), source.shape[3])

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        first = 0
        for part in self._ranges:
            common = Range(first, first + len(part)) & tokens
            if len(common):
                where = Range(common.start - first + part.start, common.stop - first + part.start)
                into = out[:, :, common.start - tokens.start : common.stop - tokens.start]
                self._source.read(_moved(batch, self._group.batch), _moved(heads, self._group.heads), where, into)
            first += len(part)


def _moved(part: Range, by: Range) -> Range:
    return Range(part.start + by.start, part.stop + by.start)


@dataclass(frozen=True, slots=True)
class _SeenMask:
    """A mask over the tokens of ``ranges``, in ascending order, taken as if they were all there is."""

    mask: Mask
    ranges: list[Range]
    key_tokens: int

    def keys_of(self, row: int, key_tokens: int) -> Range:
        """What a row sees of them: one interval, for what it sees of all keys is one."""
        seen, first, bounds = self.mask.keys_of(row, self.key_tokens), 0, []
        for part in self.ranges:
            common = part & seen
            if len(common):
                bounds += [first + common.start - part.start, first + common.stop - part.start]
            first += len(part)
        return Range(bounds[0], bounds[-1]) if bounds else Range(0, 0)
