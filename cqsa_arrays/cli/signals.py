"""Signals that end a command; a job ends where everything is committed, and by a second one at once."""

from __future__ import annotations

import signal
from types import FrameType

from .reasons import INTERRUPTED_BY, TERMINATED_BY

REASONS: dict[int, str] = {signal.SIGINT: INTERRUPTED_BY, signal.SIGTERM: TERMINATED_BY, signal.SIGHUP: TERMINATED_BY}


class Termination:
    """SIGTERM and a lost terminal unwind like an exit with ``code``, so that unfinished files are removed.

    An exception of a handler is lost where a library swallows it, in a callback or while it is imported: ``reason``
    stays, for a job to look at before it begins.
    """

    def __init__(self, code: int) -> None:
        self._code = code
        self.reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # what nohup asks for stays ignored
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.reason = REASONS[number]
        raise SystemExit(self._code)
