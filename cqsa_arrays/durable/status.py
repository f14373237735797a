"""How far a job is: finished, or not, whether or not a process works on it."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from ..errors import ArgumentError, StorageError, one_line
from ..planner import MOST_LANES
from ..storage import describe, target_of
from ..tables import html_table
from ..units import format_seconds
from .attempt import newest_now
from .claims import BEAT_S, Observer, Who, claim_path, holder, read_worker
from .ending import POLL_S, was_finished
from .fact import JobFact
from .folder import LOOKS, JobFolder, JobPaths, Picture
from .job import require_job
from .record import LaneRecord, Moment

# What a person reads: of more lanes only those that are computed have a line.
MOST_LINES = 16


@dataclass(frozen=True, slots=True)
class LaneStatus:
    """One lane: visible pairs that are committed, whether it is ``done``; who computes it now, and since when.

    ``running_since`` and ``committed_at`` are seconds of the clock of the machine that computed. ``pairs`` and
    ``computed_s`` are None of a finished job.
    """

    lane: int
    pairs: int | None
    computed_s: float | None
    done: bool
    running: str | None
    running_since: float | None
    committed_at: float | None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How far a job is, by what it has committed. ``str()`` is for people.

    ``out`` is its output file and ``state`` "running", "stopped" or "finished". ``pairs`` visible (query, key) pairs
    make the whole job, ``done_pairs`` of them are done; ``rate`` is pairs a second over the last commits of the lanes
    that run, or where none does of the last ones, and ``left_s`` the seconds that are left at that rate. ``computed_s``
    are the seconds that all runs took until their last commits, ``begun`` is the time (of the clock, in seconds) at
    which the job was begun: both None of a finished job, whose file does not say.
    """

    out: str
    state: str
    pairs: int
    done_pairs: int
    flops: int
    rate: float | None
    left_s: float | None
    computed_s: float | None
    begun: float | None
    device: str
    lanes: tuple[LaneStatus, ...]

    @property
    def running(self) -> bool:
        """Whether a process works on it."""
        return self.state == "running"

    @property
    def finished(self) -> bool:
        """Whether the output is complete."""
        return self.state == "finished"

    @property
    def share(self) -> float:
        """What is done of the whole job, from 0 to 1."""
        return 1.0 if self.finished else self.done_pairs / max(1, self.pairs)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({**asdict(self), "running": self.running, "finished": self.finished})

    def __str__(self) -> str:
        if self.finished:
            out = one_line(self.out)
            return f"{out}: finished, computed on {self.device}\n  check it: cqsa verify {out}"
        state = "running" if self.running else "not running"
        took, out = format_seconds(self.computed_s or 0.0), one_line(self.out)
        lines = [f"{out}: {self.share:.2%} done, {state}, {took} computed on {self.device}"]
        if self.rate is not None and self.left_s is not None:
            gflops = self.rate * self.flops / max(1, self.pairs) / 1e9
            lines.append(f"  {gflops:.1f} GFLOP/s, {format_seconds(self.left_s)} left at this rate")
        shown = self.lanes
        if len(shown) > MOST_LINES:
            done = sum(lane.done for lane in shown)
            lines.append(f"  {len(shown):,} lanes, of which {done:,} are done")
            shown = tuple(lane for lane in shown if lane.running)[:MOST_LINES]
        lines += [f"  lane {lane.lane}: {', '.join(_lane_facts(lane, self.pairs))}" for lane in shown]
        if not self.running:
            lines.append(f"  go on: cqsa resume {out}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<JobStatus {self.out!r}: {self.share:.2%} done, {self.state}>"

    def _repr_html_(self) -> str:
        lanes = [(lane.lane, *_lane_facts(lane, self.pairs)) for lane in self.lanes if not self.finished]
        return html_table(repr(self)[1:-1], lanes, ("lane", "done", "saved", "by") if lanes else ())


def _lane_facts(lane: LaneStatus, pairs: int) -> tuple[str, str, str]:
    """What is to be said of a lane of a job of so many pairs, for people."""
    ago = "nothing committed yet"
    if lane.committed_at is not None:
        ago = f"committed {format_seconds(max(0.0, time.time() - lane.committed_at))} ago"
    if lane.done:
        who = "done"
    elif lane.running and lane.running_since is not None:
        since = format_seconds(max(0.0, time.time() - lane.running_since))
        who = f"computed by {one_line(lane.running)}, which began {since} ago"
    else:
        who = "nobody computes it"
    return f"{(lane.pairs or 0) / max(1, pairs):.2%} of the job", ago, who


def status(out: str) -> JobStatus:
    """The job of ``out`` that is not over: its folder is there. Nothing is written, and nobody waited for.

    Raises ArgumentError where there is none, StorageError where it cannot be read.
    """
    folder = JobFolder(out := target_of(out))
    for _ in range(LOOKS):
        with suppress(FileNotFoundError):  # it has gone on, or ended: look again
            fact = require_job(folder)
            paths = fact.paths(folder)
            begun = any(map(os.path.exists, (paths.output, paths.finished)))
            if not begun and was_finished(out, fact):  # its run ended before it could remove the folder
                return finished_status(out)
            return _status(out, folder, fact)
    raise StorageError(f"{folder.path}: files of the job come and go. Is the disk in order?")


def _status(out: str, folder: JobFolder, fact: JobFact) -> JobStatus:
    paths = fact.paths(folder)
    picture = paths.look()
    records = [
        newest_now(paths, None, lane, picture) if lane in picture.done or lane in picture.checkpoints else None
        for lane in range(fact.lanes)
    ]
    runners = _runners(folder, paths, picture)
    lanes = tuple(_lane(lane, record, picture, runners) for lane, record in enumerate(records))
    rates = [
        (_rate(record.moments if record else ()), lane.running) for record, lane in zip(records, lanes, strict=True)
    ]
    now = [rate for rate, running in rates if running and rate is not None]
    known = [rate for rate, _ in rates if rate is not None]
    # Lanes that ran one after the other do not add up.
    rate = sum(now) if now else max(known, default=None)
    known_records = [record for record in records if record is not None]
    done, computed = sum(r.pairs for r in known_records), sum(r.computed_s for r in known_records)
    left = None if not rate else (fact.pairs - done) / rate
    state = "running" if runners else "stopped"
    return JobStatus(out, state, fact.pairs, done, fact.flops, rate, left, computed, fact.begun, fact.device, lanes)


def _lane(lane: int, record: LaneRecord | None, picture: Picture, runners: dict[str, Who | None]) -> LaneStatus:
    who = runners.get(f"lane-{lane}")
    return LaneStatus(
        lane, record.pairs if record else 0, record.computed_s if record else 0.0, lane in picture.done,
        str(who or "another process") if f"lane-{lane}" in runners else None, who.since if who else None,
        record.moments[-1].at if record and record.moments else None,
    )  # fmt: skip


def _runners(folder: JobFolder, paths: JobPaths, picture: Picture) -> dict[str, Who | None]:
    """Who works on what of a job. A process of another machine is believed to live if it is seen to within seconds."""
    watch, until = Observer(folder.path), time.monotonic() + 2 * BEAT_S
    claimed = {
        what: holder(claim_path(paths.directory, what, number))
        for what, number in picture.claims.items()
        if what == "finish" or (what.startswith("lane-") and int(what.partition("-")[2]) not in picture.done)
    }
    unknown, found = set(claimed.values()), dict[str, Who | None]()
    while unknown:
        for name in tuple(unknown):
            if watch.is_gone(name):
                unknown.discard(name)
                continue
            with suppress(FileNotFoundError):
                who = read_worker(folder.path, name)[0]
                if watch.was_seen_moving(name) or (who is not None and who.is_here):
                    unknown.discard(name)
                    found[name] = who
        if not unknown or time.monotonic() > until:
            break
        time.sleep(POLL_S)
    return {what: found[name] for what, name in claimed.items() if name in found}


def finished_status(out: str) -> JobStatus:
    """The finished job of ``out``, by what that file says of itself.

    Raises ArgumentError where it is no output of a job, StorageError where there is no such file or it cannot be read.
    """
    attributes = describe(out).attributes
    try:
        plan = json.loads(str(attributes["plan"]))
        flops, device, problem = int(plan["flops"]), str(plan["device"]), plan["problem"]
        lanes = range(min(int((plan.get("durability") or {}).get("lanes", 0)), MOST_LANES))
        pairs = flops // (2 * (int(problem["q"]["shape"][3]) + int(problem["v"]["shape"][3])))
    except (LookupError, TypeError, ValueError, RecursionError, ZeroDivisionError, AttributeError) as error:
        found = f"{out}, which no job has written"
        raise ArgumentError("out", found, "the output of a job", "Name the file that the job writes.") from error
    done = tuple(LaneStatus(lane, None, None, True, None, None, None) for lane in lanes)
    return JobStatus(out, "finished", pairs, pairs, flops, None, None, None, None, device, done)


def _rate(moments: tuple[Moment, ...]) -> float | None:
    """Pairs a second over the last commits."""
    if not moments:
        return None
    first = moments[0] if len(moments) > 1 else Moment(0.0, 0, 0.0)
    seconds = moments[-1].computed_s - first.computed_s
    return (moments[-1].pairs - first.pairs) / seconds if seconds > 0 else None
