"""What a client of a network file system does that a local disk does not: the switches of nfs_like.py."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass

Span = tuple[float, float]
"""A time in seconds is drawn between the two."""


@dataclass(frozen=True)
class Habits:
    """Which habits a client has; none by default, and no locks.

    ``known_s``: how long attributes, names (also those that were not there) and listings are believed.
    ``cached``: read from cached pages of 4096 bytes until a revalidation finds that the file has changed.
    ``write_back_s``: when a written page reaches the server by itself; fsync and close send it before. None: at once.
    ``whole_pages``: send a written page with all its bytes, as they were when it was read; else only what was written.
    ``late_after_kill_s``: when pages reach the server that a killed process left; None: when it is killed.
    ``lost``: how often the reply to a link, rename, unlink, mkdir, rmdir or exclusive create is lost. The client then
    hears what the server says to the same request again, or EIO, as often as ``lost_as_eio``.
    ``stale``: files that another client removed give ESTALE, even open ones.
    ``failures``: operation ("write", "fsync", "close", "create", ...), name of the error, how often.
    ``locks``: files can be locked, by each client for itself. Taken when it is mounted.
    """

    seed: int = 0
    known_s: Span = (0.0, 0.0)
    cached: bool = False
    write_back_s: Span | None = None
    whole_pages: bool = False
    late_after_kill_s: Span | None = None
    lost: float = 0.0
    lost_as_eio: float = 0.0
    stale: bool = False
    failures: tuple[tuple[str, str, float], ...] = ()
    locks: bool = False

    def __post_init__(self) -> None:
        for _, name, _ in self.failures:
            getattr(errno, name)  # an unknown one is noticed here

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Habits:
        found = json.loads(line)
        return cls(**{**found, "failures": tuple(tuple(failure) for failure in found["failures"])})


USUAL = Habits(
    known_s=(0.5, 3.0), cached=True, write_back_s=(0.1, 5.0), whole_pages=True, late_after_kill_s=(0.0, 5.0), stale=True
)
"""A client that is mounted with the usual options, nothing lost and nothing broken."""
