"""The record of a job: what is computed of which inputs, by which plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import START_OVER, StorageError
from ..planner import DISK, HOST, MEMORY, MOST_LANES, Plan
from ..storage import Locking
from .folder import KEY, JobFolder, JobPaths
from .records import Fields, read_record

# Of a candidate: what another machine must take over for the same cover, chunks and states.
_COUNTS = ("query_parts", "key_parts", "batches", "heads", "tile_tokens")
_MOST_PARTS = 1 << 50
_DEVICE = r"[a-z]+(:[a-z0-9]+)?"


@dataclass(frozen=True, slots=True)
class JobFact:
    """What the record of a job says.

    ``mark`` names the job in its output; ``key`` names its directory, and is part of the names of its files of states,
    which are in the directory ``states`` ("": in its own). ``moves`` is how often it went to another device.
    """

    mark: str
    key: str
    package: str
    identity: str
    device: str
    lanes: int
    chosen: dict[str, Any]
    problem: dict[str, Any]
    inputs: dict[str, Any]
    request: dict[str, Any]
    states: str
    overwrite: bool
    pairs: int
    flops: int
    begun: float
    moves: int = 0

    @property
    def locking(self) -> Locking:
        """How it opens HDF5 files."""
        found = self.request.get("options")
        value = found.get("locking") if isinstance(found, dict) else None
        return value if isinstance(value, bool) or value == "best-effort" else None

    def facts(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)

    def paths(self, folder: JobFolder) -> JobPaths:
        """Where its files are."""
        return JobPaths(folder.of(self.key), self.key, self.states or folder.of(self.key))

    def moved(self, plan: Plan, request: Mapping[str, Any]) -> JobFact:
        """The job as one of the device of ``plan``."""
        return replace(
            self, device=plan.device, identity=plan.identity, chosen=choice(plan), request=dict(request),
            moves=self.moves + 1,
        )  # fmt: skip

    def require_scratch(self, folder: JobFolder) -> None:
        """Raise StorageError where the states are gone with their directory; the job's own goes when the job ends."""
        if self.states and not os.path.isdir(self.states):
            text = f"{self.states}: the directory with this job's states is gone. Put it back. "
            raise StorageError(text, START_OVER)


def choice(plan: Plan) -> dict[str, Any]:
    """What another run must take over of ``plan``."""
    return {name: getattr(plan.chosen, name) for name in ("cover", "states", "keys_stay", *_COUNTS)}


def current(folder: JobFolder) -> JobFact | None:
    """The job of a folder as it is now, on the device that it was moved to last; None where there is none.

    Raises StorageError where what is there cannot be right.
    """
    try:
        fact = _fact(read_record(folder.record))
    except (FileNotFoundError, NotADirectoryError):
        folder_is_old = folder.is_old
        if folder_is_old:
            folder.require()
        return None
    paths = fact.paths(folder)
    while os.path.exists(moved := paths.moved(fact.moves + 1)):
        try:
            fact = _moved(fact, read_record(moved))
        except FileNotFoundError:  # it has just been ended
            break
    return fact


def _fact(fields: Fields) -> JobFact:
    states = fields.text("states")
    try:
        possible = not states or os.path.isabs(os.fsdecode(os.fsencode(states)))
    except UnicodeEncodeError:  # half a letter
        possible = False
    if not possible:
        raise fields.wrong("states")
    return JobFact(
        mark=fields.text("mark", KEY), key=fields.text("key", KEY), package=fields.text("package", r"[\w.+!-]{1,64}"),
        identity=fields.text("identity", r"[0-9a-f]{1,64}"), device=fields.text("device", _DEVICE),
        lanes=fields.whole("lanes", 1, MOST_LANES), chosen=_chosen(fields.within("chosen")),
        problem=fields.mapping("problem"), inputs=fields.mapping("inputs"), request=fields.mapping("request"),
        states=states, overwrite=fields.flag("overwrite"), pairs=fields.whole("pairs"), flops=fields.whole("flops"),
        begun=fields.number("begun"),
    )  # fmt: skip


def _moved(fact: JobFact, fields: Fields) -> JobFact:
    fields.text("key", fact.key)
    return replace(
        fact, device=fields.text("device", _DEVICE), identity=fields.text("identity", r"[0-9a-f]{1,64}"),
        chosen=_chosen(fields.within("chosen")), request=fields.mapping("request"), moves=fact.moves + 1,
    )  # fmt: skip


def _chosen(fields: Fields) -> dict[str, Any]:
    fields.text("cover", "cqs|rectangular")
    if fields.found.get("states") not in (MEMORY, HOST, DISK):
        raise fields.wrong("states")
    fields.flag("keys_stay")
    for name in _COUNTS:
        fields.whole(name, 1, _MOST_PARTS)
    return dict(fields.found)
