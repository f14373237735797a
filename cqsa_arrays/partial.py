"""Proof of an unfinished job: rows that are written, and rows whose states are saved, against the keys seen so far."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arguments import check_depth, whole_number
from .comparison import ErrorReport, Verdict, compare_rows, worst_verdict
from .durable import Depth, Picture, Place, SavedJob, SavedLane
from .errors import ArgumentError, StorageError
from .job import Job, prepared
from .masks import Mask
from .options import Options
from .planner import Group
from .ranges import Range
from .reference import TokenBlocks, reference_rows
from .resumable import output_spec, plan_of, resumed
from .storage import Locking, target_of
from .tables import html_of_text
from .units import counted
from .verification import judged_dtype, rows_of
from .wording import Call, Phrase

# So many lanes are looked at, and of each so many places.
MOST_LANES, PLACES = 64, 4
# So often a lane is looked at again that went on meanwhile.
LOOKS = 100
# So long is waited for a job that is about to end.
ENDING_S = 0.05
# A job may have been moved to another device half-way.
ANY_DEVICE = ""
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
        what = "finished, in the file" if self.finished else f"{counted(self.keys, 'key')} seen so far"
        where = f"lane {self.lane}, group {self.group}, rows {self.rows.start:,} to {self.rows.stop - 1:,}"
        return f"{where}: {what}\n{self.report}"

    def __repr__(self) -> str:
        return f"<PlaceReport {str(self).splitlines()[0]}: {self.report!r}>"


@dataclass(frozen=True, slots=True)
class PartialReport:
    """What ``verify_partial`` found at some ``places``, of some of the ``lanes`` lanes that have committed anything."""

    places: tuple[PlaceReport, ...]
    lanes: int

    @property
    def passed(self) -> bool:
        """Whether every row at every place is determined and every error within its tolerance."""
        return self.verdict == "passed"

    @property
    def verdict(self) -> Verdict:
        """The worst of all places: "failed", "undetermined" or "passed"."""
        return worst_verdict(place.report.verdict for place in self.places)

    def __str__(self) -> str:
        some = [f"{MOST_LANES} of {self.lanes:,} lanes were looked at"] if self.lanes > MOST_LANES else []
        return "\n".join([*map(str, self.places), *some])

    def __repr__(self) -> str:
        return f"<PartialReport {'PASSED' if self.passed else 'FAILED'}: {len(self.places)} places>"

    def _repr_html_(self) -> str:
        return html_of_text(f"{repr(self)[1:-1]}\n{self}")

    def to_json(self) -> str:
        """One JSON object."""
        places = [
            {
                "lane": p.lane, "finished": p.finished, "group": p.group, "rows": [p.rows.start, p.rows.stop],
                "keys": p.keys, "report": json.loads(p.report.to_json()),
            }
            for p in self.places
        ]  # fmt: skip
        return json.dumps({"passed": self.passed, "verdict": self.verdict, "lanes": self.lanes, "places": places})


def verify_partial(
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
) -> PartialReport:
    """Compare sampled rows of the unfinished job of ``path`` with float64 attention over the keys that they have seen.

    A few places of each lane, of 64 lanes at most, are drawn with ``seed``, with about ``rows`` rows a lane: what was
    finished is read from the file, the rest from the saved states. ``tolerance`` replaces what is allowed for the
    output, as in ``verify``, ``locking`` that of the job; its inputs are found, named and compared as by ``verify``.
    Raises ArgumentError where there is no unfinished job or nothing was committed yet, StorageError where its files
    are damaged, or change while they are read.
    """
    check_depth(check_inputs)
    if rows is not None:
        rows = whole_number(rows, "rows", 1, "256 find any systematic error.")
    seed = whole_number(seed, "seed", 0, "Leave it out for 0.")
    path = target_of(os.fspath(path))
    named = {"q": q, "k": k, "v": v}
    depth: Depth = "full" if check_inputs == "full" else "sampled"
    request = resumed(path, device="cpu", memory=NO_LIMIT, options=Options(locking=locking), named=named, depth=depth)
    with prepared(request) as job:
        look = _Look(job, SavedJob.of(path, lambda fact: plan_of(job, fact.chosen, fact.lanes)), rows or 256, tolerance)
        rng = np.random.default_rng(seed)
        lanes, places = look.at_lanes(rng)
    if not places:
        remedy = Phrase.of("Wait for the first commit, which ", Call("status", path), " shows.")
        raise ArgumentError("path", f"{path}, of which nothing is committed yet", "a job with something done", remedy)
    return PartialReport(tuple(places), lanes)


@dataclass(frozen=True, slots=True)
class _Look:
    """A look at an unfinished job: about ``rows`` rows of each lane."""

    job: Job
    saved: SavedJob
    rows: int
    tolerance: float | None

    def at_lanes(self, rng: np.random.Generator) -> tuple[int, list[PlaceReport]]:
        """How many lanes have committed anything, and the reports of some places of some of them."""
        try:
            picture = self.saved.paths.look()
        except FileNotFoundError as error:
            require_unfinished(self.saved)
            raise StorageError(f"{error.filename}: gone, while the job was looked at. Look again.") from None
        lanes = sorted(lane for lane in {*picture.done, *picture.checkpoints} if lane < self.saved.fact.lanes)
        chosen = lanes if len(lanes) <= MOST_LANES else sorted(rng.choice(lanes, MOST_LANES, replace=False).tolist())
        return len(lanes), [place for lane in chosen for place in self._at_lane(lane, rng, picture)]

    def _at_lane(self, number: int, rng: np.random.Generator, picture: Picture | None) -> list[PlaceReport]:
        """The reports of some places of a lane, of one commit; a lane that goes on meanwhile is looked at again."""
        for _ in range(LOOKS):
            seen = None
            try:
                seen = self.saved.lane(number, picture)
                return self._at(seen, rng)
            except (FileNotFoundError, StorageError):
                picture = None
                self._require_news(number, seen)
        raise StorageError(
            f"lane {number} commits faster than it can be looked at. Look again when there is more of it."
        )

    def _require_news(self, number: int, seen: SavedLane | None) -> None:
        """Return where the lane has gone on since it was ``seen``; else raise what is being handled, or why not."""
        try:
            now = self.saved.lane(number)
        except FileNotFoundError:  # it has gone on again
            require_unfinished(self.saved)
            return
        except StorageError:
            require_unfinished(self.saved)
            raise
        if seen is not None and now.record == seen.record:
            require_unfinished(self.saved)
            if self.saved.is_ending:
                self.saved.require_unnamed()
                time.sleep(ENDING_S)
                return
            if self.saved.is_worked_on:
                raise StorageError(
                    f"lane {number}: what was committed last cannot be read now, while a process works on the job. Look"
                    " again."
                ) from None
            raise

    def _at(self, lane: SavedLane, rng: np.random.Generator) -> list[PlaceReport]:
        places = [lane.places[i] for i in sorted(rng.choice(len(lane.places), min(PLACES, len(lane.places)), False))]
        sampled = [_sampled(place, max(1, self.rows // PLACES), rng) for place in places]
        # What may be written over is read before anything is computed, which takes its time.
        states = [
            None if place.finished else lane.state_of(place, rows) for place, rows in zip(places, sampled, strict=True)
        ]
        reports = []
        for place, rows, state in zip(places, sampled, states, strict=True):
            found = self._written(lane, place, rows) if state is None else (state.output(), state.lse())
            report = self._judged(place, rows, *found)
            keys = sum(map(len, place.keys))
            number = lane.record.lane
            reports.append(PlaceReport(number, place.finished, place.group.index, place.rows, keys, report))
        return reports

    def _written(self, lane: SavedLane, place: Place, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows that are finished, as the unfinished file and the journals have them."""
        output, sources = self.saved.rows(lane.record, output_spec(self.job, {}))
        everything = [Range(0, self.job.plan.problem.query_tokens)]
        try:
            out, lse = (rows_of(_Part(source, place.group, everything), rows) for source in sources)
        finally:
            output.keep()
        return out.astype(sources[0].dtype), lse[..., 0]

    def _judged(self, place: Place, rows: np.ndarray, out: np.ndarray, lse: np.ndarray) -> ErrorReport:
        """The errors of some rows of one place."""
        inputs, problem, keys = self.job.inputs, self.job.plan.problem, sorted(place.keys)
        q = _Part(inputs.q, place.group, [Range(0, problem.query_tokens)])
        k, v = (_Part(source, place.group, keys) for source in (inputs.k, inputs.v))
        mask = _SeenMask(problem.mask, keys, problem.key_tokens)
        reference = reference_rows(
            q, k, v, rows, mask=mask, scale=problem.scale, arithmetic=problem.compute_dtype,  # type: ignore[arg-type]
        )  # fmt: skip
        # A state is of the type in which it is computed.
        dtype = judged_dtype(out.dtype, inputs.q.dtype, ANY_DEVICE)
        return compare_rows(out.astype("f8"), lse.astype("f8"), reference, dtype, tolerance=self.tolerance)


def require_unfinished(saved: SavedJob) -> None:
    """Raise ArgumentError where the job has ended since it was looked at."""
    saved.folder.require()


def _sampled(place: Place, count: int, rng: np.random.Generator) -> np.ndarray:
    count = min(len(place.rows), count)
    return np.sort(rng.choice(len(place.rows), count, replace=False)) + place.rows.start


class _Part:
    """The heads of one group and some token ranges of a source, as if they were all there is."""

    def __init__(self, source: TokenBlocks, group: Group, ranges: list[Range]) -> None:
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
