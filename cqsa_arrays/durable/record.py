"""What a checkpoint says: how far a lane is, its states, and what of which journals says what it has written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..engine.schedule import BEGIN, Position
from ..engine.statefile import Version, Versions
from .claims import Who
from .folder import ATTEMPT
from .journal import Extent
from .records import Fields

# Of so many commits a checkpoint says when they were made: enough to tell the rate of now.
RECENT = 16


@dataclass(frozen=True, slots=True)
class Moment:
    """A commit: seconds of the clock, visible (query, key) pairs done until then, seconds computed until then."""

    at: float
    pairs: int
    computed_s: float


@dataclass(frozen=True, slots=True)
class LaneRecord:
    """How far a lane is. ``key`` is the job's; ``versions`` are of the states of ``attempt``, of process ``by``."""

    key: str
    lane: int
    attempt: str = ""
    by: Who | None = None
    position: Position = BEGIN
    moments: tuple[Moment, ...] = ()
    versions: Versions = field(default_factory=dict)
    journals: tuple[Extent, ...] = ()

    @property
    def pairs(self) -> int:
        """Visible pairs done."""
        return self.moments[-1].pairs if self.moments else 0

    @property
    def computed_s(self) -> float:
        """Seconds that runs of this lane took, until the last commit."""
        return self.moments[-1].computed_s if self.moments else 0.0

    def facts(self) -> dict[str, Any]:
        """For a record."""
        p = self.position
        return {
            "key": self.key,
            "lane": self.lane,
            "attempt": self.attempt,
            "by": None if self.by is None else asdict(self.by),
            "position": [[p.group, p.task, p.step, p.rows]],
            "moments": [[m.at, m.pairs, m.computed_s] for m in self.moments],
            "states": [
                [group, start, v.slot, v.size_bytes, v.rows, v.checksum]
                for (group, start), v in sorted(self.versions.items())
            ],
            "journals": {one.attempt: [one.size_bytes, one.checksum] for one in self.journals},
        }


def lane_record(fields: Fields, key: str, lane: int) -> LaneRecord:
    """The checkpoint of that lane of that job; StorageError where it cannot be right."""
    fields.text("key", key)
    fields.whole("lane", lane, lane)
    if len(positions := fields.wholes("position", 4)) != 1:
        raise fields.wrong("position")
    versions: dict[tuple[int, int], Version] = {}
    for group, start, slot, size_bytes, rows, checksum in fields.wholes("states", 6):
        if slot > 1 or checksum >= 1 << 32:
            raise fields.wrong("states")
        versions[group, start] = Version(slot, size_bytes, rows, checksum)
    moments = []
    for at, pairs, seconds in fields.rows("moments", 3):
        if type(pairs) is not int:
            raise fields.wrong("moments")
        moments.append(Moment(float(at), pairs, float(seconds)))
    return LaneRecord(
        key, lane, fields.text("attempt", ATTEMPT), _process(fields.within("by")), Position(*positions[0]),
        tuple(moments), versions, _journals(fields),
    )  # fmt: skip


def _process(fields: Fields) -> Who:
    return Who(
        fields.text("host"),
        fields.text("machine"),
        fields.whole("pid"),
        fields.whole("started"),
        fields.number("since"),
    )


def _journals(fields: Fields) -> tuple[Extent, ...]:
    listed: Mapping[str, Any] = fields.mapping("journals")
    names = Fields({"names": list(listed.values())}, fields.path).wholes("names", 2)
    for name in listed:
        Fields({"journals": name}, fields.path).text("journals", ATTEMPT)
    return tuple(Extent(name, size, checksum) for name, (size, checksum) in zip(listed, names, strict=True))
