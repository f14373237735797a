"""What a ledger says, as numbers that were checked: a lane's place, its states, the rows that it has finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engine.schedule import BEGIN, Position
from ..engine.statefile import Version, Versions
from ..ranges import Range
from .ledger import Ledger

# Of so many commits the ledger keeps when they were made: enough to tell the rate of now.
RECENT = 16
# The checksum of rows that were written when a lane came to its end.
NOT_TAKEN = -1


@dataclass(frozen=True, slots=True)
class Moment:
    """A commit: seconds of the clock, visible (query, key) pairs done until then, seconds computed until then."""

    at: float
    pairs: int
    computed_s: float


@dataclass(frozen=True, slots=True)
class LaneRecord:
    """How far a lane is. ``finished`` counts the rows entries of it that the ledger has."""

    position: Position = BEGIN
    moments: tuple[Moment, ...] = ()
    versions: Versions = field(default_factory=dict)
    finished: int = 0

    @property
    def pairs(self) -> int:
        """Visible pairs done."""
        return self.moments[-1].pairs if self.moments else 0

    @property
    def computed_s(self) -> float:
        """Seconds that runs of this lane took, until the last commit."""
        return self.moments[-1].computed_s if self.moments else 0.0

    def facts(self, lane: int) -> dict[str, Any]:
        """For the ledger."""
        p, groups = self.position, sorted({group for group, _ in self.versions})
        found: dict[str, Any] = {
            f"lane/{lane}": {
                "position": [p.group, p.task, p.step, p.rows],
                "moments": [[m.at, m.pairs, m.computed_s] for m in self.moments],
                "groups": groups,
                "finished": self.finished,
            }
        }
        for group in groups:
            chunks = {start: v for (g, start), v in self.versions.items() if g == group}
            found[f"states/{lane}/{group}"] = [
                [start, v.slot, v.size_bytes, v.rows, v.checksum] for start, v in sorted(chunks.items())
            ]
        return found


def read_lane(ledger: Ledger, lane: int) -> LaneRecord:
    """The lane as it was committed last; StorageError where the ledger cannot be right."""
    with ledger.reading():
        fact, states = ledger.get(f"lane/{lane}"), ledger.facts(f"states/{lane}/")
    if fact is None:
        return LaneRecord()
    try:
        versions = {}
        for group in fact["groups"]:
            for start, slot, size_bytes, rows, checksum in states[f"states/{lane}/{group}"]:
                versions[int(group), int(start)] = Version(int(slot), int(size_bytes), int(rows), int(checksum))
        moments = tuple(Moment(float(at), int(pairs), float(s)) for at, pairs, s in fact["moments"])
        return LaneRecord(Position(*map(int, fact["position"])), moments, versions, int(fact["finished"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ledger.damaged(f"lane {lane} lacks something ({error!r})") from error


def rows_facts(lane: int, rows: Mapping[tuple[int, Range], int]) -> dict[str, Any]:
    """For the ledger: rows of a group that were written, and their checksum in the file."""
    return {
        f"rows/{lane}/{group}/{part.start}": [group, part.start, part.stop, checksum]
        for (group, part), checksum in rows.items()
    }


def read_rows(ledger: Ledger, lane: int, expected: int) -> list[tuple[int, Range, int]]:
    """(group, rows, checksum) of every entry of a lane, of which there must be so many."""
    found = ledger.facts(f"rows/{lane}/")
    if len(found) != expected:
        raise ledger.damaged(f"lane {lane} has {len(found)} entries of rows, and says {expected}")
    try:
        return [(int(g), Range(int(start), int(stop)), int(checksum)) for g, start, stop, checksum in found.values()]
    except (TypeError, ValueError) as error:
        raise ledger.damaged(f"rows of lane {lane} ({error!r})") from error


def runner(ledger: Ledger, lane: int) -> str:
    """Who has taken a lane last, for people."""
    found = ledger.get(f"runner/{lane}")
    return f"process {found.get('pid')} on {found.get('host')}" if isinstance(found, dict) else "another process"
