"""How far a job is, whether or not a process works on it."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass

from ..units import format_seconds
from .folder import JobFolder
from .job import JobFact, read_fact
from .ledger import Ledger
from .lock import Lock
from .record import Moment, read_lane, runner
from .states import lane_lock


@dataclass(frozen=True, slots=True)
class LaneStatus:
    """One lane: share of its work that is committed, by the record; who computes it now, if anybody."""

    lane: int
    pairs: int
    computed_s: float
    running: str | None
    committed_at: float | None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job by what it has committed. ``str()`` is for people.

    ``rate`` is visible (query, key) pairs a second over the last commits of the lanes that run, or where none does of
    the last ones; ``left_s`` what is left at that rate.
    """

    out: str
    pairs: int
    done_pairs: int
    flops: int
    rate: float | None
    left_s: float | None
    computed_s: float
    begun: float
    device: str
    lanes: tuple[LaneStatus, ...]

    @property
    def running(self) -> bool:
        """Whether a process works on it."""
        return any(lane.running for lane in self.lanes)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({**asdict(self), "running": self.running})

    def __str__(self) -> str:
        share = self.done_pairs / max(1, self.pairs)
        state = "running" if self.running else "not running"
        lines = [f"{self.out}: {share:.2%} done, {state}, {format_seconds(self.computed_s)} computed on {self.device}"]
        if self.rate is not None and self.left_s is not None:
            gflops = self.rate * self.flops / max(1, self.pairs) / 1e9
            lines.append(f"  {gflops:.1f} GFLOP/s, {format_seconds(self.left_s)} left at this rate")
        for lane in self.lanes:
            ago = "nothing committed yet"
            if lane.committed_at is not None:
                ago = f"committed {format_seconds(max(0.0, time.time() - lane.committed_at))} ago"
            who = f"computed by {lane.running}" if lane.running else "nobody computes it"
            lines.append(f"  lane {lane.lane}: {lane.pairs / max(1, self.pairs):.2%} of the job, {ago}, {who}")
        if not self.running:
            lines.append(f"  go on: cqsa resume {self.out}")
        return "\n".join(lines)


def status(out: str) -> JobStatus:
    """The unfinished job of ``out``. Raises ArgumentError where there is none, StorageError where it cannot be read."""
    folder = JobFolder(out)
    folder.require()
    with closing(Ledger(folder.ledger)) as ledger:
        fact = read_fact(ledger)
        records = [read_lane(ledger, lane) for lane in range(fact.lanes)]
        lanes = tuple(
            LaneStatus(
                lane, record.pairs, record.computed_s, _who_runs(folder, fact, ledger, lane),
                record.moments[-1].at if record.moments else None,
            )
            for lane, record in enumerate(records)
        )  # fmt: skip
    rates = [(_rate(record.moments), lane.running) for record, lane in zip(records, lanes, strict=True)]
    now = [rate for rate, running in rates if running and rate is not None]
    known = [rate for rate, _ in rates if rate is not None]
    # Lanes that ran one after the other do not add up.
    rate = sum(now) if now else max(known, default=None)
    done = sum(record.pairs for record in records)
    left = None if not rate else (fact.pairs - done) / rate
    computed = sum(record.computed_s for record in records)
    return JobStatus(out, fact.pairs, done, fact.flops, rate, left, computed, fact.begun, fact.device, lanes)


def _who_runs(folder: JobFolder, fact: JobFact, ledger: Ledger, lane: int) -> str | None:
    """Who holds the lock of a lane; None where nobody does, or could."""
    if not os.path.isdir(fact.directory(folder)):
        return None
    lock = Lock.take(lane_lock(fact.directory(folder), fact.key, lane))
    if lock is not None:
        lock.release()
        return None
    return runner(ledger, lane)


def _rate(moments: tuple[Moment, ...]) -> float | None:
    """Pairs a second over the last commits."""
    if not moments:
        return None
    first = moments[0] if len(moments) > 1 else Moment(0.0, 0, 0.0)
    seconds = moments[-1].computed_s - first.computed_s
    return (moments[-1].pairs - first.pairs) / seconds if seconds > 0 else None
